"""Every kind of params tree: one step gives what the same leaves in a plain dict give."""

from typing import Any

import chex
import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import spd_optax as spd


@flax.struct.dataclass
class Module:
  kernel: Any
  bias: Any
  skip: Any = None


RNG = np.random.default_rng(0)
KERNEL, BIAS = (jnp.float32(RNG.standard_normal(shape)) for shape in ((2, 3), (3,)))

TREES = {
  'dict': lambda k, b: {'m': {'kernel': k, 'bias': b}},
  'FrozenDict': lambda k, b: flax.core.freeze({'m': {'kernel': k, 'bias': b}}),
  'dataclass': Module,
  'list': lambda k, b: [k, [b]],
  'tuple': lambda k, b: (k, (b,)),
  'with None': lambda k, b: {'m': {'kernel': k, 'none': None, 'bias': b}, 'gone': None},
  'with empty containers': lambda k, b: {'m': {'kernel': k, 'bias': b}, 'gone': {}, 'none': []},
  'with an empty leaf': lambda k, b: {'kernel': k, 'bias': b, 'empty': jnp.zeros((0, 3))},
  'with an integer': lambda k, b: {'kernel': k, 'bias': b, 'steps': jnp.array(3)},
}
MAKERS = {
  'projection_decay': spd.projection_decay,
  'with_projection_decay': lambda *args, **kw: spd.with_projection_decay(
    optax.sgd(-0.5), *args, **kw
  ),
  'l2_sp': spd.l2_sp,
}


def gradients_like(params: Any) -> Any:
  """The params themselves, and what jax.grad gives for an integer."""

  def gradient(leaf: Any) -> Any:
    if jnp.issubdtype(leaf.dtype, jnp.integer):
      return jnp.zeros_like(leaf)
    return leaf

  return jax.tree.map(gradient, params)


def two_steps(tx: Any, params: Any) -> tuple[Any, Any]:
  """Away from the zero anchor, then on, held: the updates of the second step, and the state."""
  state = tx.init(params)
  for _ in range(2):
    updates, new_state = jax.jit(tx.update)(gradients_like(params), state, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, new_state)
    state = new_state
  return updates, state


@pytest.mark.parametrize('make', MAKERS.values(), ids=MAKERS)
@pytest.mark.parametrize('tree', TREES.values(), ids=TREES)
def test_tree_types(tree: Any, make: Any) -> None:
  """Catches leaves that are dropped, doubled or paired with another's anchor."""
  expected, _ = two_steps(make(0), {'kernel': KERNEL, 'bias': BIAS})
  updates, state = two_steps(make(0), tree(KERNEL, BIAS))
  found = {leaf.shape: leaf for leaf in jax.tree.leaves(updates) if leaf.size and leaf.ndim}
  chex.assert_trees_all_equal(found[2, 3], expected['kernel'])
  chex.assert_trees_all_equal(found[3,], expected['bias'])
  assert np.abs(found[3,] - BIAS).max() > 0.01  # it acts
  names = optax.tree.get(state, 'condition')
  assert len(names) == 2
  assert all(names.values())


@pytest.mark.parametrize('make', MAKERS.values(), ids=MAKERS)
def test_a_single_array_and_scalars(make: Any) -> None:
  """Catches paths that need a parent, and sums that need an axis."""
  for params in (KERNEL, jnp.float32(2.0), {'scale': jnp.float32(2.0)}):
    updates, _ = two_steps(make(0), params)
    chex.assert_trees_all_equal_shapes(updates, params)
    assert not jax.tree.all(jax.tree.map(jnp.array_equal, updates, params))


@pytest.mark.parametrize('tree', TREES.values(), ids=TREES)
def test_anchors_fit_by_path(tree: Any) -> None:
  """Catches an anchor from a checkpoint (plain dicts) that must have the params' own types."""
  params = tree(KERNEL, BIAS)
  entries = jax.tree_util.tree_flatten_with_path(params)[0]
  names = [[str(getattr(k, 'key', getattr(k, 'name', getattr(k, 'idx', k)))) for k in path]
           for path, _ in entries]  # fmt: skip
  plain: dict = {}
  for (*parents, name), (_, leaf) in zip(names, entries, strict=True):
    node = plain
    for parent in parents:
      node = node.setdefault(parent, {})
    node[name] = np.asarray(leaf)
  state = spd.projection_decay(plain).init(params)
  stored = {leaf.shape: leaf for leaf in jax.tree.leaves(state.anchor)}
  chex.assert_trees_all_equal(stored, {(2, 3): KERNEL, (3,): BIAS})


def test_float0_gradients_of_integers() -> None:
  """Catches arithmetic on what `jax.grad(allow_int=True)` returns for an integer leaf."""
  params = {'w': KERNEL, 'steps': jnp.array(3)}
  gradients = jax.grad(lambda p: jnp.sum(p['w'] ** 2), allow_int=True)(params)
  for tx in (spd.projection_decay(0), spd.l2_sp(0)):
    updates, _ = tx.update(gradients, tx.init(params), params)
    assert updates['steps'].dtype == jax.dtypes.float0
    assert not np.array_equal(updates['w'], gradients['w'])


def test_strict_promotion() -> None:
  """Catches implicit casts and broadcasts, which some code bases forbid."""
  for dtype in (jnp.bfloat16, jnp.float32):
    params = {'w': jnp.ones((3, 4), dtype), 'b': jnp.ones(3, dtype)}
    for make in MAKERS.values():
      for anchor in (None, 0):
        with jax.numpy_dtype_promotion('strict'), jax.numpy_rank_promotion('raise'):
          two_steps(make(anchor), params)


@flax.struct.dataclass
class Attention:
  query: Any
  value: Any


def test_a_field_called_value_is_no_box() -> None:
  """Catches a path cut short: 'attention' for 'attention/value'."""
  params = {'attention': Attention(KERNEL, BIAS)}
  state = spd.projection_decay(params).init(params)
  assert set(state.condition) == {'attention~query', 'attention~value'}


@pytest.mark.parametrize('make', MAKERS.values(), ids=MAKERS)
def test_nothing_to_hold(make: Any) -> None:
  """Catches trees that only wrappers make: all leaves masked, or none for a label."""
  params = {'a': KERNEL, 'b': BIAS}
  for tx, tree in (
    (optax.masked(make(), {'a': False, 'b': False}), params),
    (optax.partition({'x': make(), 'y': optax.sgd(0.1)}, {'a': 'y', 'b': 'y'}), params),
    (make(), {'a': None}),
    (make(), {}),
  ):
    state = tx.init(tree)
    _, new_state = jax.jit(tx.update)(tree, state, tree)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, new_state)
