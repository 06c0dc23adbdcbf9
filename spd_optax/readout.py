"""The values that an optimizer state holds for each layer, brought to the host.

Outside the training step, to which nothing is added. The values of all layers travel
in three arrays: hundreds of layers would otherwise be thousands of small transfers.
"""

import functools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from spd_optax import trees
from spd_optax.engine import PER_LAYER, ProjectionDecayState
from spd_optax.fingerprints import is_dropped
from spd_optax.layers import SEPARATOR, layer_key

States = Mapping[str, ProjectionDecayState]  # by their path in the optimizer state
Shapes = dict[str, tuple[int, ...]]  # of a layer's values, by its name
Layout = tuple[tuple[tuple[str, tuple[int, ...]], ...], ...]  # items of Shapes for each state


class Slot(NamedTuple):
  """One layer among all.

  Attributes:
    name: unique: 'layers/kernel[3]'.
    path: the leaf's; None for a group.
    slice: where it is stacked, its index.
    group: the group's key; None for a leaf.
  """

  name: str
  path: str | None
  slice: int | None
  group: str | None


class Values(NamedTuple):
  """The values of all layers on the host: arrays with an entry per slot.

  Attributes:
    updates: int, updates so far of the state that the layer is in.
    condition, ratio, distance, constrained: as in `ProjectionDecayState`.
    extra: the other arrays that were asked for.
  """

  updates: np.ndarray
  condition: np.ndarray
  ratio: np.ndarray
  distance: np.ndarray
  constrained: np.ndarray
  extra: list[Any]


def states_in(opt_state: Any, name: str) -> States:
  """Every `ProjectionDecayState` in an optimizer state, by its path there.

  Raises:
    TypeError: if there is none, or no values in it.
    ValueError: if one has a further axis.
  """
  states = [node for node in jax.tree.leaves(opt_state, is_leaf=_is_state) if _is_state(node)]
  found = {'': states[0]} if len(states) == 1 else _by_path(opt_state)
  if not found:
    raise TypeError(
      f'{name}: expected the state of an optimizer with projection_decay, with_projection_decay '
      f'or adam_spd in it, found {type(opt_state).__name__} without one (of an nnx.Optimizer pass '
      'optimizer.opt_state)'
    )
  for path, state in found.items():
    _check(name, f'opt_state{path}', state)
  return found


def _by_path(opt_state: Any) -> States:
  flat = jax.tree_util.tree_flatten_with_path(opt_state, is_leaf=_is_state)[0]
  return {jax.tree_util.keystr(path): node for path, node in flat if _is_state(node)}


def _is_state(node: Any) -> bool:
  return isinstance(node, ProjectionDecayState)


def _check(name: str, path: str, state: ProjectionDecayState) -> None:
  count = _unboxed(state.count)
  if isinstance(count, jax.core.Tracer):
    raise TypeError(f'{name}: call it outside jit, with the state that a step returned')
  if isinstance(count, jax.ShapeDtypeStruct):
    raise TypeError(f'{name}: found shapes without values in {path}')
  if jnp.shape(count):
    raise ValueError(
      f'{name}: {path}.count has the shape {jnp.shape(count)}: the state has a further axis '
      '(vmap over seeds, or pmap); pass a part: jax.tree.map(lambda x: x[0], opt_state)'
    )


def _unboxed(value: Any) -> Any:
  """The array in a box of nnx.Optimizer, or the array itself."""
  return value if isinstance(value, jax.Array) else jax.tree.leaves(value)[0]


def shapes(states: States) -> list[Shapes]:
  """The shape of each layer's values, in natural order of the names, for each state."""
  found = [dict(layers) for layers in layout(states)]
  return [{name: layers[name] for name in _natural(tuple(layers))} for layers in found]


def layout(states: States) -> Layout:
  """The same in the order in which JAX flattens dicts."""
  return tuple(
    tuple((name, _unboxed(state.condition[name]).shape) for name in sorted(state.condition))
    for state in states.values()
  )


@functools.lru_cache(maxsize=64)
def _natural(names: tuple[str, ...]) -> tuple[str, ...]:
  """'block_2' before 'block_10'."""

  def key(name: str) -> list[Any]:
    parts = re.split('([0-9]+)', name)
    return [int(part) if i % 2 else part for i, part in enumerate(parts)]

  return tuple(sorted(names, key=key))


def slots(states: States) -> tuple[Slot, ...]:
  """The layers in the order of all values.

  Where two states have a layer of one name, each name begins with the path of its state.
  """
  found = [
    (f'opt_state{path}/', slot)
    for (path, state), layers in zip(states.items(), shapes(states), strict=True)
    for slot in _slots(state, layers)
  ]
  twice = len({slot.name for _, slot in found}) < len(found)
  return tuple(slot._replace(name=start + slot.name) if twice else slot for start, slot in found)


def _slots(state: ProjectionDecayState, layers: Shapes) -> Iterator[Slot]:
  flat = anchor_of(state)
  leaves = {layer_key(path): path for path in (*flat.paths, *map(trees.join, flat.holes))}
  for key, shape in layers.items():
    layer = leaves.get(key, key.replace(SEPARATOR, '/'))
    path, group = (layer, None) if key in leaves else (None, layer)
    for at in range(shape[0]) if shape else (None,):
      yield Slot(
        (layer or '(root)') + ('' if at is None else f'[{at}]'), path=path, slice=at, group=group
      )


def anchor_of(state: ProjectionDecayState) -> trees.Flat:
  """The anchor taken apart; a dropped leaf is one leaf."""
  return trees.flatten(state.anchor, is_dropped)


def sizes(found: Layout) -> list[int]:
  """How many values each state has."""
  return [sum(math.prod(shape) for _, shape in layers) for layers in found]


def updates(states: States) -> int:
  """Updates so far; of several states, of the one with the most."""
  return max(int(_unboxed(state.count)) for state in states.values())


Packed = tuple[Any, Any, Any]  # booleans, int32 and float32, each one after the other


class Reading(NamedTuple):
  """Values on their way to the host.

  Attributes:
    packed: small arrays, on the device; one for each sharding among them.
    parts: for each of `packed` the place, the kind and the size of every array in it.
    extra: other arrays.
  """

  packed: list[Packed]
  parts: list[list[tuple[int, int, int]]]
  extra: list[Any]


def read(states: States) -> Values:
  """The values of all layers, in one transfer.

  Where the arrays are spread over several processes, all of them must call it.
  """
  return values_of(layout(states), begin(states))


def begin(states: States, extra: Sequence[Any] = ()) -> Reading:
  """Begins to read all layers, and `extra`; does not wait for the step that computes them."""
  columns = [[getattr(state, name) for state in states.values()] for name in ('count', *PER_LAYER)]
  return start(jax.tree.leaves(columns), extra)


def values_of(found: Layout, reading: Reading) -> Values:
  """What `begin` began to read of states of this layout."""
  (held, whole, real), extra = finish(reading)
  order = _order(found)
  updates, steps = np.split(whole, [len(found)])
  ratio, distance = np.split(real, 2)
  return Values(
    np.repeat(updates, sizes(found)),
    held[order],
    ratio[order],
    distance[order],
    steps[order],
    extra,
  )


@functools.lru_cache(maxsize=64)
def _order(found: Layout) -> np.ndarray:
  """Where the values of each slot stand among the sorted."""
  order, begin = [np.zeros(0, int)], 0
  for layers in found:
    at = {}
    for name, shape in layers:
      at[name] = np.arange(begin, begin + math.prod(shape))
      begin += math.prod(shape)
    order += [at[name] for name in _natural(tuple(at))]
  return np.concatenate(order)


def start(arrays: Sequence[Any], extra: Sequence[Any] = ()) -> Reading:
  """Packs small arrays on the device, those of one sharding together, and starts a transfer."""
  arrays = arrays if jax.process_count() == 1 else [_whole(array) for array in arrays]
  groups: dict[Any, list[int]] = {}
  for i, array in enumerate(arrays if jax.device_count() > 1 else ()):
    groups.setdefault(getattr(array, 'sharding', None), []).append(i)
  if arrays and not groups:
    groups = {None: list(range(len(arrays)))}
  packed = [_pack([arrays[i] for i in at]) for at in groups.values()]
  for array in [*(x for kinds in packed for x in kinds), *extra]:
    if isinstance(array, jax.Array):
      array.copy_to_host_async()
  apart = groups.values() if len(groups) > 1 else ()
  parts = [[(i, _kind(arrays[i]), np.size(arrays[i])) for i in at] for at in apart]
  return Reading(packed, parts, list(extra))


def finish(reading: Reading) -> tuple[Packed, list[Any]]:
  """The small arrays of each kind, in their order, and the other arrays."""
  packed = [tuple(np.asarray(array) for array in kinds) for kinds in reading.packed]
  extra = [np.asarray(array) for array in reading.extra]
  if len(packed) == 1:
    return packed[0], extra  # type: ignore[return-value]  # three, as they were
  found: tuple[dict[int, np.ndarray], ...] = ({}, {}, {})
  for kinds, parts in zip(packed, reading.parts, strict=True):
    begin = [0, 0, 0]
    for i, kind, size in parts:
      found[kind][i] = kinds[kind][begin[kind] : begin[kind] + size]
      begin[kind] += size
  empty = (np.zeros(0, bool), np.zeros(0, np.int32), np.zeros(0, np.float32))
  booleans, whole, real = (
    np.concatenate([none, *(by_place[i] for i in sorted(by_place))])
    for none, by_place in zip(empty, found, strict=True)
  )
  return (booleans, whole, real), extra


def _kind(array: Any) -> int:
  """Where an array is in a `Packed`."""
  return 0 if array.dtype == bool else 1 if jnp.issubdtype(array.dtype, jnp.integer) else 2


def _whole(array: Any) -> Any:
  """The array in a form of which this process has all."""
  if not isinstance(array, jax.Array) or array.is_fully_addressable:
    return array
  if array.is_fully_replicated:
    return array.addressable_data(0)
  return multihost_utils.process_allgather(array, tiled=True)


@jax.jit
def _pack(arrays: Sequence[jax.Array]) -> Packed:
  """All arrays of a kind as one.

  Not all as the bits of one array: XLA:CPU takes thrice the time for that.
  """

  def joined(kind: int, dtype: Any) -> jax.Array:
    chosen = [jnp.ravel(array).astype(dtype) for array in arrays if _kind(array) == kind]
    return jnp.concatenate(chosen) if chosen else jnp.zeros(0, dtype)

  return joined(0, jnp.bool_), joined(1, jnp.int32), joined(2, jnp.float32)
