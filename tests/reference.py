"""Selective Projection Decay in plain NumPy, float64: what the library must meet.

Written from the equations of the paper and of the two docstrings, with loops
over layers; it shares no code with the library. Params, gradients and updates
are dicts from a leaf's name to an array. `anchors` has an array, 0 (the zero
anchor) or None (free) for each name; `groups` and `stack_axes` have entries only
for the leaves that are grouped or stacked.
"""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import jax
import numpy as np

Leaves = Mapping[str, Any]


def x64() -> AbstractContextManager[Any]:
  """64-bit mode for one block, not for the tests that follow."""
  return jax.enable_x64(True)


class Held(NamedTuple):
  """What one step did to one layer: arrays over its slices, or scalars."""

  condition: Any
  ratio: Any
  distance: Any


def _members(params: Leaves, anchors: Leaves, groups: Leaves, stack_axes: Leaves):
  """{(layer's name, slice or None): [(leaf's name, index into the leaf), ...]}."""
  members: dict[Any, Any] = {}
  for name, leaf in params.items():
    if anchors[name] is None:
      continue
    axis, layer = stack_axes.get(name), groups.get(name, name)
    if axis is None:
      members.setdefault((layer, None), []).append((name, ()))
      continue
    before = (slice(None),) * (axis % np.ndim(leaf))
    for at in range(np.shape(leaf)[axis]):
      members.setdefault((layer, at), []).append((name, (*before, at)))
  return members


def _gather(tree: Leaves, members: Any) -> np.ndarray:
  """All numbers of one layer in a row; complex numbers as two."""
  parts = [np.ravel(np.asarray(tree[name])[index]).astype(complex) for name, index in members]
  row = np.concatenate(parts)
  return np.concatenate([row.real, row.imag])


def state_keys(by_path: Mapping[str, Any]) -> dict[str, Any]:
  """Values by path, under the keys that layers have in the optimizer state: 'a/b' is 'a~b'."""
  return {path.replace('/', '~'): value for path, value in by_path.items()}


def _report(steps: Mapping[Any, Held]) -> dict[str, Held]:
  """Joins the slices of each layer."""
  report: dict[str, Any] = {}
  for (layer, at), held in steps.items():
    if at is None:
      report[layer] = held
    else:
      report.setdefault(layer, []).append(held)
  return {
    layer: Held(*map(np.array, zip(*held, strict=True))) if isinstance(held, list) else held
    for layer, held in report.items()
  }


def _layers(
  params: Leaves, gradients: Leaves, anchors: Leaves, groups: Leaves, stack_axes: Leaves
) -> Iterator[tuple[Any, Any, np.ndarray, np.ndarray]]:
  """(layer and slice, members, g, d) for each layer."""
  deviations = {n: params[n] - anchors[n] for n in params if anchors[n] is not None}
  for key, members in _members(params, anchors, groups, stack_axes).items():
    yield key, members, _gather(gradients, members), _gather(deviations, members)


def _copies(tree: Leaves) -> dict[str, np.ndarray]:
  return {name: np.array(leaf) for name, leaf in tree.items()}


def with_projection_decay(
  params: Leaves,
  gradients: Leaves,
  updates: Leaves,
  anchors: Leaves,
  strength: float = 1.0,
  *,
  margin: float = 0.0,
  near: float = 0.0,
  groups: Leaves | None = None,
  stack_axes: Leaves | None = None,
) -> tuple[dict[str, np.ndarray], dict[str, Held]]:
  """Eq. 3, 4 and 9: the next params from the whole update of the inner optimizer.

  A layer that is less than `near` of its steps away from its anchor is free.
  """
  moved = {name: params[name] + updates[name] for name in params}  # θ̃
  after, steps = _copies(moved), {}
  for key, members, g, d in _layers(params, gradients, anchors, groups or {}, stack_axes or {}):
    away = {name: moved[name] - anchors[name] for name, _ in members}
    radius, grown = np.linalg.norm(d), np.linalg.norm(_gather(away, members))
    c = -np.dot(g, d)
    is_far = radius >= near * np.linalg.norm(_gather(updates, members))
    held = c < margin * np.linalg.norm(g) * radius and is_far
    ratio = max(0.0, grown - radius) / grown if grown > 0 else 0.0
    for name, index in members if held else ():
      after[name][index] -= strength * ratio * away[name][index]
    steps[key] = Held(held, ratio, radius)
  return after, _report(steps)


def pull(cos: float, margin: float) -> float:
  """φ(cos, m) = max(0, cos + m): how strongly `projection_decay` pulls home, relative to ‖g‖."""
  return max(0.0, cos + margin)


def projection_decay(
  params: Leaves,
  gradients: Leaves,
  anchors: Leaves,
  strength: float = 1.0,
  *,
  margin: float = 0.0,
  groups: Leaves | None = None,
  stack_axes: Leaves | None = None,
) -> tuple[dict[str, np.ndarray], dict[str, Held]]:
  """g + λ φ(cos, m) ‖g‖ d / ‖d‖ where c < m ‖g‖ ‖d‖; the turned gradients."""
  turned, steps = _copies(gradients), {}
  for key, members, g, d in _layers(params, gradients, anchors, groups or {}, stack_axes or {}):
    size, radius = np.linalg.norm(g), np.linalg.norm(d)
    held = -np.dot(g, d) < margin * size * radius
    ratio = pull(np.dot(g, d) / (size * radius), margin) if held else 0.0
    for name, index in members if held else ():
      deviation = (params[name] - anchors[name])[index]
      turned[name][index] += strength * ratio * size * deviation / radius
    steps[key] = Held(held, ratio, radius)
  return turned, _report(steps)
