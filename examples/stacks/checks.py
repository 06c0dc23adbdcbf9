"""What the recipes here share: a mesh of four CPU devices, and what each of them asserts."""

from collections.abc import Iterable
from typing import Any

import jax
import numpy as np
import optax

import spd_optax as spd

Tree = Any


def mesh(**axes: int) -> jax.sharding.Mesh:
  """A mesh of CPU devices: `mesh(fsdp=4)`. Call it before anything else uses JAX."""
  jax.config.update('jax_platforms', 'cpu')
  jax.config.update('jax_num_cpu_devices', 4)
  auto = (jax.sharding.AxisType.Auto,) * len(axes)
  return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=auto)


def split(tree: Tree, mesh: jax.sharding.Mesh, axis: str = 'fsdp') -> Tree:
  """Splits the last axis of each leaf over the mesh where its length allows it."""

  def put(leaf: jax.Array) -> jax.Array:
    fits = leaf.ndim > 0 and leaf.shape[-1] % mesh.shape[axis] == 0
    spec = (None,) * (leaf.ndim - 1) + (axis,) if fits else ()
    return jax.device_put(leaf, jax.NamedSharding(mesh, jax.P(*spec)))

  return jax.tree.map(put, tree)


def put_like(tree: Tree, like: Tree, mesh: jax.sharding.Mesh) -> Tree:
  """Puts what a file held where `like` has it; what `like` has on one device goes to all."""

  def put(leaf: Any, like: Any) -> Any:
    if not isinstance(like, jax.Array):
      return leaf
    split = isinstance(like.sharding, jax.NamedSharding)
    return jax.device_put(leaf, like.sharding if split else jax.NamedSharding(mesh, jax.P()))

  return jax.tree.map(put, tree, like)


def assert_equal(found: Tree, wanted: Tree) -> None:
  """Asserts that two trees have the same leaves, bit for bit."""
  pairs = list(zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True))
  assert pairs
  for i, (one, other) in enumerate(pairs):
    one, other = _bits(one), _bits(other)
    assert (one.dtype, one.shape) == (other.dtype, other.shape), i
    assert one.tobytes() == other.tobytes(), f'leaf {i}: {one} is not {other}'


def assert_anchor(opt_state: Tree, pretrained: Tree, params: Tree) -> None:
  """Asserts that the anchor is the loaded weights, and lies where the params lie.

  `pretrained` and `params` are trees without the leaves that are free.
  """
  anchor = optax.tree.get(opt_state, 'anchor')
  assert_equal(anchor, pretrained)
  for held, param in zip(jax.tree.leaves(anchor), jax.tree.leaves(params), strict=True):
    where = (held.sharding, param.sharding)
    assert held.sharding.is_equivalent_to(param.sharding, held.ndim), where
  moved = zip(jax.tree.leaves(anchor), jax.tree.leaves(params), strict=True)
  assert any(not np.array_equal(held, param) for held, param in moved), 'nothing was trained'


def assert_layers(opt_state: Tree, names: Iterable[str]) -> None:
  """Asserts that the report has these layers and no others."""
  found = [record.name for record in spd.layer_report(opt_state)]
  assert sorted(found) == sorted(names), found


def _bits(leaf: Any) -> np.ndarray:
  if isinstance(leaf, jax.Array) and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
    leaf = jax.random.key_data(leaf)
  return np.asarray(leaf)
