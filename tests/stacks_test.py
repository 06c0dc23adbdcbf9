"""Real training stacks: linen TrainState, nnx, Orbax, late-loaded weights, meshes, shard_map."""

import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import every_form, loop, make_step, noise, normal
from flax import nnx
from flax.training.train_state import TrainState
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from orbax.checkpoint import v1 as ocp


def run(tx: Any, params: Any = None) -> list[Any]:
  params = normal(0) if params is None else params
  return loop(jax.jit(make_step(tx)), params, tx.init(params), noise(0))


@functools.cache
def alone(make: Any, anchor: Any = None) -> list[Any]:
  """The run on one device, without a stack around it."""
  return run(make(anchor))


@every_form
def test_train_state(make):
  """Catches an update that needs more than gradients, state and params."""
  state = TrainState.create(apply_fn=None, params=normal(0), tx=make())
  for i in range(12):
    state = state.apply_gradients(grads=jax.tree.map(lambda g, i=i: g[i], noise(0)))
  chex.assert_trees_all_close(state.params, alone(make)[-1][0], rtol=1e-5, atol=1e-6)


class Net(nnx.Module):
  def __init__(self, rngs: nnx.Rngs):
    self.body = nnx.Linear(3, 4, rngs=rngs)
    self.head = nnx.Linear(4, 1, rngs=rngs)


def train_nnx(make: Any, **options: Any) -> tuple[Net, Any]:
  model = Net(nnx.Rngs(0))
  optimizer = nnx.Optimizer(model, make(**options), wrt=nnx.Param)
  rng = np.random.default_rng(0)

  @nnx.jit
  def step(model, optimizer, x, y):
    def loss(model):
      return jnp.mean((model.head(jnp.tanh(model.body(x))) - y) ** 2)

    optimizer.update(model, nnx.grad(loss)(model))

  for _ in range(12):
    step(model, optimizer, *(jnp.float32(rng.standard_normal((5, n))) for n in (3, 1)))
  return model, nnx.as_pure(nnx.state(optimizer))


@every_form
def test_nnx_paths_are_the_same_at_init_and_update(make):
  """Catches rules that see 'body/kernel/value' at init and 'body/kernel' at update."""
  seen: set[str] = set()

  def group(path: str) -> str:
    seen.add(path)
    return path.split('/')[0]

  def stack_axis(path: str, leaf: Any) -> int | None:
    seen.add(path)
    return 1 if path == 'body/kernel' else 0 if path == 'body/bias' else None

  _, state = train_nnx(make, group=group, stack_axis=stack_axis)
  assert seen == {'body/kernel', 'body/bias', 'head/kernel', 'head/bias'}
  condition = optax.tree.get(state, 'constrained')
  assert {name: np.shape(value) for name, value in condition.items()} == {'body': (4,), 'head': ()}
  assert sum(np.sum(steps) for steps in condition.values()) > 0


@every_form
def test_nnx_anchors(make):
  """Catches an nnx.State as anchor, a free subtree and a zero anchor that nnx cannot carry."""
  pretrained = nnx.state(Net(nnx.Rngs(0)), nnx.Param)
  captured = train_nnx(make)[0]
  given = train_nnx(make, anchor=pretrained)[0]
  chex.assert_trees_all_close(
    nnx.to_pure_dict(nnx.state(given)), nnx.to_pure_dict(nnx.state(captured))
  )
  _, state = train_nnx(make, anchor={'body': 0, 'head': None})
  assert set(optax.tree.get(state, 'condition')) == {'body~kernel', 'body~bias'}


@every_form
@pytest.mark.parametrize('anchor', [None, {'body': 0, 'head': None}], ids=['captured', 'mixed'])
def test_orbax_round_trip(make, anchor, tmp_path):
  """Catches a state that Orbax cannot save, or that does not train on bit for bit."""
  tx = make(anchor)
  step, gradients = jax.jit(make_step(tx)), noise(0)
  params, state = trail = run(tx)[6]
  ocp.save(tmp_path / 'checkpoint', {'params': params, 'state': state})
  abstract = jax.eval_shape(lambda: {'params': params, 'state': state})
  loaded = ocp.load(tmp_path / 'checkpoint', abstract)
  chex.assert_trees_all_equal_structs(loaded, abstract)
  rest = jax.tree.map(lambda g: g[6:], gradients)
  found = loop(step, loaded['params'], loaded['state'], rest)[-1]
  chex.assert_trees_all_equal(found, loop(step, *trail, rest)[-1])


LOADERS = {
  'plain': lambda tx: tx,
  'MultiSteps': lambda tx: optax.MultiSteps(tx, 1).gradient_transformation(),
  'apply_if_finite': lambda tx: optax.apply_if_finite(tx, 3),
  'masked': lambda tx: optax.masked(tx, {'body': True, 'head': True}),
  'jitted init': lambda tx: optax.GradientTransformationExtraArgs(jax.jit(tx.init), tx.update),
}


@every_form
@pytest.mark.parametrize('wrap', LOADERS.values(), ids=LOADERS)
def test_weights_loaded_after_init_are_the_anchor(make, wrap):
  """Catches the silent mistake of other ports: an anchor that is the random initialization."""
  tx, random, pretrained = wrap(make()), normal(7), normal(0)
  trail = loop(jax.jit(make_step(tx)), pretrained, tx.init(random), noise(0))
  for _, state in trail[1:]:
    chex.assert_trees_all_equal(optax.tree.get(state, 'anchor'), pretrained)
  chex.assert_trees_all_close(trail[-1][0], alone(make)[-1][0], rtol=1e-6)


MESH_SPECS = {'body': {'kernel': PartitionSpec('x', 'y')}, 'head': PartitionSpec('y')}


def mesh() -> Mesh:
  return Mesh(np.array(jax.devices()[:6]).reshape(3, 2), ('x', 'y'))


@pytest.mark.eight_devices
@every_form
@pytest.mark.parametrize('jit', [False, True])
@pytest.mark.parametrize('explicit', [False, True])
def test_a_mesh_of_devices_is_one_device(make, jit, explicit):
  """Catches an anchor that is replicated or lands on one device, and sums over one shard only."""
  shardings = jax.tree.map(lambda spec: NamedSharding(mesh(), spec), MESH_SPECS)
  params = jax.device_put(normal(0), shardings)
  tx = make(jax.tree.map(np.asarray, normal(0)) if explicit else None)
  state = (jax.jit(tx.init) if jit else tx.init)(params)
  trail = loop(jax.jit(make_step(tx)), params, state, noise(0))
  for _, state in (trail[0], trail[-1]):
    for leaf, sharding in zip(
      jax.tree.leaves(optax.tree.get(state, 'anchor')), jax.tree.leaves(shardings), strict=True
    ):
      assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
  params, state = alone(make)[-1]
  chex.assert_trees_all_close(trail[-1][0], params, rtol=1e-5, atol=1e-6)
  held = optax.tree.get(state, 'constrained')
  chex.assert_trees_all_equal(optax.tree.get(trail[-1][1], 'constrained'), held)
  assert any(0 < steps < 12 for steps in held.values())


def map_over_shards(tx: Any, in_specs: Any, **options: Any) -> Any:
  """All 12 steps inside one shard_map; the final params and how often each layer was held."""

  def body(params, gradients):
    def step(carry, gradient):
      return make_step(tx)(*carry, gradient), None

    carry, _ = jax.lax.scan(step, (params, tx.init(params)), gradients)
    return carry[0], optax.tree.get(carry[1], 'constrained')

  specs = {'body': {'kernel': in_specs[0]}, 'head': in_specs[1]}
  steps = jax.tree.map(lambda spec: PartitionSpec(None, *spec), specs)
  mapped = jax.shard_map(
    body, mesh=mesh(), in_specs=(specs, steps), out_specs=(specs, PartitionSpec()), **options
  )
  return jax.jit(mapped)(normal(0), noise(0))


@pytest.mark.eight_devices
@every_form
def test_inside_shard_map(make):
  """Catches conditions of single shards, and leaves that are counted once per device.

  The kernel is sharded over both axes, the head over one: each is summed over its own.
  """
  names = {'body': ('x', 'y'), 'head': 'y'}
  specs = (PartitionSpec('x', 'y'), PartitionSpec('y'))
  found = map_over_shards(make(0, axis_name=names), specs, check_vma=False)
  params, state = alone(make, 0)[-1]
  chex.assert_trees_all_close(found[0], params, rtol=1e-5, atol=1e-6)
  chex.assert_trees_all_equal(found[1], optax.tree.get(state, 'constrained'))


@pytest.mark.eight_devices
@every_form
def test_an_explicit_anchor_enters_shard_map_with_the_state(make):
  """Catches a check of the whole anchor against a shard of the params."""
  tx = make(normal(1), axis_name={'body': ('x', 'y'), 'head': 'y'})
  params, state = normal(0), tx.init(normal(0))
  specs = jax.tree.map(lambda spec: spec, MESH_SPECS)
  state_specs = optax.tree.map_params(
    tx,
    lambda _, spec: spec,
    state,
    specs,
    transform_non_params=lambda _: PartitionSpec(),
  )
  step = jax.shard_map(
    make_step(tx),
    mesh=mesh(),
    in_specs=(specs, state_specs, specs),
    out_specs=(specs, state_specs),
    check_vma=False,
  )
  found = loop(jax.jit(step), params, state, noise(0))[-1]
  chex.assert_trees_all_close(found, run(make(normal(1)))[-1], rtol=1e-5, atol=1e-6)


@pytest.mark.eight_devices
@every_form
def test_inside_pmap(make):
  """Catches an axis name that only shard_map knows."""
  tx = make(0, axis_name='shard')

  def body(params, gradients):
    carry = params, tx.init(params)
    return jax.lax.scan(lambda c, g: (make_step(tx)(*c, g), None), carry, gradients)[0][0]

  split = jax.tree.map(lambda x: jnp.stack(jnp.split(x, 2, axis=-1)), (normal(0), noise(0)))
  found = jax.pmap(body, 'shard', devices=jax.devices()[:2])(*split)
  joined = jax.tree.map(lambda x: jnp.concatenate(list(x), axis=-1), found)
  chex.assert_trees_all_close(joined, alone(make, 0)[-1][0], rtol=1e-5, atol=1e-6)
