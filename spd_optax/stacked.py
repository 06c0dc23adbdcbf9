"""Stacked layers that `stack_axis` was not told of: what looks like them at `init`."""

import re
from collections.abc import Sequence

import optax

from spd_optax import checks, misuse

Shape = tuple[int, ...]

# What models call a part that is scanned or stacked, of flax, MaxText, big_vision and Haiku.
NAME = re.compile(r'(.*_)?(layers|blocks|stack)|.*scan.*|.*layer_stack.*|encoderblock', re.I)


def warn(paths: Sequence[str], shapes: Sequence[Shape]) -> None:
  """Warns once of leaves that look stacked, and of a model that `optax.flatten` made one leaf."""
  caller = misuse.frames(optax.flatten.__module__)
  if paths == [''] and any(x.f_code.co_qualname.startswith('flatten.<locals>') for x in caller):
    checks.warn(
      'optax.flatten makes one leaf of all params, and so SPD one layer. '
      'Put flatten around the other links alone, or leave it out.'
    )
  found = {place: axis for place, inside in _inside(paths, shapes) if (axis := _axis(inside))}
  if found:
    described = [f'{at} have length {n} on axis {axis}' for at, (axis, n) in found.items()]
    rule = {
      axis: [at for at, (own, _) in found.items() if own == axis]
      for axis in sorted({axis for axis, _ in found.values()})
    }
    checks.warn(
      f'Layers look stacked: all leaves in {", in ".join(described)}. Each leaf counts as one '
      f'layer. Pass stack_axis={rule} to make a layer of each slice, or stack_axis={{}} if '
      'nothing is stacked.'
    )


def _inside(paths: Sequence[str], shapes: Sequence[Shape]) -> list[tuple[str, list[Shape]]]:
  """The shapes of the leaves in each part that has such a name, and is no list of layers."""
  found: dict[str, list[Shape]] = {}
  for path, shape in zip(paths, shapes, strict=True):
    names = path.split('/')
    for i in range(1, len(names)):
      if NAME.fullmatch(names[i - 1]) and not names[i].isdigit():
        found.setdefault('/'.join(names[:i]), []).append(shape)
        break
  return list(found.items())


def _axis(shapes: Sequence[Shape]) -> tuple[int, int] | None:
  """The axis that stacks layers, and their number; None where it looks like ordinary layers.

  A stacked bias has two axes, and a stacked kernel has three or more. Kernels that are not
  stacked, of convolutions (3, 3, m, n) or attention (m, heads, n), may agree on an axis. But they
  come with biases or scales of one axis, or agree on both.
  """
  ranks = {len(shape) for shape in shapes}
  if len(shapes) < 2 or min(ranks) < 2 or max(ranks) < 3:
    return None
  lengths = [{shape[axis] for shape in shapes} for axis in (0, 1)]
  equal = [axis for axis in (0, 1) if len(lengths[axis]) == 1]
  if not equal or (len(equal) == 2 and min(ranks) > 2):
    return None
  axis, length = equal[0], shapes[0][equal[0]]
  return (axis, length) if length > 1 else None
