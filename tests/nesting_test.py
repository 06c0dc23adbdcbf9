"""Inside optax's wrappers: every public transform, in every nesting, without branches on names.

A run in a wrapper must be the run without it, where the wrapper changes nothing.
"""

import functools
import warnings
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import ADAM, PER_LAYER, STEPS, every_public, loop, make_step, noise, normal
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import spd_optax as spd

tree = pytest.param(True, id='tree', marks=pytest.mark.slow)
every_anchor = pytest.mark.parametrize('explicit', [pytest.param(False, id='captured'), tree])
WHOLE = {'body': True, 'head': True}

# Wrappers that change nothing for these gradients.
NEUTRAL = {
  'chain': lambda tx: optax.chain(optax.identity(), tx, optax.identity()),
  'named_chain': lambda tx: optax.named_chain(('first', tx), ('last', optax.identity())),
  'masked': lambda tx: optax.masked(tx, WHOLE),
  'partition': lambda tx: optax.partition({'only': tx}, 'only'),
  'MultiSteps': lambda tx: optax.MultiSteps(tx, 1).gradient_transformation(),
  'apply_if_finite': lambda tx: optax.apply_if_finite(tx, 3),
  'inject_hyperparams': lambda tx: optax.inject_hyperparams(lambda scale: optax.chain(tx))(1.0),
}


def run(tx: Any, gradients: Any = None) -> list[Any]:
  gradients = noise(0) if gradients is None else gradients
  return loop(jax.jit(make_step(tx)), normal(0), tx.init(normal(0)), gradients)


def made(make: Any, explicit: bool) -> Any:
  return make(jax.tree.map(lambda x: np.asarray(x) + 0.1, normal(0)) if explicit else None)


@functools.cache
def alone(make: Any, explicit: bool = False) -> list[Any]:
  """The run without a wrapper, which many tests compare with."""
  return run(made(make, explicit))


@every_anchor
@pytest.mark.parametrize('wrap', NEUTRAL.values(), ids=NEUTRAL)
@every_public
def test_neutral_wrappers_change_nothing(case, wrap, explicit):
  """Catches a state that a wrapper takes apart, and arguments that it does not hand on."""
  tx = made(case.make, explicit)
  wrapped = wrap(tx)
  found, expected = run(wrapped), alone(case.make, explicit)
  chex.assert_trees_all_close(found[-1][0], expected[-1][0], rtol=1e-6)
  chex.assert_trees_all_equal_shapes_and_dtypes(found[0][1], found[-1][1])
  for field in ('anchor', *PER_LAYER):
    value = optax.tree.get(found[-1][1], field)
    chex.assert_trees_all_close(value, optax.tree.get(expected[-1][1], field), rtol=1e-5)
    changed = optax.tree.set(found[-1][1], **{field: value})
    chex.assert_trees_all_equal(changed, found[-1][1])


@every_anchor
@every_public
def test_masked_leaves_are_left_alone(case, explicit):
  """Catches an explicit anchor, given for all leaves, that does not fit the masked params."""
  tx = optax.masked(made(case.make, explicit), {'body': True, 'head': False})
  trail = run(tx)
  expected = alone(case.make, explicit)
  chex.assert_trees_all_close(trail[-1][0]['body'], expected[-1][0]['body'], rtol=1e-6)
  sums = jax.tree.map(lambda p, g: p + g.sum(0), normal(0), noise(0))  # masked: plain gradients
  chex.assert_trees_all_close(trail[-1][0]['head'], sums['head'], rtol=1e-5)
  assert len(jax.tree.leaves(optax.tree.get(trail[-1][1], 'anchor'))) == 1


@every_anchor
@every_public
def test_partition_gives_each_part_its_own_transform(case, explicit):
  """Catches layers of one part that are looked up in another."""
  parts = {'held': made(case.make, explicit), 'free': case.plain}
  trail = run(optax.partition(parts, {'body': 'held', 'head': 'free'}))
  held, free = alone(case.make, explicit)[-1][0], run(case.plain)[-1][0]
  expected = {'body': held['body'], 'head': free['head']}
  chex.assert_trees_all_close(trail[-1][0], expected, rtol=1e-6)


@every_public
def test_multi_steps_is_the_mean_gradient(case):
  """Catches a capture or a count at every micro-step."""
  doubled = jax.tree.map(lambda g: jnp.repeat(g, 2, axis=0), noise(0))
  tx = optax.MultiSteps(case.make(), 2).gradient_transformation()
  chex.assert_trees_all_close(run(tx, doubled)[-1][0], alone(case.make)[-1][0], rtol=1e-5)


@every_public
def test_schedule_free_trains(case):
  """Catches a state that schedule_free cannot carry, or extra arguments that it cannot pass."""
  tx = optax.contrib.schedule_free(case.make(), learning_rate=0.05)
  with warnings.catch_warnings():  # misuse_test.py looks for it
    warnings.filterwarnings('ignore', '.*is inside optax.contrib.schedule_free')
    trail = run(tx)
  chex.assert_tree_all_finite(trail[-1])
  chex.assert_trees_all_equal_shapes_and_dtypes(trail[0][1], trail[-1][1])
  alone = run(optax.contrib.schedule_free(case.plain, learning_rate=0.05))
  assert np.abs(trail[-1][0]['head'] - alone[-1][0]['head']).max() > 1e-3


@every_public
def test_hyperparameters_are_injected(case):
  """Catches a strength that is a constant of the program, and a second trace for a new value."""

  def make(strength):
    return case.make(strength=strength)

  tx = optax.inject_hyperparams(make)(strength=0.0)
  step = jax.jit(chex.assert_max_traces(make_step(tx), n=1))
  chex.clear_trace_counter()
  ends = {}
  for strength in (0.0, 0.5, 1.0):
    state = optax.tree.set(tx.init(normal(0)), strength=jnp.float32(strength))
    ends[strength] = loop(step, normal(0), state, noise(0))[-1][0]
    expected = run(case.make(strength=strength))[-1][0]
    chex.assert_trees_all_close(ends[strength], expected, rtol=1e-5, atol=1e-6)
  assert np.abs(ends[1.0]['head'] - ends[0.5]['head']).max() > 1e-3
  scheduled = optax.inject_hyperparams(make)(strength=optax.linear_schedule(0.0, 1.0, STEPS))
  expected = run(case.make(strength=optax.linear_schedule(0.0, 1.0, STEPS)))
  chex.assert_trees_all_close(run(scheduled)[-1][0], expected[-1][0], rtol=1e-5, atol=1e-6)


@pytest.mark.eight_devices
@every_anchor
@every_public
def test_map_params_finds_the_anchor_and_nothing_else(case, explicit):
  """Catches per-layer scalars that get a param's sharding, which has too many axes for them."""
  tx, params = made(case.make, explicit), normal(0)
  mesh = Mesh(np.array(jax.devices()[:2]), ('x',))
  specs = {'body': {'kernel': PartitionSpec(None, 'x')}, 'head': PartitionSpec('x')}
  shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
  everywhere = NamedSharding(mesh, PartitionSpec())
  state = optax.tree.map_params(
    tx,
    lambda _, sharding: sharding,
    jax.eval_shape(tx.init, params),
    shardings,
    transform_non_params=lambda _: everywhere,
  )
  assert optax.tree.get(state, 'anchor') == shardings
  placed = jax.jit(tx.init, out_shardings=state)(params)
  assert optax.tree.get(placed, 'anchor')['head'].sharding.spec == PartitionSpec('x')
  for field in PER_LAYER:
    for value in optax.tree.get(placed, field).values():
      assert value.sharding.is_fully_replicated


def test_map_params_over_leaves_without_an_anchor():
  """Catches None in the anchor tree, which no other tree lines up with."""
  tx = spd.projection_decay({'body': 0, 'head': normal(0)['head']})
  state = tx.init(normal(0))
  doubled = optax.tree.map_params(
    tx,
    lambda x, factor: x if isinstance(x, optax.MaskedNode) else x * factor,
    state,
    {'body': {'kernel': 2}, 'head': 3},
    is_leaf=lambda x: isinstance(x, optax.MaskedNode),
  )
  chex.assert_trees_all_close(doubled.anchor['head'], 3 * normal(0)['head'])
  assert doubled.anchor['body']['kernel'] == optax.MaskedNode()


def test_extra_arguments_reach_the_inner_optimizer():
  """Catches an update that drops `value`, which plateau and line-search rules live by."""
  plateau = optax.contrib.reduce_on_plateau(factor=0.1, patience=1)
  tx = spd.with_projection_decay(optax.chain(ADAM, plateau))
  params, state = normal(0), tx.init(normal(0))
  for _ in range(4):
    _, state = tx.update(normal(1), state, params, value=jnp.float32(1.0))
  assert optax.tree.get(state, 'scale') < 1


def test_extra_arguments_reach_the_optimizer_in_multi_steps():
  """Catches arguments that are lost because MultiSteps is an object of its own kind."""
  inner = optax.chain(optax.sgd(0.1), optax.contrib.reduce_on_plateau())
  tx = spd.with_projection_decay(optax.MultiSteps(inner, 2), 0)
  params = jnp.ones(3)
  _, state = tx.update(params, tx.init(params), params, value=1.0)
  assert int(state.inner_state.mini_step) == 1
