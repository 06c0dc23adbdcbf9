"""What can go wrong in a run, one fault after the other, and what then happens.

The README's table "When something goes wrong" says the same. Each form with SPD in it
is compared with its inner optimizer alone, under the same fault.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import aligned, bits

import spd_optax as spd

NAN, INF = float('nan'), float('inf')
ADAM = optax.adam(0.05)
START = {name: np.random.default_rng(i).normal(size=(2, 3)) for i, name in enumerate('ab')}
START = jax.tree.map(np.float32, START)
STEPS = 8


class Form(NamedTuple):
  """`make(anchor)`, and how its step is taken; `plain` is the optimizer alone."""

  make: Callable[..., Any]
  plain: Any = ADAM
  applies: bool = False


FORMS = {
  'projection_decay': Form(
    lambda anchor=None: optax.chain(spd.projection_decay(anchor, 3.0), ADAM)
  ),
  'with_projection_decay': Form(lambda anchor=None: spd.with_projection_decay(ADAM, anchor)),
  'apply': Form(lambda anchor=None: spd.with_projection_decay(ADAM, anchor), applies=True),
  'l2_sp': Form(lambda anchor=None: optax.chain(spd.l2_sp(anchor), ADAM)),
}
every_form = pytest.mark.parametrize('form', FORMS.values(), ids=FORMS)
every_spd = pytest.mark.parametrize('form', list(FORMS.values())[:3], ids=list(FORMS)[:3])


def around_sgd(*args: Any, **options: Any) -> Any:
  return spd.with_projection_decay(optax.sgd(0.1), *args, **options)


def taken(tx: Any, applies: bool, **options: Any) -> Any:
  """The jitted step: params, state, gradients -> params, state."""

  def step(params: Any, state: Any, gradients: Any) -> Any:
    if applies:
      return tx.apply(gradients, state, params)
    updates, state = tx.update(gradients, state, params)
    return optax.apply_updates(params, updates), state

  return jax.jit(step, **options)


@functools.cache
def compiled(form: Form, given: bool = False) -> tuple[Any, Any]:
  """The transform and its step, compiled once for all tests."""
  tx = form.make(START if given else None)
  return tx, taken(tx, form.applies)


@functools.cache
def alone(plain: Any) -> Any:
  return taken(plain, applies=False)


def noise(step: int) -> Any:
  """Gradients that drive away from the start on average, and back now and then."""
  rng = np.random.default_rng(step)
  return {name: np.float32(rng.normal(size=(2, 3)) - 0.3 * START[name]) for name in 'ab'}


def run(step: Any, params: Any, state: Any, gradients: Any) -> Any:
  for gradient in gradients:
    params, state = step(params, state, gradient)
  return params, state


def trained(form: Form, steps: int = STEPS, given: bool = False) -> Any:
  tx, step = compiled(form, given)
  return run(step, START, tx.init(START), map(noise, range(steps)))


def inner_of(state: Any) -> Any:
  return state.inner_state if hasattr(state, 'inner_state') else state[1]


def own(state: Any, field: str) -> Any:
  """A field of SPD's own state."""
  return optax.tree.get(state, field)


def of_masked_batch(step: int) -> Any:
  """The gradient of a mean over a batch whose examples are all masked out: 0/0."""

  def loss(params: Any) -> jax.Array:
    mask = jnp.zeros((4, 1))
    return jnp.sum(mask * (jnp.ones((4, 2)) @ params['a'] + params['b'][0])) / jnp.sum(mask)

  return jax.grad(loss)(START)


def of_empty_batch() -> Any:
  """The gradient of a mean over no examples at all: 0, though the mean is NaN."""

  def loss(params: Any) -> jax.Array:
    return jnp.mean(jnp.ones((0, 2)) @ (params['a'] + params['b']))

  return jax.grad(loss)(START)


def scaled_too_far(step: int) -> Any:
  """Gradients of a loss scale under which float16 overflows, scaled back."""
  scale = np.float32(2**20)
  with np.errstate(over='ignore'):
    return jax.tree.map(lambda g: np.float32(np.float16(g * scale)) / scale, noise(step))


BAD = {
  'NaN': lambda step: jax.tree.map(lambda g: g * NAN, noise(step)),
  'inf': lambda step: jax.tree.map(lambda g: g + INF, noise(step)),
  'NaN in one leaf': lambda step: noise(step) | {'a': noise(step)['a'] * NAN},
  'inf in one number': lambda step: noise(step) | {'a': np.float32([[INF, 1, 1], [1, 1, 1]])},
  'masked batch': of_masked_batch,
  'loss scale': scaled_too_far,
}
every_bad = pytest.mark.parametrize('bad', BAD.values(), ids=BAD)


@every_bad
@every_form
def test_a_bad_gradient_does_what_it_does_to_the_optimizer_alone(form, bad):
  """Catches NaN that SPD spreads to other layers, to its anchor or its counts, and a layer held.

  SPD adds nothing: what follows is the inner optimizer's answer to that gradient.
  """
  step = compiled(form)[1]
  params, state = trained(form)
  gradients = jax.tree.map(np.asarray, bad(STEPS))
  hit = [name for name in 'ab' if not np.isfinite(gradients[name]).all()]
  after, next_state = step(params, state, gradients)
  clean, _ = step(params, state, noise(STEPS))
  expected, expected_inner = alone(form.plain)(params, inner_of(state), gradients)
  for name in hit:
    assert not own(next_state, 'condition')[name]
    assert own(next_state, 'constrained')[name] == own(state, 'constrained')[name]
    np.testing.assert_array_equal(np.isfinite(after[name]), np.isfinite(expected[name]))
    finite_moments = jax.tree.map(np.isfinite, expected_inner)
    chex.assert_trees_all_equal(jax.tree.map(np.isfinite, inner_of(next_state)), finite_moments)
  untouched = [name for name in 'ab' if name not in hit]
  assert bits([after[name] for name in untouched]) == bits([clean[name] for name in untouched])
  assert bits(own(next_state, 'anchor')) == bits(START)
  chex.assert_tree_all_finite([own(next_state, field) for field in ('ratio', 'distance')])


@functools.cache
def skipping(form: Form) -> tuple[Any, Any]:
  tx = optax.apply_if_finite(form.make(), 5)
  return tx, taken(tx, applies=False)


@every_bad
@pytest.mark.parametrize('form', [form for form in FORMS.values() if not form.applies])
def test_a_bad_step_that_is_skipped_never_was(form, bad):
  """Catches a capture, a count or a moment of a step that `apply_if_finite` takes back.

  Of the first step, too: there an anchor is captured.
  """
  tx, step = skipping(form)
  gradients = [bad(0), noise(0), noise(1), bad(2), noise(2)]
  params, state = run(step, START, tx.init(START), gradients)
  expected = run(step, START, tx.init(START), map(noise, range(3)))
  assert bits((params, state.inner_state)) == bits((expected[0], expected[1].inner_state))
  assert int(state.total_notfinite) == 2


def test_a_step_that_a_loss_scale_takes_back_never_was():
  """Catches a state that cannot be chosen leaf by leaf, as a loss scale does it."""
  tx, step = compiled(FORMS['with_projection_decay'])

  found = (START, tx.init(START))
  for gradients in (scaled_too_far(0), noise(0), scaled_too_far(1), noise(1)):
    finite = all(np.isfinite(g).all() for g in gradients.values())
    taken_back = functools.partial(jnp.where, finite)
    found = jax.tree.map(taken_back, step(*found, gradients), found)
  assert bits(found) == bits(trained(FORMS['with_projection_decay'], 2))


@every_spd
def test_without_a_gradient_or_at_the_anchor_nothing_is_held(form):
  """Catches 0/0, and a layer that is held by a gradient of zero or at its anchor."""
  params, state = trained(form)
  _, step = compiled(form)
  zeros = jax.tree.map(np.zeros_like, START)
  chex.assert_trees_all_equal(of_empty_batch(), zeros)
  for at, gradients in ((params, zeros), (START, noise(0)), (START, zeros)):
    after, next_state = step(at, state, gradients)
    expected, _ = alone(form.plain)(at, inner_of(state), gradients)
    assert not any(own(next_state, 'condition').values())
    assert bits(own(next_state, 'constrained')) == bits(own(state, 'constrained'))
    chex.assert_trees_all_close(after, expected, rtol=1e-6)
    chex.assert_tree_all_finite(next_state)


@every_form
def test_params_rolled_back_are_compared_with_the_same_anchor(form):
  """Catches a distance, or an anchor, that follows the params through the state."""
  early, _ = trained(form, 2)
  _, state = trained(form)
  _, step = compiled(form)
  _, after = step(early, state, noise(2))
  assert bits(own(after, 'anchor')) == bits(START)
  for name, distance in own(after, 'distance').items():
    np.testing.assert_allclose(distance, np.linalg.norm(early[name] - START[name]), rtol=1e-5)
  # The whole checkpoint taken back is the run from there.
  found = run(step, *trained(form, 2), map(noise, range(2, STEPS)))
  assert bits(found) == bits(trained(form))


@every_form
def test_the_optimizer_begins_again_and_the_anchor_stays(form):
  """Catches an anchor that can be kept only with the old moments."""
  params, state = trained(form)
  fresh = ADAM.init(params)
  around = hasattr(state, 'inner_state')
  state = state._replace(inner_state=fresh) if around else (state[0], fresh)
  _, after = compiled(form)[1](params, state, noise(0))
  assert bits(own(after, 'anchor')) == bits(START)
  assert int(optax.tree.get_all_with_path(after, 'count')[0][1]) in (1, STEPS + 1)
  for name, distance in own(after, 'distance').items():
    np.testing.assert_allclose(distance, np.linalg.norm(params[name] - START[name]), rtol=1e-5)


@pytest.mark.parametrize('given', [False, True])
@every_form
def test_a_fresh_state_takes_the_anchor_that_was_passed_or_else_captures(form, given):
  """Catches a given anchor that is lost with the state, and a silent second meaning of None."""
  params, _ = trained(form, given=given)
  tx, step = compiled(form, given)
  _, state = step(params, tx.init(params), noise(0))
  assert bits(own(state, 'anchor')) == bits(START if given else params)


@pytest.mark.filterwarnings('ignore:Some donated buffers were not usable')
@every_form
def test_every_buffer_can_be_donated(form):
  """Catches an output that aliases an input, and a read after a buffer was overwritten."""
  tx = form.make()
  step = taken(tx, form.applies, donate_argnums=(0, 1, 2))
  params, gradients = jax.tree.map(jnp.array, START), [noise(i) for i in range(STEPS)]
  found = run(step, params, tx.init(params), jax.tree.map(jnp.array, gradients))
  assert all(leaf.is_deleted() for leaf in params.values())
  assert bits(found) == bits(trained(form))


def test_memory_that_the_caller_overwrites():
  """Catches an anchor that is the caller's memory: after `init`, `put_anchor` and `reanchor`."""
  mine = {'w': aligned((64, 64))}
  params = {'w': jnp.zeros((64, 64))}
  tx = spd.adam_spd(1e-3, mine)
  mine['w'][:] = 2.0  # not yet copied
  state = tx.init(params)
  slim = spd.drop_anchor(state)
  found = {'init': state, 'put': spd.put_anchor(slim, mine), 'new': spd.reanchor(state, mine)}
  mine['w'][:] = 3.0
  found['update'] = tx.update(params, state, params)[1]
  for name, state in found.items():
    assert bool((own(state, 'anchor')['w'] == 2.0).all()), name


def test_a_following_anchor_does_not_follow_params_that_are_not_finite():
  """Catches an anchor that is NaN for ever, though the params were rolled back."""
  tx = around_sgd(START, anchor_ema=0.9)
  step = taken(tx, applies=False)
  params, state = run(step, START, tx.init(START), map(noise, range(2)))
  broken = params | {'a': params['a'].at[1, 2].set(NAN).at[0, 0].set(INF)}
  _, after = step(broken, state, noise(2))
  _, expected = step(params, state, noise(2))
  mask = np.isfinite(broken['a'])
  found, usual, old = (own(s, 'anchor')['a'] for s in (after, expected, state))
  np.testing.assert_array_equal(found, np.where(mask, usual, old))


@pytest.mark.parametrize(
  'make', [spd.projection_decay, around_sgd], ids=['projection_decay', 'with_projection_decay']
)
def test_a_strength_that_is_not_finite_holds_nothing(make):
  """Catches NaN from a schedule that reaches the params."""
  tx, plain = make(START, lambda count: jnp.array([NAN, INF])[count]), make(START, 0.0)
  state = tx.init(START)
  params, update = jax.tree.map(lambda x: x + 0.1, START), jax.jit(tx.update)
  for _ in range(2):
    updates, state = update(params, state, params)
    assert bits(updates) == bits(plain.update(params, plain.init(START), params)[0])


def test_counters_saturate():
  """Catches a count that wraps around to 0 after 2³¹ steps: None would be captured again."""
  largest = np.iinfo(np.int32).max
  form = FORMS['with_projection_decay']
  params, state = trained(form)
  state = optax.tree.set(state, count=jnp.int32(largest - 1))
  constrained = {name: jnp.int32(largest - 1) for name in 'ab'}
  decay = state.projection_decay._replace(constrained=constrained)
  state = state._replace(projection_decay=decay)
  _, step = compiled(form)
  for _ in range(3):
    outward = jax.tree.map(lambda p, a: p - a, params, START)  # held
    params, state = step(params, state, outward)
    assert bits(own(state, 'anchor')) == bits(START)
  assert int(state.projection_decay.count) == largest
  assert [int(x) for x in own(state, 'constrained').values()] == [largest, largest]


@pytest.mark.parametrize('ema', [1.0, 1.5, -0.1, NAN])
def test_an_injected_ema_out_of_range_moves_no_anchor(ema):
  """Catches an anchor that flees from the params, which no error can tell of under jit."""
  tx = spd.projection_decay(START, anchor_ema=jnp.float32(ema))
  params = jax.tree.map(lambda x: x + 0.1, START)
  _, state = jax.jit(tx.update)(noise(0), tx.init(START), params)
  assert bits(own(state, 'anchor')) == bits(START)
