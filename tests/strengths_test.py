"""A strength that is NaN, infinite or negative when the step runs: nothing is held or pushed.

The numbers are multiples of powers of two, so that what is compiled with a step rounds nothing.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from by_reference import own

import spd_optax as spd

BAD = {'nan': float('nan'), 'inf': float('inf'), '-inf': -float('inf'), 'negative': -1.0}
# The deviation is (1, 2, 4) here, ‖d‖² = 21; gradients point home, and the optimizers go uphill.
PARAMS = {'w': jnp.array([3.0, 2.0, 5.0])}
ANCHOR = {'w': np.array([2.0, 0.0, 1.0], np.float32)}
GRADIENT = {'w': jnp.array([0.25, 0.5, 1.0])}
UPHILL = optax.sgd(-0.5)


def sgd_spd(strength):
  return spd.with_projection_decay(UPHILL, ANCHOR, strength)


def sgd_spd_with_margin(strength):
  return spd.with_projection_decay(UPHILL, ANCHOR, strength, margin=0.25)


def adam_spd(strength):
  return spd.adam_spd(0.5, ANCHOR, strength, b1=0.5, b2=0.5, eps=1.0)


# A transform, what it is where nothing is held, and what it adds to that at strength 1 in the
# first step: g + cos ‖g‖ d/‖d‖ with cos = 1 and g = d/4; u − r (θ̃ − θ_0) with θ̃ − θ_0 =
# 9/8 d, so r = 1/9; g + d. Adam goes downhill here: it is tested but for its strengths alone.
TRANSFORMS = {
  'projection_decay': (functools.partial(spd.projection_decay, ANCHOR), optax.identity(), 1 / 4),
  'with_projection_decay': (sgd_spd, UPHILL, -1 / 8),
  'with_projection_decay, margin': (sgd_spd_with_margin, UPHILL, -1 / 8),
  'adam_spd': (adam_spd, optax.adam(0.5, b1=0.5, b2=0.5, eps=1.0), None),
  'l2_sp': (functools.partial(spd.l2_sp, ANCHOR), optax.identity(), 1.0),
}
every_transform = pytest.mark.parametrize('transform', TRANSFORMS)
every_bad = pytest.mark.parametrize('bad', BAD.values(), ids=BAD)
jit_and_eager = pytest.mark.parametrize('wrap', [jax.jit, lambda f: f], ids=['jit', 'eager'])


def scheduled(make, value):
  return make(lambda count: jnp.float32(value))


def scheduled_number(make, value):
  return make(lambda count: value)


def scheduled_numpy(make, value):
  return make(lambda count: np.float64(value))


def array(make, value):
  return make(jnp.float32(value))


def injected(make, value):
  return optax.inject_hyperparams(lambda strength: make(strength))(strength=value)


def injected_schedule(make, value):
  return injected(make, lambda count: jnp.float32(value))


SOURCES = [scheduled, scheduled_number, scheduled_numpy, array, injected, injected_schedule]
MISTAKES = [(source, 'nan') for source in SOURCES] + [(scheduled, bad) for bad in BAD][1:]
every_mistake = pytest.mark.parametrize(
  ('source', 'bad'), MISTAKES, ids=[f'{source.__name__}-{bad}' for source, bad in MISTAKES]
)


def bits(tree):
  return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def state_of(state):
  """The library's own state, also below that of inject_hyperparams."""
  return own(getattr(state, 'inner_state', state) if hasattr(state, 'hyperparams') else state)


def assert_free(state):
  state = state_of(state)
  assert not state.condition['w']
  assert int(state.constrained['w']) == 0


@jit_and_eager
@every_mistake
@every_transform
def test_nothing_is_held(transform, source, bad, wrap):
  """Catches a negative strength that pushes outward under jit, and errors without it."""
  make, plain, _ = TRANSFORMS[transform]
  tx = source(make, BAD[bad])
  state, inner = tx.init(PARAMS), plain.init(PARAMS)
  for _ in range(2):
    updates, state = wrap(tx.update)(GRADIENT, state, PARAMS)
    wanted, inner = wrap(plain.update)(GRADIENT, inner, PARAMS)
    assert bits(updates) == bits(wanted)
    assert_free(state)


@jit_and_eager
@every_bad
@pytest.mark.parametrize('make', [sgd_spd, sgd_spd_with_margin])
def test_apply_holds_nothing(make, bad, wrap):
  """Catches `apply` that goes its own way with such a strength."""
  tx = scheduled(make, bad)
  params, state = wrap(tx.apply)(GRADIENT, tx.init(PARAMS), PARAMS)
  np.testing.assert_array_equal(params['w'], [3.125, 2.25, 5.5])
  assert_free(state)


@jit_and_eager
@every_bad
@pytest.mark.parametrize('transform', [name for name in TRANSFORMS if name != 'adam_spd'])
def test_the_next_step_holds_again(transform, bad, wrap):
  """Catches a bad strength that stays, in the state or in a branch taken once."""
  make, plain, added = TRANSFORMS[transform]
  tx = make(lambda count: jnp.where(count == 1, bad, 1.0))
  step, state = wrap(tx.update), tx.init(PARAMS)
  alone = np.asarray(plain.update(GRADIENT, plain.init(PARAMS), PARAMS)[0]['w'])
  held = alone + added * np.array([1.0, 2.0, 4.0])
  for at, (wanted, condition, constrained) in enumerate(
    [(held, True, 1), (alone, False, 1), (held, True, 2)]
  ):
    updates, state = step(GRADIENT, state, PARAMS)
    np.testing.assert_allclose(updates['w'], wanted, 1e-6, 1e-6, err_msg=f'step {at}')
    assert bool(state_of(state).condition['w']) == condition
    assert int(state_of(state).constrained['w']) == constrained
    np.testing.assert_allclose(state_of(state).distance['w'], np.sqrt(21), rtol=1e-6)


@every_bad
@every_transform
def test_arrays_are_accepted_where_they_are_made(transform, bad):
  """Catches an error for a JAX array that there is not where the array is traced."""
  make, *_ = TRANSFORMS[transform]
  make(jnp.float32(bad))
  jax.jit(lambda strength: make(strength).init(PARAMS))(jnp.float32(bad))


@pytest.mark.parametrize('kind', [float, np.float32, np.float64, np.array])
@every_bad
@every_transform
def test_numbers_out_of_range_are_errors(transform, bad, kind):
  """Catches a mistake in a constant that is noticed only by what training does."""
  make, *_ = TRANSFORMS[transform]
  with pytest.raises(ValueError, match='strength: expected a finite number ≥ 0'):
    make(kind(bad))


@every_bad
@every_transform
def test_one_bad_run_of_several(transform, bad):
  """Catches a strength that is judged for all runs of vmap at once."""
  make, plain, _ = TRANSFORMS[transform]

  def step(strength):
    tx = make(strength)
    return tx.update(GRADIENT, tx.init(PARAMS), PARAMS)

  updates, state = jax.vmap(step)(jnp.array([1.0, bad, 1.0]))
  alone = plain.update(GRADIENT, plain.init(PARAMS), PARAMS)[0]['w']
  np.testing.assert_allclose(updates['w'][1], alone, rtol=1e-6)
  np.testing.assert_array_equal(state_of(state).condition['w'], [True, False, True])
  np.testing.assert_array_equal(updates['w'][0], updates['w'][2])
