"""Where types tell how values are split, on explicit meshes and in shard_map, all types fit."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import every_form, make_step
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import spd_optax as spd

# Eight stacked layers; `shift` has them whole on every device.
SPECS = {'kernel': P('x', 'y'), 'scale': P('x'), 'shift': P()}
LAYERS = {
  'slices': {'stack_axis': 0},
  'slices of a group': {'stack_axis': 0, 'group': lambda path: 'block'},
  'leaves': {},
}
GRIDS = {1: (1, 1), 8: (4, 2)}  # by the number of devices


def mesh(kind, *shape):
  return jax.make_mesh(shape, ('x', 'y')[: len(shape)], axis_types=(kind,) * len(shape))


def normal(seed):
  rng = np.random.default_rng(seed)
  return {name: rng.standard_normal((8, 4), np.float32) for name in SPECS}


def placed(tree, on):
  return jax.tree.map(lambda x, spec: jax.device_put(x, NamedSharding(on, spec)), tree, SPECS)


def scanned(tx, params, state, gradients):
  """Params and state after four steps in one scan."""
  step = make_step(tx)

  def body(carry, _):
    return step(*carry, gradients), None

  return jax.lax.scan(body, (params, state), length=4)[0]


def assert_close(found, expected):
  found, expected = jax.device_get((found, expected))
  chex.assert_trees_all_close(found, expected, rtol=1e-5, atol=1e-6)


def types(tree):
  return jax.tree.map(jax.typeof, tree)


@pytest.mark.parametrize('options', LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize('jit_init', [True, pytest.param(False, marks=pytest.mark.slow)])
@every_form
def test_explicit_mesh(make, jit_init, options, device_count):
  """Catches zeros of another type than the sums, a group split in two ways, and a reshape."""
  on = mesh(AxisType.Explicit, *GRIDS[device_count])
  tx = make(normal(2), **options)
  expected = scanned(tx, normal(0), tx.init(normal(0)), normal(1))
  with jax.set_mesh(on):
    params, gradients = placed(normal(0), on), placed(normal(1), on)
    state = (jax.jit(tx.init) if jit_init else tx.init)(params)
    found = jax.jit(scanned, static_argnums=0)(tx, params, state, gradients)
    for name in set(spd.ProjectionDecayState._fields) - {'count'}:
      assert types(optax.tree.get(found, name)) == types(optax.tree.get(state, name)), name
  held = jax.tree.leaves(optax.tree.get(expected, 'constrained'))
  assert 0 < sum(np.sum(layer) for layer in held) < 4 * sum(np.size(layer) for layer in held)
  assert_close(found, expected)


@pytest.mark.parametrize('wrap', [lambda tx: tx, lambda tx: optax.MultiSteps(tx, 2)])
@pytest.mark.parametrize('options', [{'stack_axis': 0}, {'axis_name': 'x'}])
@every_form
def test_init_inside_shard_map(make, options, wrap, device_count):
  """Catches zeros that are the same everywhere where the sums are not, or the other way round."""
  tx = wrap(make(**options))

  def train(params, gradients):
    return scanned(tx, params, tx.init(params), gradients)[0]

  whole = jax.tree.map(lambda _: P('x'), SPECS)
  inside = jax.shard_map(
    train, mesh=mesh(AxisType.Auto, device_count), in_specs=(whole, whole), out_specs=whole
  )
  alone = wrap(make(stack_axis=options.get('stack_axis')))
  expected, _ = scanned(alone, normal(0), alone.init(normal(0)), normal(1))
  assert_close(jax.jit(inside)(normal(0), normal(1)), expected)


@every_form
def test_an_anchor_that_is_split_otherwise(make, device_count):
  """Catches an anchor and params that cannot be subtracted."""
  on = mesh(AxisType.Explicit, *GRIDS[device_count])
  with jax.set_mesh(on):
    params = jax.device_put(jnp.ones((8, 4)), NamedSharding(on, P('x')))
    anchor = jax.device_put(jnp.zeros((8, 4)), NamedSharding(on, P(None, 'x')))
    tx = make(anchor)
    state = spd.put_anchor(spd.drop_anchor(tx.init(params)), anchor)
    updates, _ = jax.jit(tx.update)(params, state, params)
  assert jax.typeof(updates) == jax.typeof(params)


@pytest.mark.eight_devices
@every_form
def test_a_whole_anchor_inside_shard_map_is_named(make):
  """Catches advice to cut the anchor by hand."""
  inside = jax.shard_map(
    make(normal(2)['scale']).init, mesh=mesh(AxisType.Auto, 8), in_specs=P('x'), out_specs=P('x')
  )
  with pytest.raises(ValueError, match='each leaf of the anchor must be an array like the param'):
    jax.eval_shape(inside, normal(0)['scale'])


def test_init_on_an_explicit_mesh_outside_of_the_shard_map_it_is_for(device_count):
  """Catches sums over mapped axes where no axis is mapped."""
  on = mesh(AxisType.Explicit, device_count)
  params = jax.device_put(jnp.ones((8, 4)), NamedSharding(on, P('x')))
  with jax.set_mesh(on):
    state = spd.projection_decay(axis_name='x').init(params)
  assert {key: x.shape for key, x in state.condition.items()} == {'': ()}
