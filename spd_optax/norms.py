"""Size and fingerprint of the anchors in an optimizer state, for reports about it."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from spd_optax import anchors, fingerprints, readout, trees
from spd_optax.fingerprints import is_dropped
from spd_optax.layers import Group, StackAxis, find_layers
from spd_optax.step import ProjectionDecayState


def anchor_norms(
  states: readout.States, stack_axis: StackAxis = None, group: Group = None
) -> np.ndarray:
  """‖θ_0‖ for each slot; NaN where no anchor is stored, or the state does not show which.

  `stack_axis` and `group` are the transformation's own; without them a layer is known where
  it is a leaf, and stacked along the only axis of its length.

  Raises:
    ValueError: naming every layer that `stack_axis` and `group` give and the state lacks.
  """
  members = [
    _members(state, layers, stack_axis, group)
    for state, layers in zip(states.values(), readout.shapes(states), strict=True)
  ]
  squares = [
    _squares(anchors.on_device(leaf), axis) for found in members for _, leaf, axis in found
  ]
  sizes = np.cumsum([square.size for square in squares])
  parts = iter(np.split(readout.finish(readout.start(squares))[0][2], sizes[:-1]))
  norms = [np.zeros(0)]
  for found, layers in zip(members, readout.shapes(states), strict=True):
    known: dict[str, np.ndarray] = {}
    for layer, _, _ in found:
      known[layer] = known.get(layer, np.zeros(())) + next(parts)
    norms += [
      np.ravel(known.get(name, np.full(math.prod(shape), np.nan))) for name, shape in layers.items()
    ]
  return np.sqrt(np.concatenate(norms))


def _members(
  state: ProjectionDecayState, layers: readout.Shapes, stack_axis: StackAxis, group: Group
) -> list[tuple[str, jax.Array, int | None]]:
  """(layer, array of the anchor, stack axis) for the layers whose arrays are known."""
  flat = readout.anchor_of(state)
  if any(map(is_dropped, flat.leaves)):
    return []
  if stack_axis is None and group is None:
    return _evident(flat, layers)
  found = find_layers(flat, [True] * len(flat.leaves), stack_axis, group)
  trees.match_shapes(
    {name: layers[name] for name in found.names if name in layers},
    found.named(found.shapes),
    'stack_axis and group must be those of the transformation; the shapes of the layers differ:',
  )
  names = [found.names[at] for at in found.layer_of]
  return list(zip(names, flat.leaves, found.stack_axes, strict=True))


def _evident(flat: trees.Flat, layers: readout.Shapes) -> list[tuple[str, jax.Array, int | None]]:
  if not set(flat.paths) <= set(layers):
    return []  # some leaves are in groups, perhaps in one that has the name of another leaf
  found: list[tuple[str, jax.Array, int | None]] = []
  for path, leaf in flat.by_path.items():
    axes = [i for i, length in enumerate(leaf.shape) if (length,) == layers[path]]
    if not layers[path]:
      found.append((path, leaf, None))
    elif len(axes) == 1:
      found.append((path, leaf, axes[0]))
  return found


@functools.partial(jax.jit, static_argnums=1)
def _squares(array: jax.Array, stack_axis: int | None) -> jax.Array:
  """‖θ_0‖², or that of each slice."""
  axes = [i for i in range(array.ndim) if i != stack_axis]
  total: jax.Array = jnp.sum(jnp.square(jnp.abs(anchors.wide(array))), axis=axes)
  return total


def fingerprint(states: readout.States) -> str:
  """`spd.fingerprint` of the anchors of all states together; of dropped ones, too."""
  words = np.stack([fingerprints.words_of(state.anchor) for state in states.values()])
  return fingerprints.as_text(np.add.reduce(words))
