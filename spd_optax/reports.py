"""What SPD has done to each layer, as records and as scalars for a tracker."""

import re
from typing import Any, NamedTuple

import numpy as np

from spd_optax import checks, readout
from spd_optax.layers import Group, StackAxis
from spd_optax.norms import anchor_norms
from spd_optax.readout import Values


class LayerRecord(NamedTuple):
  """What SPD did to one layer.

  Attributes:
    name: unique among the records: 'layers/kernel[3]' is slice 3 of a stacked leaf.
    path: the '/'-joined path of the leaf; None where the layer is a group.
    slice: its index in a stacked leaf or group; None where nothing is stacked.
    group: the key of the group; None where the layer is one leaf.
    condition: whether the layer was to be held at the last update. It was moved only where
      `ratio` > 0, too.
    ratio: as in `ProjectionDecayState`.
    distance: ‖θ − θ_0‖ before the last update.
    relative_distance: distance / ‖θ_0‖, NaN where the distance is; None where there is nothing to
      be relative to: ‖θ_0‖ is 0, NaN or not known.
    steps_held: updates so far with a true condition.
    share_held: `steps_held` per update; 0 before the first.
  """

  name: str
  path: str | None
  slice: int | None
  group: str | None
  condition: bool
  ratio: float
  distance: float
  relative_distance: float | None
  steps_held: int
  share_held: float


def layer_report(
  opt_state: Any, *, stack_axis: StackAxis = None, group: Group = None
) -> list[LayerRecord]:
  """What SPD did to each layer so far.

  Call it outside jit, as often as you like: it only reads the state. With several
  processes call it in all of them.

  Args:
    opt_state: the state of any optimizer with SPD in it, at any depth; several in one state
      (`optax.partition`) are reported one after the other.
    stack_axis: the transformation's own, and
    group: likewise. They are needed for the relative distance alone, and only where
      the state does not show what belongs to a layer: in a group, or where two axes of a leaf
      are as long as the stack.

  Returns:
    A record per layer, in the natural order of the names ('block_2' before 'block_10').

  Raises:
    TypeError: if there is no state of SPD in `opt_state`, or under jit.
    ValueError: if the state has a further axis (vmap, pmap), or `stack_axis` and `group` are
      not those that it was made with.

  Example:
    >>> import jax.numpy as jnp
    >>> import spd_optax as spd
    >>> params = {'kernel': jnp.ones((2, 2)), 'bias': jnp.zeros(2)}
    >>> tx = spd.adam_spd(1e-3)
    >>> _, state = tx.update(params, tx.init(params), params)
    >>> for record in spd.layer_report(state):
    ...   print(record.name, record.condition, record.distance, record.relative_distance)
    bias False 0.0 None
    kernel False 0.0 0.0
  """
  states = readout.states_in(opt_state, 'layer_report')
  values = readout.read(states)
  norms = anchor_norms(states, stack_axis, group)
  far = relative(values.distance, norms).tolist()
  return [
    LayerRecord(
      *slot,
      condition=bool(values.condition[i]),
      ratio=float(values.ratio[i]),
      distance=float(values.distance[i]),
      relative_distance=far[i] if norms[i] > 0 else None,
      steps_held=int(values.constrained[i]),
      share_held=float(share),
    )
    for i, (slot, share) in enumerate(zip(readout.slots(states), shares(values), strict=True))
  ]


def scalars(
  opt_state: Any, prefix: str = 'spd', *, stack_axis: StackAxis = None, group: Group = None
) -> dict[str, float]:
  """Shares and distances as a flat dict, for any tracker.

  ``wandb.log(spd.scalars(state), step)``, ``writer.write_scalars(step, spd.scalars(state))`` (clu),
  or ``writer.add_scalar(name, value, step)`` for each item (TensorBoard). The keys, each after
  `prefix`:

  - ``held``: the share of the layers with a true condition at the last update; ``held_share``:
    of layers and updates so far.
  - ``distance``: ‖θ − θ_0‖ over all layers; ``relative_distance``: over those whose ‖θ_0‖
    is known, divided by it, if it is not 0.
  - ``NAME/held``, ``NAME/ratio``, ``NAME/distance``, ``NAME/relative_distance``,
    ``NAME/held_share``: those of each layer; without the relative distance where it is None.
    'layers/kernel[3]' is spelled 'layers/kernel/3', as TensorBoard takes no brackets.

  Args:
    opt_state: see `layer_report`.
    prefix: the first part of each key; '' for none.
    stack_axis: see `layer_report`.
    group: see `layer_report`.

  Returns:
    Python floats by name.

  Raises:
    TypeError, ValueError: as `layer_report`.

  Example:
    >>> import jax.numpy as jnp
    >>> import spd_optax as spd
    >>> params = {'kernel': jnp.ones((2, 2))}
    >>> tx = spd.adam_spd(1e-3)
    >>> _, state = tx.update(params, tx.init(params), params)
    >>> sorted(spd.scalars(state))[:3]
    ['spd/distance', 'spd/held', 'spd/held_share']
  """
  checks.text('prefix', prefix)
  states = readout.states_in(opt_state, 'scalars')
  values = readout.read(states)
  norms = anchor_norms(states, stack_axis, group)
  whole = {
    'held': _mean(values.condition),
    'held_share': _mean(shares(values)),
    'distance': float(np.linalg.norm(values.distance)),
  }
  if np.any(norms > 0):
    whole['relative_distance'] = float(overall(values.distance, norms))
  columns = {
    'held': values.condition,
    'held_share': shares(values),
    'ratio': values.ratio,
    'distance': values.distance,
    'relative_distance': relative(values.distance, norms),
  }
  lists = {key: column.astype(float).tolist() for key, column in columns.items()}
  for i, slot in enumerate(readout.slots(states)):
    name = re.sub(r"[][/'()]+[.]?", '/', slot.name).strip('/')
    keys = [key for key in lists if key != 'relative_distance' or norms[i] > 0]
    whole |= {f'{name}/{key}': lists[key][i] for key in keys}
  start = f'{prefix}/' if prefix else ''
  return {start + key: value for key, value in whole.items()}


def _mean(values: np.ndarray) -> float:
  return float(np.mean(values)) if len(values) else 0.0


def shares(values: Values) -> np.ndarray:
  """The share of the updates with a true condition; 0 before the first."""
  found: np.ndarray = values.constrained / np.maximum(values.updates, 1)
  return found


def relative(distance: np.ndarray, norms: np.ndarray) -> np.ndarray:
  """‖θ − θ_0‖ / ‖θ_0‖ for each layer; NaN where ‖θ_0‖ is 0 or not known."""
  known = norms > 0
  return np.where(known, distance, np.nan) / np.where(known, norms, 1)


def overall(distance: np.ndarray, norms: np.ndarray) -> Any:
  """‖θ − θ_0‖ / ‖θ_0‖ over all layers (the last axis) whose ‖θ_0‖ is known; NaN if none is."""
  known = ~np.isnan(norms)
  size = float(np.linalg.norm(norms[known]))
  far = np.linalg.norm(distance[..., known], axis=-1)
  return far / size if size > 0 else far * np.nan
