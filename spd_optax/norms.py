"""Size and fingerprint of the anchors in an optimizer state, for reports about it."""

import functools
import math
import weakref
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from spd_optax import fingerprints, leafwise, memory, readout, trees
from spd_optax.engine import ProjectionDecayState
from spd_optax.fingerprints import is_dropped
from spd_optax.layers import Arrangement, Group, StackAxis, layer_key


def anchor_norms(
  states: readout.States, stack_axis: StackAxis = None, group: Group = None
) -> np.ndarray:
  """‖θ_0‖ for each slot; NaN where an anchor was dropped, or the state does not show which it is.

  `stack_axis` and `group` are the transformation's own; without them a layer is known where
  it is a leaf, and stacked along the only axis of its length. Arrays of the same anchor, the same
  objects, are read once.

  Raises:
    ValueError: naming every layer that `stack_axis` and `group` give and the state lacks.
  """
  shapes = readout.shapes(states)
  members = [
    _members(state, layers, stack_axis, group)
    for state, layers in zip(states.values(), shapes, strict=True)
  ]
  squares = iter(_squares([(leaf, axis) for found in members for _, leaf, axis in found]))
  norms = [np.zeros(0)]
  for found, layers in zip(members, shapes, strict=True):
    known: dict[str, np.ndarray] = {}
    for layer, _, _ in found:
      known[layer] = known.get(layer, np.zeros(())) + next(squares)
    norms += [
      np.ravel(known.get(name, np.full(math.prod(shape), np.nan))) for name, shape in layers.items()
    ]
  return np.sqrt(np.concatenate(norms))


Member = tuple[str, jax.Array, int | None]  # layer, array of its anchor, stack axis


def _members(
  state: ProjectionDecayState, layers: readout.Shapes, stack_axis: StackAxis, group: Group
) -> list[Member]:
  """The arrays of each layer for which all are known; zeros for one that stores none."""
  flat = readout.anchor_of(state)
  if any(map(is_dropped, flat.leaves)):
    return []
  if stack_axis is None and group is None:
    stored, found = list(map(layer_key, flat.paths)), _evident(flat, layers)
  else:
    made = Arrangement(stack_axis, group).find_layers(flat, range(len(flat.leaves)))
    trees.match_shapes(
      {name: layers[name] for name in made.keys if name in layers},
      made.by_key(made.shapes),
      'stack_axis and group must be those of the transformation; the shapes of the layers differ:',
    )
    stored = [made.keys[at] for at in made.layer_of]
    found = list(zip(stored, flat.leaves, made.stack_axes, strict=True))
  if not set(stored) <= set(layers):
    return []  # some leaves are in groups, perhaps in one that has the name of another leaf
  zeros = {name: jnp.zeros(shape) for name, shape in layers.items() if name not in stored}
  return found + [(name, array, 0 if array.ndim else None) for name, array in zeros.items()]


def _evident(flat: trees.Flat, layers: readout.Shapes) -> list[Member]:
  """The leaves that are layers of their own, where one axis alone can stack them."""
  found: list[Member] = []
  for path, leaf in zip(map(layer_key, flat.paths), flat.leaves, strict=True):
    axes = [i for i, length in enumerate(leaf.shape) if (length,) == layers.get(path)]
    if layers.get(path) == ():
      found.append((path, leaf, None))
    elif len(axes) == 1:
      found.append((path, leaf, axes[0]))
  return found


_KNOWN: dict[tuple[int, int | None], np.ndarray] = {}  # by the id of an array that is alive


def _squares(members: Sequence[tuple[jax.Array, int | None]]) -> list[np.ndarray]:
  """‖θ_0‖² of each array, or of each slice; kept as long as the array is."""
  keys = [(id(array), axis) for array, axis in members]
  new = {key: member for key, member in zip(keys, members, strict=True) if key not in _KNOWN}
  sums = [_sum_of_squares(memory.on_device(array), axis) for array, axis in new.values()]
  values = np.split(readout.finish(readout.start(sums))[0][2], np.cumsum([x.size for x in sums]))
  found = dict(zip(new, values, strict=False))  # what is behind the last end is empty
  for key, (array, _) in new.items():
    if isinstance(array, jax.Array):  # one of NumPy may change
      _KNOWN[key] = found[key]
      weakref.finalize(array, _KNOWN.pop, key, None).atexit = False
  return [found[key] if key in found else _KNOWN[key] for key in keys]


@functools.partial(jax.jit, static_argnums=1)
def _sum_of_squares(array: jax.Array, stack_axis: int | None) -> jax.Array:
  axes = [i for i in range(array.ndim) if i != stack_axis]
  total: jax.Array = jnp.sum(jnp.square(jnp.abs(leafwise.at_least_float32(array))), axis=axes)
  return total


def fingerprint(states: readout.States) -> str:
  """`spd.fingerprint` of the anchors of all states together; of dropped ones, too."""
  words = np.stack([fingerprints.words_of(state.anchor) for state in states.values()])
  return fingerprints.as_text(np.add.reduce(words))
