"""Layers: which leaves share one condition, and sums over them.

A layer is one leaf, one slice of a stacked leaf, or a group of either. Values
per layer have shape ``[]``, or ``[L]`` where the leaves stack L layers.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from spd_optax import checks, patterns, placement, trees
from spd_optax.patterns import Patterns

# An int, None, a prefix tree of them, {int: patterns}, or (path, leaf) -> int | None.
StackAxis = Any
AxisName = Any  # a name, a tuple of names, None, a prefix tree, or (path, leaf) -> names
Group = Callable[[str], str | int | None] | Patterns | None
Sums = dict[str, jax.Array]  # over one leaf or layer, by name

SEPARATOR = '~'  # of paths in the keys of the state; writers of checkpoints join theirs by / or .


def layer_key(name: str) -> str:
  """A layer's name as a key of the optimizer state: 'block_0/kernel' -> 'block_0~kernel'."""
  return name.replace('/', SEPARATOR)


def layer_name(key: str) -> str:
  """The name again: 'block_0~kernel' -> 'block_0/kernel'; Haiku's have '/~/' and '/~method/'."""
  return re.sub('~{1,3}', lambda run: ('/', '/~', '/~/')[len(run[0]) - 1], key)


@dataclasses.dataclass(frozen=True)
class Layers:
  """The layers of a list of leaves, all known at trace time."""

  # For each layer its key in the optimizer state, and the shape of its values: () or (L,).
  keys: tuple[str, ...]
  shapes: tuple[tuple[int, ...], ...]
  # For each leaf the index of its layer, its axis that stacks layers, and its mapped axes.
  layer_of: tuple[int, ...]
  stack_axes: tuple[int | None, ...]
  axis_names: tuple[tuple[str, ...], ...]

  def totals(self, per_leaf: Sequence[Sums]) -> list[Sums]:
    """The sums over each layer, of the sums over each leaf.

    Over mapped axes all of them travel in one all-reduce.
    """
    per_leaf = list(per_leaf)
    for axes in sorted(set(self.axis_names) - {()}):
      here = [i for i, names in enumerate(self.axis_names) if names == axes]
      reduced = jax.lax.psum([per_leaf[i] for i in here], axes)
      for i, sums in zip(here, reduced, strict=True):
        per_leaf[i] = sums
    found: list[Sums] = [{} for _ in self.keys]
    for layer, sums in zip(self.layer_of, per_leaf, strict=True):
      before = found[layer]
      found[layer] = {name: before[name] + x if before else x for name, x in sums.items()}
    return found

  def zeros(self, leaves: Sequence[Any]) -> list[jax.Array]:
    """A float32 zero for each layer, of the type that sums over it have.

    On an explicit mesh the type has a sharding, in shard_map the axes over which values vary.
    """
    mapped = any(map(placement.is_shard, leaves))
    if not mapped and not any(map(placement.is_explicit, leaves)):
      return [jnp.zeros(shape, jnp.float32) for shape in self.shapes]
    here = self if mapped else dataclasses.replace(self, axis_names=((),) * len(leaves))

    def summed(leaves: Sequence[jax.Array]) -> list[Sums]:
      # The compiler knows these for zeros, and does not read the leaves.
      zeros = [jnp.where(x == x, 0.0, 0.0) for x in leaves]
      each = zip(zeros, self.stack_axes, strict=True)
      return here.totals([{'zero': sum_of(x, axis)} for x, axis in each])

    return [sums['zero'].astype(jnp.float32) for sums in jax.jit(summed)(list(leaves))]

  def by_key(self, per_layer: Sequence[Any]) -> dict[str, Any]:
    """Values by the layers' keys."""
    return dict(zip(self.keys, per_layer, strict=True))


def sum_of(array: jax.Array, stack_axis: int | None) -> jax.Array:
  """The sum of an array, or of each of its slices."""
  return jnp.sum(array, axis=[i for i in range(array.ndim) if i != stack_axis])


def broadcast_to_leaf(value: jax.Array, leaf: jax.Array, stack_axis: int | None) -> jax.Array:
  """A layer's value, shaped to broadcast against a leaf of it."""
  if stack_axis is None:
    return value
  if placement.is_explicit(leaf):
    # The other leaves of a group may be split otherwise.
    sharding = jax.typeof(leaf).sharding
    spec = PartitionSpec(sharding.spec[stack_axis])
    value = jax.sharding.reshard(value, NamedSharding(sharding.mesh, spec))
  return jax.lax.expand_dims(value, [i for i in range(leaf.ndim) if i != stack_axis])


@dataclasses.dataclass(frozen=True)
class Arrangement:
  """The arguments that say which leaves, or slices of them, are one layer."""

  stack_axis: StackAxis = None
  group: Group = None
  axis_name: AxisName = None

  def __post_init__(self) -> None:
    by_pattern = self.group is None or patterns.are_patterns(self.group)
    if not by_pattern and not checks.is_function(self.group):
      found = checks.kind_of(self.group)
      raise TypeError(
        f'group: expected a function path -> key or None, a pattern of paths or a list of them, '
        f'found {found}' + checks.STATIC.format('group')
      )

  def find_layers(self, params: trees.Flat, at: Sequence[int]) -> Layers:
    """Arranges the leaves of the params at these places into layers."""
    paths = [params.paths[i] for i in at]
    axes = self._axes(params)
    mapped = trees.values_for(self.axis_name, params, 'axis_name', _is_axes)
    checks.raise_all(
      [f'{params.paths[i]}: {checks.kind_of(mapped[i])}' for i in at if not _is_axes(mapped[i])],
      'axis_name: a name or a tuple of names of mapped axes, or None; found',
    )
    stacked = _stack_axes(paths, [params.leaves[i] for i in at], [axes[i] for i in at])
    names = _layer_names(self._group_keys(params, at), paths)
    order = {name: i for i, name in enumerate(dict.fromkeys(names))}
    counts = [
      () if axis is None else (jnp.shape(params.leaves[i])[axis],)
      for i, axis in zip(at, stacked, strict=True)
    ]
    return Layers(
      keys=tuple(
        trees.told_apart(
          {name: layer_key(name) for name in order},
          f"'{SEPARATOR}' stands for '/' in the keys of the optimizer state; rename one of each:",
        )
      ),
      layer_of=tuple(order[name] for name in names),
      stack_axes=tuple(stacked),
      axis_names=tuple((x,) if isinstance(x := mapped[i], str) else tuple(x or ()) for i in at),
      shapes=_layer_shapes(names, paths, counts),
    )

  def _axes(self, params: trees.Flat) -> list[Any]:
    """For each leaf what `stack_axis` says of it."""
    rule = self.stack_axis
    if isinstance(rule, Mapping) and all(map(patterns.are_patterns, rule.values())):
      return list(patterns.stack_axes(rule, params))
    return trees.values_for(rule, params, 'stack_axis', _is_axis)

  def _group_keys(self, params: trees.Flat, at: Sequence[int]) -> list[str | int | None]:
    """For each of these leaves the key of its group, or None."""
    if callable(self.group):
      keys = {params.paths[i]: self.group(params.paths[i]) for i in at}
      problems = [
        f'{trees.shown(path)}: {checks.kind_of(key)}'
        for path, key in keys.items()
        if isinstance(key, bool) or not isinstance(key, str | int | None)
      ]
      checks.raise_all(problems, 'group(path) must return a string, an int or None:', TypeError)
      return list(keys.values())
    places = patterns.places('group', self.group, params)
    return [places[i] for i in at]


def _is_axis(value: object) -> bool:
  return isinstance(value, int) and not isinstance(value, bool)


def _is_axes(value: object) -> bool:
  names = value if isinstance(value, tuple) and value else [value]
  return value is None or all(isinstance(name, str) for name in names)


def _layer_names(keys: Sequence[str | int | None], paths: Sequence[str]) -> list[str]:
  """For each leaf the name of its layer: the key of its group, else its own path."""
  alone = {path for path, key in zip(paths, keys, strict=True) if key is None}
  taken = sorted(alone & {str(key) for key in keys if key is not None})
  checks.raise_all(
    [f'{key}: a leaf, and a key of `group`' for key in taken],
    'a group needs a key that is no ungrouped leaf; return that key for the leaf, too, to join it:',
  )
  return [path if key is None else str(key) for path, key in zip(paths, keys, strict=True)]


def _stack_axes(
  paths: Sequence[str], leaves: Sequence[Any], axes: Sequence[Any]
) -> list[int | None]:
  found = [
    (path, jnp.shape(leaf), axis) for path, leaf, axis in zip(paths, leaves, axes, strict=True)
  ]
  checks.raise_all(
    [
      f'{trees.shown(path)}: stack axis {axis!r}, shape {shape}'
      for path, shape, axis in found
      if axis is not None and not (_is_axis(axis) and -len(shape) <= axis < len(shape))
    ],
    'stack_axis must be an existing axis, given as an int, or None where a leaf stacks no layers '
    "(a prefix tree such as {'layers': 0, 'head': None}, or (path, leaf) -> int | None)"
    f'{checks.STATIC.format("stack_axis")}:',
  )
  return [axis if axis is None else axis % len(shape) for _, shape, axis in found]


def _layer_shapes(
  names: Sequence[str], paths: Sequence[str], counts: Sequence[tuple[int, ...]]
) -> tuple[tuple[int, ...], ...]:
  each = list(zip(names, paths, counts, strict=True))
  shapes = dict(zip(names, counts, strict=True))
  uneven = dict.fromkeys(name for name, _, count in each if count != shapes[name])
  of_paths = {
    group: [f'{trees.shown(p)}: {c[0] if c else "not stacked"}' for n, p, c in each if n == group]
    for group in uneven
  }
  checks.raise_all(
    [f'group {group!r}: {", ".join(found)}' for group, found in of_paths.items()],
    'the leaves of a group must stack the same number of layers; change `group` or `stack_axis`:',
  )
  return tuple(shapes.values())
