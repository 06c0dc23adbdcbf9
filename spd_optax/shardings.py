"""How an array is split over devices, as far as its type tells.

On a mesh with explicit axes the type has the sharding, in shard_map the axes that are mapped
over; on an automatic mesh the compiler alone decides, and types say nothing.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType


def is_shard(array: Any) -> bool:
  """Whether it is one device's part of an array, as in shard_map."""
  return AxisType.Manual in _mesh_axes(array)


def is_explicit(array: Any) -> bool:
  """Whether the array's type has its sharding, as on an explicit mesh only."""
  return AxisType.Explicit in _mesh_axes(array)


def _mesh_axes(array: Any) -> tuple[AxisType, ...]:
  sharding = getattr(jax.typeof(array), 'sharding', None)
  return () if sharding is None else sharding.mesh.axis_types


def explicitly_like(array: jax.Array, like: Any) -> jax.Array:
  """The array with the sharding that the type of `like` has."""
  if not is_explicit(like):
    return array
  resharded: jax.Array = jax.sharding.reshard(array, jax.typeof(like).sharding)
  return resharded


def sharded_like(array: jax.Array, leaf: jax.Array) -> jax.Array:
  """The array, inside jit, with the sharding that the compiler gives the leaf."""
  array = explicitly_like(array, leaf)
  # A choice that the compiler cannot foresee has all its operands sharded alike.
  always = jax.lax.optimization_barrier(jnp.array(True))
  return jnp.where(always, array, leaf.astype(array.dtype))
