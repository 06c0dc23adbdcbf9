"""In shard_map over one device, and over several: what the same step gives without it.

With one device alone the process has another way to sum, so this file is to be run on one
device, too.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from by_reference import assert_reports, every_case, every_layered, own, steps
from jax.sharding import PartitionSpec as P

SHAPE = (8, 4)
FACTORS = (-1.0, 0.25)  # gradients by the deviation at the start: away, and home
small_meshes = pytest.mark.parametrize('devices', [1, 2])
meshes = pytest.mark.parametrize('devices', [1, 8])


def mesh_of(devices):
  if jax.device_count() < devices:
    pytest.skip(f'{devices} devices are needed, {jax.device_count()} are there')
  axis_types = (jax.sharding.AxisType.Auto,)
  return jax.make_mesh((devices,), ('x',), axis_types, devices=jax.devices()[:devices])


def problem():
  rng = np.random.default_rng(0)
  names = ('a', 'b')
  params = {name: jnp.asarray(rng.normal(size=SHAPE), jnp.float32) for name in names}
  deviation = {name: rng.uniform(0.5, 1, SHAPE).astype(np.float32) for name in names}
  anchors = {name: params[name] - deviation[name] for name in names}
  noise = {name: rng.normal(size=SHAPE).astype(np.float32) / 8 for name in names}
  gradients = [
    {name: jnp.asarray(factor * (deviation[name] + noise[name])) for name in names}
    for factor in FACTORS
  ]
  return params, gradients, anchors


def run(case, tx, params, gradients):
  """What each step gives, and the state after it."""
  state, found = tx.init(params), []
  for gradient in gradients:
    out, state = (tx.apply if case.writes else tx.update)(gradient, state, params)
    found.append((out, state))
    params = out if case.writes else {n: params[n] + case.pace * out[n] for n in params}
  return found


def assert_as_expected(found, trail):
  for (out, state), step in zip(found, trail, strict=True):
    for name, wanted in step.wanted.items():
      np.testing.assert_allclose(out[name], wanted, rtol=1e-5, atol=1e-5, err_msg=name)
    assert_reports(step._replace(state=state))
  assert any(np.all(held.condition) for step in trail for held in step.report.values())


@functools.cache
def without_mesh(case, anchor='captured', stack_axis=None):
  """The transform, which several tests share, and each step beside the reference."""
  params, gradients, anchors = problem()
  anchors = anchors if anchor == 'tree' else None
  of_layers = {} if stack_axis is None else {'stack_axes': dict.fromkeys(params, stack_axis)}
  tx = case.make(anchors) if stack_axis is None else case.make(anchors, stack_axis=stack_axis)
  return tx, steps(case, tx, params, gradients, anchors, **of_layers)


@pytest.mark.parametrize('anchor', ['tree', 'captured'])
@small_meshes
@every_case
def test_replicated_values(case, devices, anchor):
  """Catches a step that fails where nothing varies over the mesh."""
  params, gradients, _ = problem()
  tx, trail = without_mesh(case, anchor)
  body = functools.partial(run, case, tx)
  sharded = jax.shard_map(body, mesh=mesh_of(devices), in_specs=(P(), P()), out_specs=P())
  assert_as_expected(jax.jit(sharded)(params, gradients), trail)


@pytest.mark.parametrize('anchor', ['tree', 'captured'])
@small_meshes
@every_case
def test_gradients_that_vary_beside_params_that_do_not(case, devices, anchor):
  """Catches sums of values that vary over the mesh and of others that do not, in one reduction.

  Each device has gradients of its own, which nobody has averaged: the first has those of the
  problem, and any other has twice, thrice, … as large ones.
  """
  params, gradients, anchors = problem()
  anchors = anchors if anchor == 'tree' else None
  tx, _ = without_mesh(case, anchor)

  def body(params, gradients):
    factor = 1.0 + jax.lax.axis_index('x')
    state = tx.init(params)
    out, state = (tx.apply if case.writes else tx.update)(
      jax.tree.map(lambda g: factor * g, gradients), state, params
    )
    return jax.tree.map(lambda x: x[None], (out, own(state).condition, own(state).distance))

  sharded = jax.shard_map(body, mesh=mesh_of(devices), in_specs=(P(), P()), out_specs=P('x'))
  home = jax.tree.map(lambda g: -g, gradients[0])
  found, condition, distance = jax.jit(sharded)(params, home)
  for at in range(devices):
    scaled = jax.tree.map(lambda g, at=at: (1.0 + at) * g, home)
    (step,) = steps(case, tx, params, [scaled], anchors)
    for name, wanted in step.wanted.items():
      np.testing.assert_allclose(found[name][at], wanted, rtol=1e-5, atol=1e-5, err_msg=name)
      np.testing.assert_array_equal(condition[name][at], step.report[name].condition)
      np.testing.assert_allclose(distance[name][at], step.report[name].distance, 1e-5, 1e-6)


@meshes
@every_layered
def test_layers_that_are_split_over_the_mesh(case, devices):
  """Catches a sum over shards where the only shard is the whole."""
  params, gradients, _ = problem()
  tx = case.make(axis_name='x')
  sharded = jax.shard_map(
    functools.partial(run, case, tx),
    mesh=mesh_of(devices),
    in_specs=(P('x'), P('x')),
    out_specs=[(P('x'), state_specs(tx, params))] * len(gradients),
  )
  found = jax.jit(sharded)(params, gradients)
  assert_as_expected(found, without_mesh(case)[1])


@meshes
@every_layered
def test_one_leaf_split_and_one_replicated(case, devices):
  """Catches sums that are added over the mesh though a leaf is replicated, or are not."""
  params, gradients, _ = problem()
  tx = case.make(axis_name={'a': 'x', 'b': None})
  split = {'a': P('x'), 'b': P()}
  sharded = jax.shard_map(
    functools.partial(run, case, tx),
    mesh=mesh_of(devices),
    in_specs=(split, [split] * len(gradients)),
    out_specs=[(split, state_specs(tx, params, split))] * len(gradients),
  )
  found = jax.jit(sharded)(params, gradients)
  assert_as_expected(found, without_mesh(case)[1])


@meshes
@every_layered
def test_stacked_layers_that_are_dealt_out(case, devices):
  """Catches a stack of which each device has some layers, and one device has all."""
  params, gradients, _ = problem()
  tx = case.make(stack_axis=0)
  per_layer = {'condition', 'ratio', 'distance', 'constrained'}
  sharded = jax.shard_map(
    functools.partial(run, case, tx),
    mesh=mesh_of(devices),
    in_specs=(P('x'), P('x')),
    out_specs=[(P('x'), state_specs(tx, params, P('x'), per_layer))] * len(gradients),
  )
  found = jax.jit(sharded)(params, gradients)
  assert_as_expected(found, without_mesh(case, stack_axis=0)[1])


def state_specs(tx, params, like_params=P('x'), split=frozenset()):  # noqa: B008  # immutable
  """A spec for each array of the state: arrays like a param as the param, others replicated."""
  by_name = like_params if isinstance(like_params, dict) else dict.fromkeys(params, like_params)

  def spec(path, leaf):
    names = [getattr(key, 'name', getattr(key, 'key', None)) for key in path]
    whole = leaf.shape == SHAPE
    if whole:
      return by_name[names[-1]]
    return P('x') if split & set(names) else P()

  return jax.tree_util.tree_map_with_path(spec, jax.eval_shape(tx.init, params))
