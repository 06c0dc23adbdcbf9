"""What SPD has done to each layer, as records and as scalars for a tracker.

Reports read the optimizer state outside the training step. The values of all layers
travel to the host in one small array per field, however many layers there are.
"""

import functools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import multihost_utils
from jax.sharding import Mesh, SingleDeviceSharding

from spd_optax import leafwise, placement, trees
from spd_optax.budgets import BudgetState
from spd_optax.engine import PER_LAYER, ProjectionDecayState, states_of
from spd_optax.exchange import is_dropped
from spd_optax.layers import Arrangement, Group, StackAxis, layer_key, layer_name, sum_of

States = Sequence[ProjectionDecayState]


class LayerRecord(NamedTuple):
  """What SPD did to one layer.

  `condition`, `ratio`, `distance` and `constrained` are those of `ProjectionDecayState`.

  Attributes:
    name: unique among the records. 'layers/kernel[3]' is slice 3 of a stacked leaf.
    path: the '/'-joined path of the leaf; None for a group.
    slice: the index in a stacked leaf or group; None where nothing is stacked.
    group: the key of the group; None for a leaf.
    relative_distance: distance / ‖θ_0‖. It is NaN if the distance is, and None if ‖θ_0‖ is 0, NaN
      or not known.
    constrained_share: `constrained` divided by the updates; 0 before the first update.
    rule_state: the rule's own numbers by name; empty for a rule without any.
  """

  name: str
  path: str | None
  slice: int | None
  group: str | None
  condition: bool
  ratio: float
  distance: float
  relative_distance: float | None
  constrained: int
  constrained_share: float
  rule_state: dict[str, float]


WORDS = ('condition', 'ratio', 'distance', 'constrained_share')  # of every layer in `scalars`


def layer_report(
  opt_state: optax.OptState, *, stack_axis: StackAxis = None, group: Group = None
) -> list[LayerRecord]:
  """Reports what SPD did to each layer so far.

  Call it outside jit. With several processes, call it in all of them.

  Args:
    opt_state: the state of any optimizer with SPD in it, at any depth, once or several times; or
      what `nnx.split` returns for such a state, or a checkpoint restored without a structure.
    stack_axis: the `stack_axis` of the transformation. Only the relative distance needs it, and
      only if two axes of a leaf are as long as its stack.
    group: the `group` of the transformation. Only the relative distance of groups needs it.

  Returns:
    A record per layer. Names come in natural order ('block_2' before 'block_10').

  Raises:
    TypeError, ValueError: if `opt_state` holds no state of SPD; under jit; if the state has a
      further axis (vmap, pmap); if `stack_axis` and `group` are not the transformation's.

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
  return _records(states_in(opt_state, 'layer_report'), stack_axis, group)[0]


def _records(
  states: States, stack_axis: StackAxis, group: Group
) -> tuple[list[LayerRecord], np.ndarray]:
  """The records, and ‖θ_0‖ of each."""
  values = begin(states)()
  norms = anchor_norms(states, stack_axis, group)
  far = relative(values['distance'], norms)
  shares = constrained_share(values['constrained'], values['updates'])
  records = [
    slot._replace(
      condition=bool(values['condition'][i]),
      ratio=float(values['ratio'][i]),
      distance=float(values['distance'][i]),
      relative_distance=float(far[i]) if norms[i] > 0 else None,
      constrained=int(values['constrained'][i]),
      constrained_share=float(shares[i]),
      rule_state={name: float(values['rule_state'][name][i]) for name in slot.rule_state},
    )
    for i, slot in enumerate(slots(states))
  ]
  return records, norms


def scalars(
  opt_state: optax.OptState,
  prefix: str = 'spd',
  *,
  stack_axis: StackAxis = None,
  group: Group = None,
) -> dict[str, float]:
  """Returns the same as `layer_report` in a flat dict, for any tracker.

  Use ``wandb.log(spd.scalars(state), step)``, ``writer.write_scalars(step, spd.scalars(state))``
  (clu), or ``writer.add_scalar(name, value, step)`` for each item (TensorBoard). The names are
  those of `LayerRecord`. Over all layers:

  - ``spd/condition``, ``spd/constrained_share``: means over the layers.
  - ``spd/distance``: ‖θ − θ_0‖.
  - ``spd/relative_distance``: the distance of the layers with a known ‖θ_0‖, divided by their
    ‖θ_0‖; missing if no known ‖θ_0‖ is above 0.
  - ``spd/budget``, ``spd/drift``, ``spd/strength``, ``spd/measured``: from the `BudgetState`, if
    there is one. With several states of SPD the number of the state follows ``spd/``:
    ``spd/state_0/budget``.

  For each layer there are ``spd/NAME/condition``, `ratio`, `distance`, `constrained_share`,
  `relative_distance` unless it is None, and each of the rule's own numbers. TensorBoard takes no
  brackets: 'layers/kernel[3]' is spelled 'layers/kernel/3', unless another layer has that name.

  Args:
    prefix: the first part of each key, instead of 'spd'; '' for none.
    opt_state, stack_axis, group: see `layer_report`.

  Raises:
    TypeError, ValueError: as `layer_report`.
  """
  states = states_in(opt_state, 'scalars')
  records, norms = _records(states, stack_axis, group)
  distance = np.array([record.distance for record in records])
  found = {
    word: float(np.mean([getattr(record, word) for record in records] or [0]))
    for word in ('condition', 'constrained_share')
  }
  found['distance'] = float(np.linalg.norm(distance))
  if np.any(norms > 0):
    found['relative_distance'] = float(overall(distance, norms))
  found |= {name: float(value) for name, value in budgets_of(states).items()}
  names = {record.name for record in records}
  for record in records:
    spelled = f'{record.name.rpartition("[")[0]}/{record.slice}'
    name = record.name if record.slice is None or spelled in names else spelled
    found |= {f'{name}/{word}': float(getattr(record, word)) for word in WORDS}
    if record.relative_distance is not None:
      found[f'{name}/relative_distance'] = record.relative_distance
    found |= {f'{name}/{number}': value for number, value in record.rule_state.items()}
  start = f'{prefix}/' if prefix else ''
  return {start + key: value for key, value in found.items()}


# The states in an optimizer state, and the layers in them.


def states_in(opt_state: optax.OptState, name: str) -> States:
  """Finds every `ProjectionDecayState` in an optimizer state; see `_plain`."""
  states = jax.tree.map(_as_state, opt_state, is_leaf=_has_fields)
  found = [_plain(x) for x in states_of(states, name)]
  for state in found:
    if isinstance(state.count, jax.core.Tracer | jax.ShapeDtypeStruct):
      raise TypeError(f'{name}: call it outside jit, with the state that a step returned')
    if shape := jnp.shape(state.count):
      raise ValueError(
        f'{name}: its count has the shape {shape}: the state has a further axis '
        '(vmap over seeds, or pmap); pass a part: jax.tree.map(lambda x: x[0], opt_state)'
      )
  return found


def _has_fields(node: object) -> bool:
  """Whether a node has the fields of a state by name, without those that are empty."""
  always = {'count', *PER_LAYER}
  return isinstance(node, Mapping) and always <= set(node) <= {*ProjectionDecayState._fields}


def _as_state(node: Any) -> Any:
  """The state again that `nnx.split`, or a restored checkpoint, has as a mapping; or the node."""
  if not _has_fields(node):
    return node
  fields = {name: x for name, x in node.items() if x is not None}  # of an empty node
  budget = fields.pop('budget_state', None)
  if isinstance(budget, Mapping) and budget:
    fields['budget_state'] = BudgetState(**budget)
  return ProjectionDecayState(**{'anchor': {}, 'rule_state': {}, **fields})


def _plain(state: ProjectionDecayState) -> ProjectionDecayState:
  """The state without the boxes of nnx.Optimizer, its layers in natural order."""
  keys, budget = _natural(tuple(state.condition)), state.budget_state

  def ordered(values: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    return dict(zip(keys, jax.tree.leaves([values[key] for key in keys]), strict=True))

  return state._replace(
    count=jax.tree.leaves(state.count)[0],
    budget_state=type(budget)(*jax.tree.leaves(budget)),
    rule_state={name: ordered(values) for name, values in state.rule_state.items()},
    **{field: ordered(getattr(state, field)) for field in PER_LAYER},
  )


@functools.lru_cache(maxsize=64)
def _natural(names: tuple[str, ...]) -> list[str]:
  """'block_2' before 'block_10'."""
  parts = {name: re.split('([0-9]+)', name) for name in names}
  return sorted(names, key=lambda at: [int(x) if i % 2 else x for i, x in enumerate(parts[at])])


def shapes(state: ProjectionDecayState) -> dict[str, tuple[int, ...]]:
  """The shape of each layer's values, by its key."""
  return {key: array.shape for key, array in state.condition.items()}


def sizes(states: States) -> list[int]:
  """How many layers each state has, with a slice as one."""
  return [sum(map(math.prod, shapes(state).values())) for state in states]


def _with_layers(states: States) -> States:
  """Those that hold anything; only these are numbered."""
  return [state for state, size in zip(states, sizes(states), strict=True) if size]


OF_BUDGET = ('budget', 'drift', 'strength', 'measured')  # what is shown of a `BudgetState`
OWN = re.compile(rf'spd/(state_\d+/)?({"|".join(OF_BUDGET)})')  # a metric that the log adds itself


def of_budget(metric: str) -> str | None:
  """Which number of a budget a metric of a log is; None for others."""
  match = OWN.fullmatch(metric)
  return match and match[2]


def budgets_of(states: States) -> dict[str, Any]:
  """What the `BudgetState` of each state says."""
  each = [state.budget_state for state in _with_layers(states)]
  found = {i: state for i, state in enumerate(each) if isinstance(state, BudgetState)}
  return {
    (f'state_{i}/' if len(each) > 1 else '') + name: _whole(getattr(state, name))
    for i, state in found.items()
    for name in OF_BUDGET
  }


def slots(states: States) -> list[LayerRecord]:
  """The layers in the order of all values, as records without values.

  If two states have a layer of one name, each name begins with the number of its state.
  """
  found = [(i, slot) for i, state in enumerate(_with_layers(states)) for slot in _slots(state)]
  if len({slot.name for _, slot in found}) < len(found):
    found = [(i, slot._replace(name=f'state_{i}/{slot.name}')) for i, slot in found]
  return [slot for _, slot in found]


def _slots(state: ProjectionDecayState) -> Iterator[LayerRecord]:
  flat = trees.flatten(state.anchor, is_dropped)
  leaves = {layer_key(path): path for path in (*flat.paths, *map(trees.join, flat.holes))}
  numbers = dict.fromkeys(state.rule_state, math.nan)
  for key, shape in shapes(state).items():
    layer = leaves.get(key, layer_name(key))
    path, group = (layer, None) if key in leaves else (None, layer)
    for at in range(shape[0]) if shape else (None,):
      name = trees.shown(layer) + ('' if at is None else f'[{at}]')
      yield LayerRecord(name, path, at, group, False, 0.0, 0.0, None, 0, 0.0, numbers)


# The values of all layers, brought to the host.


def begin(states: States) -> Callable[[], dict[str, Any]]:
  """Begins to read all layers; does not wait for the step that computes them.

  If the arrays are spread over several processes, all of them must call it. Returns a function
  that waits, and returns arrays with an entry per slot, named as in `audit.Record`.
  """
  columns: dict[str, Any] = {
    field: [x for state in states for x in getattr(state, field).values()] for field in PER_LAYER
  }
  columns['updates'] = [state.count for state in states]
  columns['rule_state'] = {name: [] for state in states for name in state.rule_state}
  for name, column in columns['rule_state'].items():
    for state in states:
      none = {key: np.full(shape, np.nan, np.float32) for key, shape in shapes(state).items()}
      column += state.rule_state.get(name, none).values()
  if jax.process_count() > 1:
    columns = jax.tree.map(_whole, columns)
  # The arrays of a column become one array, which has one sharding.
  if len({getattr(x, 'sharding', None) for x in jax.tree.leaves(columns)}) > 1:
    columns = jax.device_put(columns, SingleDeviceSharding(jax.local_devices()[0]))
  packed = _packed(columns)
  for array in jax.tree.leaves(packed):
    array.copy_to_host_async()

  def values() -> dict[str, Any]:
    found: dict[str, Any] = jax.tree.map(np.asarray, packed)
    return {**found, 'updates': np.repeat(found['updates'], sizes(states))}

  return values


def _whole(array: Any) -> Any:
  """The array in a form that lies in this process as a whole."""
  if not isinstance(array, jax.Array) or array.is_fully_addressable:
    return array
  if array.is_fully_replicated:
    return array.addressable_data(0)
  return multihost_utils.process_allgather(array, tiled=True)


def _packed(columns: Any) -> Any:
  """The columns, each as one array; in a mesh of its own if they lie on one device."""
  arrays = [x for x in jax.tree.leaves(columns) if isinstance(x, jax.Array)]
  devices = set().union(*(x.devices() for x in arrays))
  if len(devices) != 1:
    return _pack(columns)
  # jit refuses arrays on other devices than those of the mesh that jax.set_mesh has set.
  with jax.set_mesh(Mesh(np.array([*devices]), ('device',))):
    return _pack(columns)


@jax.jit
def _pack(tree: Any) -> Any:
  def joined(arrays: Sequence[jax.Array]) -> jax.Array:
    return jnp.concatenate([jnp.ravel(x) for x in arrays]) if arrays else jnp.zeros(0)

  return jax.tree.map(joined, tree, is_leaf=lambda node: isinstance(node, list))


# Norms of the anchors.


def anchor_norms(states: States, stack_axis: StackAxis = None, group: Group = None) -> np.ndarray:
  """‖θ_0‖ for each slot; NaN where an anchor was dropped, or the layer's leaves are not known.

  `stack_axis` and `group` are the transformation's own; else a ValueError names every layer that
  differs. Without them a layer is known if it is a leaf, and stacked along the only axis of its
  length.
  """
  norms = [np.zeros(0)]
  for state in states:
    flat, layers = trees.flatten(state.anchor, is_dropped), shapes(state)
    dropped = any(map(is_dropped, flat.leaves))
    keys, axes = ([], []) if dropped else _members(flat, layers, stack_axis, group)
    known = not dropped and set(keys) <= set(layers)  # else leaves are in groups
    # A layer without members has the zero anchor, which is not stored.
    squares = {key: np.full(shape, 0 if known else np.nan) for key, shape in layers.items()}
    if known:
      sums = [_square(placement.on_device(x), at) for x, at in zip(flat.leaves, axes, strict=True)]
      found = jax.device_get(list(map(_whole, sums)))
      for key, axis, square in zip(keys, axes, found, strict=True):
        squares[key] = squares[key] + (np.nan if axis == UNKNOWN else square)
    norms += map(np.ravel, squares.values())
  return np.sqrt(np.concatenate(norms))


UNKNOWN = -1  # axis


def _members(
  flat: trees.Flat, layers: Mapping[str, tuple[int, ...]], stack_axis: StackAxis, group: Group
) -> tuple[list[str], list[int | None]]:
  """The layer of each leaf of the anchor, and its axis that stacks layers."""
  if stack_axis is None and group is None:
    keys = [layer_key(path) for path in flat.paths]
    return keys, [_evident_axis(x, layers.get(k)) for k, x in zip(keys, flat.leaves, strict=True)]
  made = Arrangement(stack_axis, group).find_layers(flat, range(len(flat.leaves)))
  trees.match_shapes(
    {layer_name(key): layers[key] for key in made.keys if key in layers},
    dict(zip(map(layer_name, made.keys), made.shapes, strict=True)),
    'stack_axis and group must be those of the transformation; the shapes of the layers differ:',
  )
  return [made.keys[at] for at in made.layer_of], list(made.stack_axes)


def _evident_axis(leaf: Any, shape: tuple[int, ...] | None) -> int | None:
  """The only axis that can stack the layers of a leaf."""
  axes = [i for i, length in enumerate(leaf.shape) if (length,) == shape]
  return None if shape == () else axes[0] if len(axes) == 1 else UNKNOWN


@functools.partial(jax.jit, static_argnums=1)
def _square(array: jax.Array, stack_axis: int | None) -> jax.Array:
  """‖θ_0‖² of an array, or of each of its slices."""
  return sum_of(jnp.square(jnp.abs(leafwise.at_least_float32(array))), stack_axis)


def constrained_share(constrained: np.ndarray, updates: np.ndarray) -> Any:
  """The share of the updates with a true condition; 0 before the first."""
  return constrained / np.maximum(updates, 1)


def relative(distance: Any, norms: Any) -> np.ndarray:
  """‖θ − θ_0‖ / ‖θ_0‖ for each layer; NaN if ‖θ_0‖ is 0 or not known."""
  known = norms > 0
  return np.where(known, distance, np.nan) / np.where(known, norms, 1)


def overall(distance: np.ndarray, norms: np.ndarray) -> np.ndarray:
  """‖θ − θ_0‖ / ‖θ_0‖ over the layers (the last axis) with a known ‖θ_0‖; NaN without any."""
  known = ~np.isnan(norms)
  return relative(np.linalg.norm(distance[..., known], axis=-1), np.linalg.norm(norms[known]))
