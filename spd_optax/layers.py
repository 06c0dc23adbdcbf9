"""Layers: which leaves share one condition, and sums over them.

A layer is one leaf, one slice of a stacked leaf, or a group of either. Values
per layer have shape ``[]``, or ``[L]`` where the leaves stack L layers.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from spd_optax import checks, shardings, trees

StackAxis = int | None | Any  # an int, a prefix tree of them, or (path, leaf) -> int | None
AxisName = str | tuple[str, ...] | None | Any  # names, a prefix tree, or (path, leaf) -> names
Group = Callable[[str], Any] | None
PerLayer = list[jax.Array]

SEPARATOR = '~'  # of paths in the keys of the state; writers of checkpoints join theirs by / or .


def layer_key(name: str) -> str:
  """A layer's name as a key of the optimizer state: 'block_0/kernel' -> 'block_0~kernel'."""
  return name.replace('/', SEPARATOR)


@dataclasses.dataclass(frozen=True)
class Layers:
  """The layers of a list of leaves, all known at trace time.

  Attributes:
    names: one per layer; a leaf's path, or the key of its group.
    layer_of: for each leaf, the index of its layer in `names`.
    stack_axes: for each leaf, the axis that stacks layers, or None.
    axis_names: for each leaf, the mapped axes that it is sharded over.
    shapes: for each layer, the shape of its values: () or (L,).
  """

  names: tuple[str, ...]
  layer_of: tuple[int, ...]
  stack_axes: tuple[int | None, ...]
  axis_names: tuple[tuple[str, ...], ...]
  shapes: tuple[tuple[int, ...], ...]

  def sums(self, products: Mapping[str, Sequence[jax.Array]], *later: str) -> dict[str, PerLayer]:
    """Sums arrays shaped like the leaves over each layer, under every key.

    Over mapped axes all the sums travel in one all-reduce. The keys in `later` are
    those to be summed in a loop of their own, not with the others.
    """
    partial: dict[str, list[jax.Array]] = {}
    for keys in ([key for key in products if key not in later], *([key] for key in later)):
      arrays = [products[key] for key in keys]
      per_leaf = [_sums(x, axis) for *x, axis in zip(*arrays, self.stack_axes, strict=True)]
      partial |= {key: [sums[at] for sums in per_leaf] for at, key in enumerate(keys)}
    for axes in sorted(set(self.axis_names) - {()}):
      checks.bound(axes)
      here = [i for i, names in enumerate(self.axis_names) if names == axes]
      reduced = jax.lax.psum({key: [sums[i] for i in here] for key, sums in partial.items()}, axes)
      for key, sums in reduced.items():
        for i, value in zip(here, sums, strict=True):
          partial[key][i] = value
    return {key: self._by_layer(sums) for key, sums in partial.items()}

  def _by_layer(self, per_leaf: Sequence[jax.Array]) -> PerLayer:
    members: list[list[jax.Array]] = [[] for _ in self.names]
    for layer, value in zip(self.layer_of, per_leaf, strict=True):
      members[layer].append(value)
    return [sum(values[1:], start=values[0]) for values in members]

  def zeros(self, leaves: Sequence[Any], dtype: Any) -> PerLayer:
    """A zero for each layer, of the type that sums over it have.

    On an explicit mesh the type has a sharding, in shard_map the axes over which values vary.
    """
    if not any(shardings.is_typed(leaf) or shardings.is_shard(leaf) for leaf in leaves):
      return [jnp.zeros(shape, dtype) for shape in self.shapes]

    def summed(leaves: Sequence[jax.Array]) -> PerLayer:
      here = [names if checks.is_bound(names) else () for names in self.axis_names]
      mapped = dataclasses.replace(self, axis_names=tuple(here))
      # The compiler knows these for zeros, and does not read the leaves.
      return mapped.sums({'zero': [jnp.where(x == x, 0, 0) for x in leaves]})['zero']

    return [value.astype(dtype) for value in jax.jit(summed)(list(leaves))]

  def spread(self, per_layer: Sequence[jax.Array], leaves: Sequence[jax.Array]) -> list[jax.Array]:
    """Each layer's value, shaped to broadcast against each leaf."""
    return [
      _along(per_layer[layer], axis, leaf)
      for layer, axis, leaf in zip(self.layer_of, self.stack_axes, leaves, strict=True)
    ]

  def named(self, per_layer: Sequence[Any]) -> dict[str, Any]:
    """Values by the layers' names, as the optimizer state spells them."""
    return dict(zip(map(layer_key, self.names), per_layer, strict=True))


def _sum(array: jax.Array, stack_axis: int | None) -> jax.Array:
  return jnp.sum(array, axis=[i for i in range(array.ndim) if i != stack_axis])


def _sums(arrays: Sequence[jax.Array], stack_axis: int | None) -> Sequence[jax.Array]:
  """`_sum` of each array; in one loop where a CPU is the only device.

  XLA:CPU does not put two sums into one loop by itself. Where arrays are split over
  devices, XLA gathers the partial results of such a loop instead of reducing them.
  """

  def separate(*arrays: jax.Array) -> list[jax.Array]:
    return [_sum(array, stack_axis) for array in arrays]

  @jax.custom_jvp  # the derivative of a reduction of several arrays is lacking where one is 0
  def together(*arrays: jax.Array) -> list[jax.Array]:
    rows = [_short_rows(array, stack_axis) for array in arrays]
    sums = jax.lax.reduce(
      tuple(rows),
      tuple(jnp.zeros([], array.dtype) for array in arrays),
      lambda totals, terms: tuple(a + b for a, b in zip(totals, terms, strict=True)),
      [rows[0].ndim - 1],
    )
    return separate(*sums)

  together.defjvp(lambda arrays, tangents: (together(*arrays), separate(*tangents)))
  if stack_axis in (None, 0) and only_a_cpu() and not shardings.is_typed(arrays[0]):
    sums: Sequence[jax.Array] = jax.lax.platform_dependent(*arrays, cpu=together, default=separate)
    return sums
  return separate(*arrays)


def only_a_cpu() -> bool:
  """Whether this process can split arrays over nothing."""
  return jax.default_backend() == 'cpu' and jax.device_count() == 1


def _short_rows(array: jax.Array, stack_axis: int | None) -> jax.Array:
  """What is to be summed, cut into rows of up to 64; XLA:CPU adds such a row up one by one.

  One by one, float32 stops growing at 2^24 equal terms. `jnp.sum` of the rows does better.
  """
  kept = array.shape[:1] if stack_axis == 0 else ()
  terms = math.prod(array.shape[len(kept) :])
  length = max(n for n in range(1, 65) if terms % n == 0)
  return jnp.reshape(array, (*kept, terms // length, length))


def _along(value: jax.Array, stack_axis: int | None, leaf: jax.Array) -> jax.Array:
  if stack_axis is None:
    return value
  if shardings.is_typed(leaf):
    # The other leaves of a group may be split otherwise.
    sharding = jax.typeof(leaf).sharding
    spec = PartitionSpec(sharding.spec[stack_axis])
    value = jax.sharding.reshard(value, NamedSharding(sharding.mesh, spec))
  return jax.lax.expand_dims(value, [i for i in range(leaf.ndim) if i != stack_axis])


def find_layers(
  params: trees.Flat,
  constrained: Sequence[bool],
  stack_axis: StackAxis = None,
  group: Group = None,
  axis_name: AxisName = None,
) -> Layers:
  """Arranges the constrained leaves of the params into layers.

  Raises:
    ValueError: naming every leaf whose stack axis does not exist, and every
      group whose leaves have unequal numbers of slices.
  """
  chosen = [i for i, is_constrained in enumerate(constrained) if is_constrained]
  shapes = [jnp.shape(params.leaves[i]) for i in chosen]
  paths = [params.paths[i] for i in chosen]
  axes = trees.rule_values(stack_axis, params, 'stack_axis', _is_axis)
  mapped = [
    _axis_names(value) for value in trees.rule_values(axis_name, params, 'axis_name', _is_axis_name)
  ]
  stacked = _stack_axes([params.keys[i] for i in chosen], shapes, [axes[i] for i in chosen])
  counts = [
    () if axis is None else (shape[axis],) for axis, shape in zip(stacked, shapes, strict=True)
  ]
  keys = _layer_names(group, paths)
  members: dict[str, list[int]] = {}
  for i, key in enumerate(keys):
    members.setdefault(key, []).append(i)
  order = {name: at for at, name in enumerate(members)}
  return Layers(
    names=tuple(members),
    layer_of=tuple(order[key] for key in keys),
    stack_axes=tuple(stacked),
    axis_names=tuple(mapped[i] for i in chosen),
    shapes=_layer_shapes(members, paths, counts),
  )


def _is_axis(value: Any) -> bool:
  return isinstance(value, int) and not isinstance(value, bool)


def _is_axis_name(value: Any) -> bool:
  return isinstance(value, str) or (
    isinstance(value, tuple) and bool(value) and all(isinstance(name, str) for name in value)
  )


def _axis_names(value: Any) -> tuple[str, ...]:
  if value is None:
    return ()
  if not _is_axis_name(value):
    raise TypeError(f'axis_name: a name or a tuple of names of mapped axes, not {value!r}')
  return (value,) if isinstance(value, str) else value


def _layer_names(group: Group, paths: Sequence[str]) -> list[str]:
  """For each leaf the name of its layer: the key of its group, else its own path."""
  checks.group(group)
  keys = [None if group is None else group(path) for path in paths]
  trees.raise_all(
    [
      f'{path or "(root)"}: {checks.kind_of(key)}'
      for path, key in zip(paths, keys, strict=True)
      if not isinstance(key, str | int | None) or isinstance(key, bool)
    ],
    'group: a key must be a string or an int, or None for a leaf that is a layer by itself; found',
  )
  alone = {path for path, key in zip(paths, keys, strict=True) if key is None}
  taken = sorted(alone & {str(key) for key in keys if key is not None})
  trees.raise_all(
    [f'{key}: a leaf, and a key of `group`' for key in taken],
    'a group needs a key that is no ungrouped leaf; return that key for the leaf, too, to join it:',
  )
  numbers = {str(key) for key in keys if isinstance(key, int)}
  trees.raise_all(
    [
      f'{key} and {key!r}'
      for key in sorted(numbers & {key for key in keys if isinstance(key, str)})
    ],
    'group: keys that differ would be one layer; return strings alone, or ints alone:',
  )
  return [path if key is None else str(key) for path, key in zip(paths, keys, strict=True)]


def _stack_axes(
  keys: Sequence[trees.Keys], shapes: Sequence[tuple[int, ...]], axes: Sequence[Any]
) -> list[int | None]:
  problems = [
    f'{trees.shown(at)}: stack axis {axis!r}, shape {shape}'
    for at, shape, axis in zip(keys, shapes, axes, strict=True)
    if axis is not None and not (_is_axis(axis) and -len(shape) <= axis < len(shape))
  ]
  trees.raise_all(
    problems,
    'stack_axis must be an existing axis, given as an int, or None where a leaf stacks no layers '
    "(pass a prefix tree such as {'layers': 0, 'head': None}, or (path, leaf) -> int | None; "
    "in optax.inject_hyperparams, static_args=('stack_axis',)):",
  )
  return [
    axis if axis is None else axis % len(shape) for shape, axis in zip(shapes, axes, strict=True)
  ]


def _layer_shapes(
  members: Mapping[str, Sequence[int]],
  paths: Sequence[str],
  counts: Sequence[tuple[int, ...]],
) -> tuple[tuple[int, ...], ...]:
  problems = []
  for name, at in members.items():
    if len({counts[i] for i in at}) > 1:
      found = ', '.join(
        f'{paths[i] or "(root)"}: {counts[i][0] if counts[i] else "not stacked"}' for i in at
      )
      problems.append(f'group {name!r}: {found}')
  trees.raise_all(
    problems,
    'the leaves of a group must stack the same number of layers; change `group` or `stack_axis`:',
  )
  return tuple(counts[at[0]] for at in members.values())
