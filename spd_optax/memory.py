"""The host's memory as a place for anchors."""

from collections.abc import Sequence
from typing import Any

import jax

from spd_optax import checks


def memory_kinds(device: jax.Device) -> set[str]:
  """The kinds of memory that a device can use; none of a CPU, whose are all the host's.

  XLA:CPU aborts where a donated array of one kind is paired with a result of another.
  """
  if device.platform == 'cpu':
    return set()
  return {memory.kind for memory in device.addressable_memories()}


def have_pinned_host(stored: Sequence[jax.Array]) -> bool:
  """Whether the devices of all arrays have this memory; warns where they do not."""
  devices = jax.local_devices()[:1]
  if not any(isinstance(array, jax.core.Tracer) for array in stored):
    devices = [device for array in stored for device in array.sharding.addressable_devices]
  missing = [device for device in devices if 'pinned_host' not in memory_kinds(device)]
  if missing:
    checks.warn(
      f"anchor_memory_kind='pinned_host': {missing[0].platform} device {missing[0]} has no such "
      'memory beside its own, where the anchor stays. anchor_memory_kind=None says the same.'
    )
  return not missing


def is_on_host(array: Any) -> bool:
  """Whether the array lies in the host's memory."""
  space = getattr(jax.typeof(array), 'memory_space', None)
  return space is not None and space == jax.memory.Space.Host


def on_device(array: Any) -> Any:
  """The array, out of the host's memory if it is there."""
  return jax.device_put(array, jax.memory.Space.Device) if is_on_host(array) else array


def on_host(array: jax.Array) -> jax.Array:
  """The array in the host's memory, on the devices that it is split over."""
  if isinstance(array, jax.core.Tracer):
    placed: jax.Array = jax.device_put(array, jax.memory.Space.Host)
  else:
    placed = jax.device_put(array, array.sharding.with_memory_kind('pinned_host'))
  return placed
