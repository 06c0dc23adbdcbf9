"""Where arrays lie: how they are split over devices, and the host's memory as a place for anchors.

On a mesh with explicit axes an array's type has the sharding, in shard_map the axes that are
mapped over; on an automatic mesh the compiler alone decides, and types say nothing.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType

from spd_optax import checks


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


def copy(value: Any, like: Any, dtype: jax.typing.DTypeLike) -> jax.Array:
  """A new array with the sharding of the param; never an alias of what was passed."""
  if isinstance(like, jax.core.Tracer) and value is not like:
    array = explicitly_like(jnp.array(value, dtype, copy=True), like)
    # A choice that the compiler cannot foresee has all its operands sharded alike.
    always = jax.lax.optimization_barrier(jnp.array(True))
    return jnp.where(always, array, like.astype(dtype))
  if value is like or not getattr(like, 'committed', False):
    return jnp.array(np.asarray(value) if _is_elsewhere(value, like) else value, dtype, copy=True)
  # Straight to the shards: the whole array may not fit on one device.
  if not isinstance(value, jax.Array) or _is_of_one_process(value, like):
    # With several processes device_put would gather the array from each of them, to compare.
    host = np.asarray(value)
    return jax.make_array_from_callback(
      host.shape, like.sharding, lambda index: np.array(host[index], dtype, copy=True)
    )
  placed: jax.Array = jax.device_put(value.astype(dtype), like.sharding, may_alias=False)
  return placed


def _is_of_one_process(value: jax.Array, like: Any) -> bool:
  """Whether an array lies in this process alone, and the param in several."""
  concrete = not isinstance(value, jax.core.Tracer)
  return concrete and value.is_fully_addressable and not like.sharding.is_fully_addressable


def _is_elsewhere(value: Any, like: Any) -> bool:
  """Whether an array was put on one device that is not the param's: steps would move there."""
  concrete = all(
    isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer) for x in (value, like)
  )
  if not (concrete and value.committed):
    return False
  alone = len(value.devices()) == 1 and value.is_fully_addressable
  return alone and value.devices() != like.devices()


# The host's memory.


def memory_kinds(device: jax.Device) -> set[str]:
  """The kinds of memory that a device can use; none of a CPU, whose are all the host's.

  XLA:CPU aborts where a donated array of one kind is paired with a result of another.
  """
  kinds = {memory.kind for memory in device.addressable_memories()}
  return set() if device.platform == 'cpu' else kinds


def have_pinned_host(stored: Sequence[jax.Array]) -> bool:
  """Whether the devices of all arrays have this memory; warns where they do not."""
  devices = jax.local_devices()[:1]
  if not any(isinstance(array, jax.core.Tracer) for array in stored):
    devices = [device for array in stored for device in array.sharding.addressable_devices]
  missing = [device for device in devices if 'pinned_host' not in memory_kinds(device)]
  if missing:
    checks.warn(
      f"anchor_memory_kind='pinned_host': {missing[0].platform} device {missing[0]} has no such "
      'memory beside its own, where the anchor stays'
    )
  return not missing


def is_on_host(array: Any) -> bool:
  """Whether the array lies in the host's memory."""
  return bool(getattr(jax.typeof(array), 'memory_space', None) == jax.memory.Space.Host)


def on_device(array: Any) -> Any:
  """The array, out of the host's memory if it is there."""
  return jax.device_put(array, jax.memory.Space.Device) if is_on_host(array) else array


def on_host(array: jax.Array) -> jax.Array:
  """The array in the host's memory, on the devices that it is split over."""
  placed: jax.Array = array if is_on_host(array) else jax.device_put(array, jax.memory.Space.Host)
  return placed
