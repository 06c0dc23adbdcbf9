"""One model in three layouts: a loop over its blocks, and `nn.scan` with them on axis 0 or 1.

Axis 1 is where MaxText and t5x put the layers: a kernel [in, layers, out], a bias
[width, layers]. Each slice must be trained and reported as the loop's own leaf is.
"""

import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from reference import x64

import spd_optax as spd

BLOCKS, WIDTH, STEPS, BATCH = 3, 6, 12, 4
FIELDS = ('condition', 'ratio', 'distance', 'constrained')


class Block(nn.Module):
  @nn.compact
  def __call__(self, x: jax.Array, _: Any = None) -> tuple[jax.Array, None]:
    init = nn.with_partitioning(nn.initializers.lecun_normal(), ('embed', 'mlp'))
    return x + nn.tanh(nn.Dense(WIDTH, kernel_init=init, name='dense')(x)), None


class Model(nn.Module):
  """A stack of blocks between two layers that are not stacked; `axis` None is the loop."""

  axis: int | None = None

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    x = nn.Dense(WIDTH, name='embed')(x)
    if self.axis is None:
      for i in range(BLOCKS):
        x, _ = Block(name=f'block_{i}')(x)
    else:
      scan = nn.scan(
        Block,
        variable_axes={'params': self.axis},
        split_rngs={'params': True},
        length=BLOCKS,
        metadata_params={nn.PARTITION_NAME: 'layers'},
      )
      x, _ = scan(name='blocks')(x, None)
    return nn.Dense(1, name='head')(x)[:, 0]


def boxed(axis: int | None) -> Any:
  """Shapes of the params as `init` returns them, in boxes that name the axes of some."""
  init = functools.partial(Model(axis).init, x=jnp.ones((1, WIDTH)))
  return jax.eval_shape(init, jax.random.key(0))['params']


def stack(params: Any, axis: int | None) -> Any:
  """Params, or anything like them, of the loop in the layout of the scan."""
  if axis is None:
    return params
  blocks = [params[f'block_{i}'] for i in range(BLOCKS)]
  stacked = jax.tree.map(lambda *leaves: np.stack(leaves, axis), *blocks)
  return {'embed': params['embed'], 'blocks': stacked, 'head': params['head']}


def by_path(params: Any, axis: int) -> dict[str, np.ndarray]:
  """Leaves by their path in the loop; slices of those that are stacked."""
  found = {}
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    top, *rest = (key.key for key in path)
    if top == 'blocks':
      for i, part in enumerate(np.moveaxis(leaf, axis, 0)):
        found['/'.join([f'block_{i}', *rest])] = part
    else:
      found['/'.join([top, *rest])] = leaf
  return found


def by_layer(history: Any) -> dict[str, np.ndarray]:
  """What was reported, by the key that the layer has in the loop: arrays [steps]."""
  found = {}
  for path, values in history.items():
    rest = path.removeprefix('blocks~')
    stacked = rest != path and values.ndim == 2
    slices = {f'block_{i}~{rest}': values[:, i] for i in range(BLOCKS)} if stacked else {}
    found |= slices or {path: values}
  return found


def batches() -> tuple[np.ndarray, np.ndarray]:
  """Small batches [steps, n, …] of a noisy task: gradients that turn now and then."""
  rng = np.random.default_rng(0)
  x = rng.standard_normal((STEPS, BATCH, WIDTH))
  return x, np.sin(x.sum(-1)) + rng.standard_normal((STEPS, BATCH))


def pretrained() -> Any:
  """Weights of the loop."""
  rng = np.random.default_rng(1)
  return jax.tree.map(lambda x: 0.4 * rng.standard_normal(x.shape), nn.unbox(boxed(None)))


def update(tx: Any, gradients: Any, state: Any, params: Any) -> tuple[Any, Any]:
  updates, state = tx.update(gradients, state, params)
  return optax.apply_updates(params, updates), state


def apply(tx: Any, gradients: Any, state: Any, params: Any) -> tuple[Any, Any]:
  return tx.apply(gradients, state, params)


ADAM = optax.adam(0.05)
FORMS = {
  'in the chain': (
    lambda anchor, **kw: optax.chain(spd.projection_decay(anchor, 1.0, **kw), ADAM),
    update,
  ),
  'around': (lambda anchor, **kw: spd.with_projection_decay(ADAM, anchor, **kw), update),
  'around, apply': (lambda anchor, **kw: spd.with_projection_decay(ADAM, anchor, **kw), apply),
}
RUNS = [('in the chain', False), ('around', True), ('around, apply', True)]
MORE = [('in the chain', True), ('around', False)]


def fast_and_slow(fast: Any, slow: Any) -> Any:
  return [*fast, *(pytest.param(*x, marks=pytest.mark.slow) for x in slow if x not in fast)]


every_run = pytest.mark.parametrize(('form', 'anchored'), fast_and_slow(RUNS, MORE))
every_axis = pytest.mark.parametrize('axis', [0, 1])
# Both axes in the chain, and one for each of the two steps around an optimizer.
EACH = [(*RUNS[0], 0), (*RUNS[0], 1), (*RUNS[1], 0), (*RUNS[2], 1)]
ALL = [(*run, axis) for run in (*RUNS, *MORE) for axis in (0, 1)]


@functools.cache
def train(form: str, axis: int | None, anchored: bool = False, stacked: bool = True) -> Any:
  """The params after the last step, and what each step reported by layer.

  Args:
    form: a key of `FORMS`.
    axis: of the layers, or None for the loop.
    anchored: the weights of the loop are given as anchor, and training starts elsewhere.
    stacked: whether the optimizer is told the axis.
  """
  make, step = FORMS[form]
  with x64():  # in float32 two layouts part by rounding, and then by a condition near 0
    anchor = stack(pretrained(), axis)
    start = stack(jax.tree.map(lambda x: 0.9 * x + 0.05, pretrained()), axis)
    axes = {'embed': None, 'blocks': axis, 'head': None} if stacked and axis is not None else None
    tx = make(anchor if anchored else None, stack_axis=axes)

    def loss(params: Any, batch: Any) -> jax.Array:
      return jnp.mean((Model(axis).apply({'params': params}, batch[0]) - batch[1]) ** 2)

    def body(carry: Any, batch: Any) -> tuple[Any, Any]:
      params, state = carry
      params, state = step(tx, jax.grad(loss)(params, batch), state, params)
      return (params, state), {name: optax.tree.get(state, name) for name in FIELDS}

    def run(start: Any) -> Any:
      return jax.lax.scan(body, (start, tx.init(start)), batches())

    (params, _), history = jax.jit(run)(start)
  return jax.tree.map(np.asarray, (params, history))


@every_axis
def test_the_layout_is_that_of_linen(axis):
  """Catches a test of a layout that no model has; and the axis is found in linen's metadata."""
  chex.assert_trees_all_equal_shapes(nn.unbox(boxed(axis)), stack(pretrained(), axis))
  kernel = boxed(axis)['blocks']['dense']['kernel']
  assert kernel.names.index('layers') == axis
  assert kernel.value.shape[axis] == BLOCKS
  x = batches()[0][0]
  params = stack(pretrained(), axis)
  found = jax.jit(Model(axis).apply)({'params': params}, x)
  expected = jax.jit(Model().apply)({'params': pretrained()}, x)
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


@every_run
def test_slices_are_held_at_different_steps(form, anchored):
  """Catches noise under which all slices are held alike, or none: all else here would pass."""
  condition = train(form, None, anchored)[1]['condition']
  for leaf in ('dense~kernel', 'dense~bias'):
    held = np.stack([condition[f'block_{i}~{leaf}'] for i in range(BLOCKS)], axis=1)
    assert 0 < held.mean() < 1, leaf
    assert any(0 < row.sum() < BLOCKS for row in held), leaf  # some slices, in one step
    assert any(0 < column.sum() < STEPS for column in held.T), leaf


@pytest.mark.parametrize(('form', 'anchored', 'axis'), fast_and_slow(EACH, ALL))
def test_each_slice_is_the_leaf_of_the_loop(form, anchored, axis):
  """Catches sums over layers, an axis taken for another, a slice held with its neighbour,
  and a stacked checkpoint that is matched in the wrong order."""
  loop, expected = train(form, None, anchored)
  scan, found = train(form, axis, anchored)
  chex.assert_trees_all_close(by_path(scan, axis), by_path(loop, axis), rtol=1e-9, atol=1e-10)
  for field in ('condition', 'constrained'):
    chex.assert_trees_all_equal(by_layer(found[field]), expected[field])
  for field in ('ratio', 'distance'):
    chex.assert_trees_all_close(by_layer(found[field]), expected[field], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
  ('form', 'axis', 'anchored'), [('in the chain', 0, False), ('around', 1, True)]
)
def test_without_the_axis_the_layers_are_one(form, axis, anchored):
  """Catches a comparison above that could not fail: one condition for all trains otherwise."""
  loop, _ = train(form, None, anchored)
  scan, found = train(form, axis, anchored, stacked=False)
  assert all(held.shape == (STEPS,) for held in found['condition'].values())
  found, expected = by_path(scan, axis), by_path(loop, axis)
  apart = {path: np.abs(leaf - expected[path]).max() for path, leaf in found.items()}
  assert all(apart[f'block_{i}/dense/kernel'] > 1e-3 for i in range(BLOCKS)), apart
