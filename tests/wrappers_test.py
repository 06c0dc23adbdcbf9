"""Around and within other optimizers: `apply` that is kept, wrong structures, warnings, sam."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import spd_optax as spd

PARAMS = {'a': jnp.array([3.0, 2.0]), 'b': {'c': jnp.array([1.0, -1.0])}}
GRADIENTS = {'a': jnp.array([0.5, 0.25]), 'b': {'c': jnp.array([1.0, -0.5])}}
UPHILL = optax.sgd(-0.5)
# Around UPHILL with the anchor 0: 'a' and 'b/c' are held, and keep their length.
NORMS = {'a': 13**0.5, 'b': 2**0.5}
AWAY = {'a': np.array([3.25, 2.125]), 'b': np.array([1.5, -1.25])}


def held():
  return spd.with_projection_decay(UPHILL, 0)


def assert_held(params):
  """The params that `apply` gives: on the sphere where they were."""
  for name, away in AWAY.items():
    wanted = away / np.linalg.norm(away) * NORMS[name]
    found = params[name] if name == 'a' else params[name]['c']
    np.testing.assert_allclose(found, wanted, rtol=1e-6)


KEPT = {
  '_replace init': lambda tx: tx._replace(init=tx.init),
  '_replace update': lambda tx: tx._replace(update=tx.update),
  '_replace nothing': lambda tx: tx._replace(),
  'constructor': lambda tx: spd.ProjectionDecayOptimizer(tx.init, tx.update),
  'by name': lambda tx: spd.ProjectionDecayOptimizer(init=tx.init, update=tx.update),
  'with_extra_args_support': optax.with_extra_args_support,
  'twice': lambda tx: tx._replace(init=tx.init)._replace(init=tx.init),
}


@pytest.mark.parametrize('wrap', [jax.jit, lambda f: f], ids=['jit', 'eager'])
@pytest.mark.parametrize('keep', KEPT.values(), ids=KEPT)
def test_apply_is_kept(keep, wrap):
  """Catches an `apply` that is an attribute of one object, and lost where that is replaced."""
  tx = keep(held())
  assert isinstance(tx, spd.ProjectionDecayOptimizer)
  params, state = wrap(tx.apply)(GRADIENTS, tx.init(PARAMS), PARAMS)
  assert_held(params)
  assert all(state.projection_decay.condition.values())
  init, update = tx
  updates, _ = update(GRADIENTS, init(PARAMS), PARAMS)
  assert_held(optax.apply_updates(PARAMS, updates))


def test_a_replaced_update_is_what_apply_does():
  """Catches an `apply` that goes on with the update that was replaced."""
  tx = held()

  def doubled(gradients, state, params=None, **extra_args):
    updates, state = tx.update(gradients, state, params, **extra_args)
    return jax.tree.map(lambda u: 2 * u, updates), state

  changed = tx._replace(update=doubled)
  params, state = changed.apply(GRADIENTS, changed.init(PARAMS), PARAMS)
  once, _ = tx.apply(GRADIENTS, tx.init(PARAMS), PARAMS)
  wanted = jax.tree.map(lambda p, q: p + 2 * (q - p), PARAMS, once)
  for found, value in zip(jax.tree.leaves(params), jax.tree.leaves(wanted), strict=True):
    np.testing.assert_allclose(found, value, rtol=1e-6, atol=1e-6)
  assert int(state.projection_decay.count) == 1


def test_an_update_of_ones_own_alone():
  """Catches an `apply` that needs a state or an update of the library's own."""
  tx = spd.ProjectionDecayOptimizer(UPHILL.init, UPHILL.update)
  params, _ = tx.apply(GRADIENTS, tx.init(PARAMS), PARAMS)
  np.testing.assert_allclose(params['a'], AWAY['a'], rtol=1e-6)


def test_extra_arguments_reach_a_replaced_update():
  """Catches an `apply` that calls another update without its arguments."""

  def scaled(gradients, state, params=None, *, factor):
    del params
    return jax.tree.map(lambda g: factor * g, gradients), state

  tx = held()._replace(update=scaled)
  params, _ = tx.apply(GRADIENTS, tx.init(PARAMS), PARAMS, factor=2.0)
  np.testing.assert_allclose(params['a'], [4.0, 2.5], rtol=1e-6)


SPD = {
  'adam_spd': lambda: spd.adam_spd(0.01),
  'with_projection_decay': held,
  'projection_decay': lambda: optax.chain(spd.projection_decay(), optax.adam(0.01)),
}


@pytest.mark.parametrize('wrap', [jax.jit, lambda f: f], ids=['jit', 'eager'])
@pytest.mark.parametrize('make', SPD.values(), ids=SPD)
def test_sam_in_its_default_mode_says_what_to_do(make, wrap):
  """Catches conditions that become integers, and a second compile, instead of an error."""
  tx = optax.contrib.sam(make(), optax.sgd(0.05))
  _, state = tx.update(GRADIENTS, tx.init(PARAMS), PARAMS)
  with pytest.raises(TypeError, match='opaque_mode=True'):
    wrap(tx.update)(GRADIENTS, state, PARAMS)


@pytest.mark.parametrize('make', SPD.values(), ids=SPD)
def test_sam_in_a_loop_says_what_to_do(make):
  """Catches an error about the types of a carry, where the cause is a mode of sam."""
  tx = optax.contrib.sam(make(), optax.sgd(0.05))

  def run(state):
    for _ in range(3):
      _, state = tx.update(GRADIENTS, state, PARAMS)
    return state

  with pytest.raises(TypeError, match='opaque_mode=True'):
    jax.jit(run)(tx.init(PARAMS))


@pytest.mark.parametrize('make', SPD.values(), ids=SPD)
def test_sam_in_opaque_mode(make):
  """Catches an error that is raised where sam does no harm."""
  tx = optax.contrib.sam(make(), optax.sgd(0.05), opaque_mode=True)

  def grad(params, _):
    return jax.tree.map(lambda p: 2 * p, params)

  def step(carry, _):
    params, state = carry
    updates, state = tx.update(grad(params, 0), state, params, grad_fn=grad)
    return (optax.apply_updates(params, updates), state), None

  (_, state), _ = jax.jit(lambda c: jax.lax.scan(step, c, length=4))((PARAMS, tx.init(PARAMS)))
  conditions = optax.tree.get(state, 'condition')
  assert all(value.dtype == bool for value in conditions.values())


def returning(change):
  """An optimizer whose updates are changed."""
  return optax.GradientTransformation(
    lambda params: optax.EmptyState(), lambda g, s, params=None: (change(g), s)
  )


STRUCTURES = {  # what the inner optimizer returns, and the leaves that the message must name
  'missing': (lambda g: {'a': g['a'], 'b': {}}, 'b/c'),
  'missing subtree': (lambda g: {'a': g['a']}, 'b/c'),
  'none': (lambda g: {'a': None, 'b': g['b']}, 'a'),
  'more': (lambda g: {**g, 'z': g['a']}, 'z'),
  'other keys': (lambda g: {'a': g['a'], 'b': {'d': g['b']['c']}}, 'b/d & b/c'),
  'other order': (lambda g: {'b': {'c': g['a']}, 'z': g['b']['c']}, 'z & a'),
  'list': (jax.tree.leaves, '0 & 1 & a & b/c'),
  'nothing': (lambda g: None, 'a & b/c'),
}


@pytest.mark.parametrize('name', ['update', 'apply'])
@pytest.mark.parametrize('change', STRUCTURES)
def test_an_optimizer_that_returns_another_structure(change, name):
  """Catches updates that are paired with params by their place in a list."""
  function, leaves = STRUCTURES[change]
  tx = spd.with_projection_decay(returning(function), 0)
  with pytest.raises(ValueError, match='inner optimizer') as caught:
    getattr(tx, name)(GRADIENTS, tx.init(PARAMS), PARAMS)
  lines = str(caught.value).splitlines()
  for leaf in leaves.split(' & '):
    assert any(line.strip().startswith(f'{leaf}:') for line in lines), str(caught.value)


@pytest.mark.parametrize('name', ['update', 'apply'])
def test_an_optimizer_that_returns_another_order(name):
  """Catches updates that are paired by place where only the order of the keys differs."""
  change = lambda g: dict(reversed(g.items()))  # noqa: E731  # jax sorts keys: the same tree
  tx = spd.with_projection_decay(returning(change), 0)
  out, _ = getattr(tx, name)(GRADIENTS, tx.init(PARAMS), PARAMS)
  plain = spd.with_projection_decay(optax.identity(), 0)
  wanted, _ = getattr(plain, name)(GRADIENTS, plain.init(PARAMS), PARAMS)
  for found, value in zip(jax.tree.leaves(out), jax.tree.leaves(wanted), strict=True):
    np.testing.assert_array_equal(found, value)


@pytest.mark.parametrize('name', ['update', 'apply'])
def test_an_optimizer_that_returns_another_shape(name):
  """Catches an update that is broadcast over a param."""
  tx = spd.with_projection_decay(returning(lambda g: {**g, 'a': jnp.ones((3, 2))}), 0)
  with pytest.raises(ValueError, match=r'(?m)^ *a: .*3, 2'):
    getattr(tx, name)(GRADIENTS, tx.init(PARAMS), PARAMS)


def init(tx, params):
  """Initializes on the line below, which a warning is to point at."""
  return tx.init(params)


LINE = init.__code__.co_firstlineno + 2
MANY = 5
NARROW = {f'layer_{i}': jnp.ones(2, jnp.bfloat16) for i in range(MANY)}
FULL = {f'layer_{i}': jnp.ones(2) for i in range(MANY)}
# What is warned of: options, params, a part of the message.
WARNINGS = {
  'narrow': ({}, NARROW, 'narrower than float32'),
  'memory': ({'anchor_memory_kind': 'pinned_host'}, FULL, 'anchor_memory_kind'),
}


def multi_steps(**options):
  return optax.MultiSteps(spd.adam_spd(1e-3, **options), 2)


WARNING = {
  'projection_decay': spd.projection_decay,
  'with_projection_decay': lambda **options: spd.with_projection_decay(UPHILL, **options),
  'adam_spd': lambda **options: spd.adam_spd(1e-3, **options),
  'chain': lambda **options: optax.chain(spd.projection_decay(**options), optax.adam(1e-3)),
  'MultiSteps': multi_steps,
  'masked': lambda **options: optax.masked(
    spd.adam_spd(1e-3, **options), dict.fromkeys(FULL, True)
  ),
}


@pytest.mark.parametrize('warned', WARNINGS)
@pytest.mark.parametrize('make', WARNING.values(), ids=WARNING)
def test_a_warning_points_at_the_line_of_the_user(make, warned):
  """Catches a warning for each leaf, and one that points into the library or into optax."""
  options, params, text = WARNINGS[warned]
  tx = make(**options)
  with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter('always')
    init(tx, params)
  ours = [warning for warning in caught if text in str(warning.message)]
  assert len(ours) == 1, [str(warning.message) for warning in ours]
  assert (ours[0].filename, ours[0].lineno) == (__file__, LINE)


@pytest.mark.parametrize('warned', WARNINGS)
def test_a_warning_under_jit_is_one(warned):
  """Catches a warning for each leaf where init is traced."""
  options, params, text = WARNINGS[warned]
  tx = spd.adam_spd(1e-3, **options)
  with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter('always')
    jax.jit(tx.init)(params)
  assert sum(text in str(warning.message) for warning in caught) == 1


MAKERS = {
  'projection_decay': spd.projection_decay,
  'with_projection_decay': lambda anchor: spd.with_projection_decay(UPHILL, anchor),
  'adam_spd': lambda anchor: spd.adam_spd(1e-3, anchor),
  'l2_sp': spd.l2_sp,
}


@pytest.mark.parametrize('make', MAKERS.values(), ids=MAKERS)
def test_a_second_init_after_the_anchor_was_deleted(make):
  """Catches an error from inside jax that says nothing of an anchor."""
  anchor = {'a': jnp.zeros(2), 'b': {'c': jnp.zeros(2)}}
  tx = make(anchor)
  tx.init(PARAMS)
  anchor['b']['c'].delete()
  with pytest.raises((TypeError, ValueError), match='anchor') as caught:
    tx.init(PARAMS)
  assert 'b/c' in str(caught.value)
  assert 'deleted' in str(caught.value)


INF, NAN = float('inf'), float('nan')
ALPHAS = {'number': float, 'array': jnp.float32, 'integer': int}


@pytest.mark.parametrize('jit', [True, False], ids=['jit', 'eager'])
@pytest.mark.parametrize('kind', ALPHAS.values(), ids=ALPHAS)
def test_interpolation_ends_exactly(kind, jit):
  """Catches 0 · ∞ = NaN at an end that is to be the anchor, or the params, exactly.

  Also a constant that cannot be checked where the rest is traced.
  """
  anchor = {'w': jnp.array([1.0, INF, 0.1, NAN, -0.0]), 'head': 0}
  params = {'w': jnp.array([INF, 2.0, 0.7, 3.0, NAN]), 'head': jnp.array([INF, 1.0])}
  for alpha, wanted in ((0, {'w': anchor['w'], 'head': np.zeros(2)}), (1, params)):
    if jit and kind is jnp.float32:
      found = jax.jit(lambda alpha: spd.interpolate(anchor, params, alpha))(kind(alpha))
    elif jit:
      at = kind(alpha)
      found = jax.jit(lambda a, p, at=at: spd.interpolate({**a, 'head': 0}, p, at))(
        {'w': anchor['w']}, params
      )
    else:
      found = spd.interpolate(anchor, params, kind(alpha))
    for name, value in wanted.items():
      np.testing.assert_array_equal(found[name], value, err_msg=f'{name} at {alpha}')


def test_interpolation_between_is_unchanged():
  """Catches an end that is chosen where alpha is between."""
  found = spd.interpolate({'w': jnp.array([0.0, INF])}, {'w': jnp.array([4.0, 1.0])}, 0.25)
  np.testing.assert_array_equal(found['w'], [1.0, INF])
