"""Trees that can be called: flax dataclasses with `__call__`, Equinox modules; and nnx modules."""

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from by_reference import CASES, SGD, assert_reports, every_case, every_layered, own, steps
from flax import nnx
from jax.sharding import PartitionSpec as P

import spd_optax as spd


@flax.struct.dataclass
class Dense:
  """Params, or values for a prefix of them, that can be called."""

  kernel: object
  bias: object

  def __call__(self, x):
    return x @ self.kernel + self.bias


def problem():
  """Params, gradients of three steps (away, away, and home), and anchors, by name."""
  rng = np.random.default_rng(0)
  shapes = {'kernel': (4, 3), 'bias': (4,)}
  params = {name: jnp.asarray(rng.normal(size=at), jnp.float32) for name, at in shapes.items()}
  deviation = {
    name: jnp.asarray(rng.uniform(0.5, 1, at), jnp.float32) for name, at in shapes.items()
  }
  anchors = jax.tree.map(jnp.subtract, params, deviation)
  gradients = [jax.tree.map(lambda d, f=f: f * d, deviation) for f in (-1.0, -1.0, 0.25)]
  return params, gradients, anchors


def run(case, tx, params, gradients):
  """The steps of callable params, as trees by name."""
  state, found = tx.init(Dense(**params)), []
  for gradient in gradients:
    step = jax.jit(tx.apply if case.writes else tx.update)
    out, state = step(Dense(**gradient), state, Dense(**params))
    assert isinstance(out, Dense)
    found.append(({'kernel': out.kernel, 'bias': out.bias}, state))
    out = found[-1][0]
    params = out if case.writes else {n: params[n] + case.pace * out[n] for n in params}
  return found


def assert_as_expected(found, trail):
  for (out, state), step in zip(found, trail, strict=True):
    for name, wanted in step.wanted.items():
      np.testing.assert_allclose(out[name], wanted, rtol=1e-5, atol=1e-5, err_msg=name)
    assert_reports(step._replace(state=state))


@pytest.mark.parametrize('wrap', [lambda anchor: anchor, lambda anchor: None], ids=['tree', 'none'])
@every_case
def test_params_and_anchors_that_can_be_called(case, wrap):
  """Catches an anchor that is taken for a function because it can be called."""
  params, gradients, anchors = problem()
  found = run(case, case.make(wrap(Dense(**anchors))), params, gradients)
  plain = case.make(wrap(anchors))
  assert_as_expected(found, steps(case, plain, params, gradients, wrap(anchors)))


PARTS = {
  'zero': (Dense(0, 0), {'kernel': 0, 'bias': 0}),
  'free leaf': (Dense(0, None), {'kernel': 0}),
  'free': (Dense(None, None), {}),
}


@pytest.mark.parametrize('part', PARTS)
@every_case
def test_a_callable_part_of_an_anchor(case, part):
  """Catches a prefix tree with a callable node in it, of which some or all leaves are None."""
  params, gradients, anchors = problem()
  given, held = PARTS[part]
  tx = case.make({'layer': Dense(**anchors), 'other': given})
  whole, slope = ({'layer': Dense(**x), 'other': Dense(**x)} for x in (params, gradients[0]))
  _, state = (tx.apply if case.writes else tx.update)(slope, tx.init(whole), whole)
  distances = {f'layer~{n}': np.linalg.norm(params[n] - anchors[n]) for n in params}
  distances |= {f'other~{n}': np.linalg.norm(params[n]) for n in held}
  assert own(state).distance.keys() == distances.keys()
  for name, wanted in distances.items():
    np.testing.assert_allclose(own(state).distance[name], wanted, rtol=1e-5)


@every_layered
def test_stack_axis_is_a_callable_prefix_tree(case):
  """Catches a prefix tree of axes that is called with a path and a leaf."""
  params, gradients, anchors = problem()
  tx = case.make(Dense(**anchors), stack_axis=Dense(kernel=0, bias=None))
  axes = {'stack_axes': {'kernel': 0}}
  plain = case.make(anchors, stack_axis={'kernel': 0, 'bias': None})
  trail = steps(case, plain, params, gradients, anchors, **axes)
  assert_as_expected(run(case, tx, params, gradients), trail)


@pytest.mark.parametrize('devices', [1, 2])
@every_layered
def test_axis_name_is_a_callable_prefix_tree(case, devices):
  """Catches a prefix tree of names that is called with a path and a leaf."""
  if jax.device_count() < devices:
    pytest.skip(f'{devices} devices are needed, {jax.device_count()} are there')
  params, gradients, _ = problem()
  tx = case.make(0, axis_name=Dense(kernel='x', bias=None))
  axis_types = (jax.sharding.AxisType.Auto,)
  mesh = jax.make_mesh((devices,), ('x',), axis_types, devices=jax.devices()[:devices])
  split = Dense(kernel=P('x'), bias=P())

  def body(gradients, params):
    _, state = (tx.apply if case.writes else tx.update)(gradients, tx.init(params), params)
    return own(state).distance

  sharded = jax.shard_map(body, mesh=mesh, in_specs=(split, split), out_specs=P())
  found = jax.jit(sharded)(Dense(**gradients[0]), Dense(**params))
  for name, param in params.items():
    np.testing.assert_allclose(found[name], np.linalg.norm(param), rtol=1e-5)


def test_functions_are_still_called():
  """Catches a function of (path, leaf) that is taken for a tree."""
  params = problem()[0]
  tx = spd.projection_decay(stack_axis=lambda path, leaf: 0 if path == 'kernel' else None)
  assert {n: x.shape for n, x in tx.init(Dense(**params)).condition.items()} == {
    'kernel': (4,),
    'bias': (),
  }


def test_interpolate():
  """Catches a callable anchor that `interpolate` rejects."""
  params, _, anchors = problem()
  found = spd.interpolate(Dense(**anchors), Dense(**params), 0.25)
  for name in params:
    wanted = 0.75 * np.float64(anchors[name]) + 0.25 * np.float64(params[name])
    np.testing.assert_allclose(getattr(found, name), wanted, rtol=1e-6, atol=1e-6)


def test_reanchor_fingerprint_drop_and_put():
  """Catches a callable tree that cannot be put in the place of an anchor."""
  params, _, anchors = problem()
  state = spd.with_projection_decay(SGD, Dense(**anchors)).init(Dense(**params))
  stored = optax.tree.get(state, 'anchor')
  assert spd.fingerprint(Dense(**anchors)) == spd.fingerprint(anchors) == spd.fingerprint(stored)
  back = optax.tree.get(spd.put_anchor(spd.drop_anchor(state), Dense(**anchors)), 'anchor')
  moved = optax.tree.get(spd.reanchor(state, Dense(**params)), 'anchor')
  for name in params:
    np.testing.assert_array_equal(getattr(back, name), anchors[name])
    np.testing.assert_array_equal(getattr(moved, name), params[name])


@every_case
def test_an_equinox_module(case):
  """Catches a model whose activation, also a leaf, is left out of its params."""
  eqx = pytest.importorskip('equinox', reason='equinox is not installed')
  model = eqx.nn.MLP(2, 2, 8, 1, key=jax.random.key(0))
  params = eqx.filter(model, eqx.is_inexact_array)
  anchor = jax.tree.map(lambda x: x - 0.5, params)
  tx = case.make(anchor)
  gradients = jax.tree.map(jnp.ones_like, params)  # home: the deviation is 0.5 everywhere
  out, state = jax.jit(tx.apply if case.writes else tx.update)(gradients, tx.init(params), params)
  assert jax.tree.structure(out) == jax.tree.structure(params)
  state = own(state)
  sizes = {
    f'layers~{at}~{name}': getattr(layer, name).size
    for at, layer in enumerate(model.layers)
    for name in ('weight', 'bias')
  }
  assert state.condition.keys() == sizes.keys()
  assert all(state.condition.values())
  for name, size in sizes.items():
    np.testing.assert_allclose(state.distance[name], 0.5 * np.sqrt(size), rtol=1e-5)
  assert len(spd.fingerprint(anchor)) == 32
  half = spd.interpolate(anchor, params, 0.5)
  np.testing.assert_allclose(half.layers[0].bias, params.layers[0].bias - 0.25, atol=1e-6)
  moved = optax.tree.get(spd.reanchor(tx.init(params), params), 'anchor')
  np.testing.assert_array_equal(moved.layers[0].weight, params.layers[0].weight)


class TwoLayers(nnx.Module):
  """A model that cannot be called, with the state of a generator in it."""

  def __init__(self):
    self.dense = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
    self.dropout = nnx.Dropout(0.5, rngs=nnx.Rngs(1))


MODULES = {'callable': lambda: nnx.Linear(2, 2, rngs=nnx.Rngs(0)), 'not callable': TwoLayers}
TAKES_ANCHOR = {name: case.make for name, case in CASES.items()} | {
  'interpolate': lambda anchor: spd.interpolate(anchor, {'kernel': jnp.ones(2)}, 0.5),
}
every_taker = pytest.mark.parametrize('take', TAKES_ANCHOR.values(), ids=TAKES_ANCHOR)


@pytest.mark.parametrize('within', [False, True], ids=['whole', 'part'])
@pytest.mark.parametrize('make', MODULES.values(), ids=MODULES)
@every_taker
def test_an_nnx_module_is_an_error_that_says_what_to_pass(take, make, within):
  """Catches a text about functions, or an error about keys of generators, for a raw module."""
  model = make()

  def call():
    tx = take({'model': model} if within else model)
    tx.init({'model': {'kernel': jnp.ones((2, 2)), 'bias': jnp.ones(2)}})

  with pytest.raises((TypeError, ValueError), match=r'nnx\.state\(model, nnx\.Param\)'):
    call()


@every_case
def test_the_state_of_an_nnx_module(case):
  """Catches what the advice says to pass, rejected."""
  params = nnx.state(TwoLayers(), nnx.Param)
  anchor = jax.tree.map(lambda x: x - 0.5, params)
  tx = case.make(anchor)
  gradients = jax.tree.map(jnp.ones_like, params)
  _, state = (tx.apply if case.writes else tx.update)(gradients, tx.init(params), params)
  assert all(own(state).condition.values())
  np.testing.assert_allclose(own(state).distance['dense~kernel'], 0.5 * np.sqrt(4), rtol=1e-5)


FUNCTIONS = {
  'function': lambda path: 0,
  'initializer': jax.nn.initializers.zeros,
  'optimizer': optax.adam(1e-3),
  'maker': optax.adam,
  'class': Dense,
}


@pytest.mark.parametrize('value', FUNCTIONS.values(), ids=FUNCTIONS)
@every_taker
def test_functions_and_transformations_are_no_anchors(take, value):
  """Catches an anchor that is no tree of arrays and passes, since trees may be callable."""
  with pytest.raises(TypeError, match='anchor: expected a tree of arrays, 0 or None, found'):
    take(value)
