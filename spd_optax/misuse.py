"""Warnings where a transformation stands in a wrong place.

No transformation of optax knows its neighbors. So this looks at what `init` was called from, and at
the functions that an optimizer is made of. What it cannot see, it does not warn of.
"""

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any

import numpy as np
import optax

from spd_optax import checks
from spd_optax.rules import GradientTurn

Part = tuple[str, dict[str, Any]]  # a name, and the closure by name


def _parts(*functions: Any) -> Iterator[Part]:
  """What an optimizer is made of, by the names that optax and this library give to it."""
  seen, waiting = set(), list(functions)
  while waiting:
    value = waiting.pop()
    if id(value) in seen:
      continue
    seen.add(id(value))
    if isinstance(value, tuple | list | dict):
      waiting += value.values() if isinstance(value, dict) else value
      continue
    closure: dict[str, Any] = {}
    if inspect.ismethod(value):
      kind = type(value.__self__)
      home, name = kind.__module__, kind.__name__
    elif inspect.isfunction(value):
      home, name = value.__module__ or '', value.__qualname__.split('.')[0]
      for variable, cell in zip(value.__code__.co_freevars, value.__closure__ or (), strict=True):
        with contextlib.suppress(ValueError):  # an empty cell
          closure[variable] = cell.cell_contents
      waiting += closure.values()
    else:
      continue
    if home == 'spd_optax.with_projection_decay':
      yield 'with_projection_decay', closure
    elif home == 'spd_optax.projection_decay' and 'engine' in closure:
      is_turn = isinstance(closure['engine'].rule, GradientTurn)
      yield 'projection_decay' if is_turn else 'l2_sp', closure
    elif home.startswith('optax.'):
      yield name, closure


def _neighbors() -> tuple[list[str], list[str]]:
  """The names of the links before and behind the one whose `init` runs, of all chains around it."""
  before: list[Any] = []
  behind: list[Any] = []
  frame, called = inspect.currentframe(), None
  while frame is not None:
    if frame.f_globals.get('__name__') == optax.chain.__module__:
      found, at = frame.f_locals, 0
      links: tuple[Any, ...] = ()
      called = found.get('fn', called)
      if called in found.get('init_fns', ()):  # of optax.chain
        links = found['init_fns']
        at = links.index(called)
      elif isinstance(found.get('transforms'), list) and 'name' in found:  # of optax.named_chain
        names, links = zip(*found['transforms'], strict=True)
        at = names.index(found['name'])
      if links:
        before += links[:at]
        behind += links[at + 1 :]
        called = None
    frame = frame.f_back
  return [name for name, _ in _parts(*before)], [name for name, _ in _parts(*behind)]


def _changing(names: list[str]) -> list[str]:
  """Those that turn gradients into steps, or change steps."""
  return sorted({name for name in names if name == 'trace' or name.startswith('scale_by_')})


def warn_of_link() -> None:
  """Warns of a `projection_decay` that sees no gradients any more, or is one of two."""
  before, behind = _neighbors()
  if found := _changing(before):
    checks.warn(
      f'projection_decay stands behind {", ".join(found)}, so that it sees steps, not gradients, '
      'and its pull has the wrong sign. Put it first: '
      'optax.chain(spd.projection_decay(), optax.adam(...)).'
    )
  if 'with_projection_decay' in before + behind:
    checks.warn(
      'projection_decay and an optimizer of with_projection_decay (or adam_spd) are links of one '
      'chain, so each layer is held twice. Leave one of them out.'
    )


def warn_of_optimizer(optimizer: Any) -> None:
  """Warns of what `with_projection_decay` is around, and of links around it."""
  parts = list(_parts(optimizer.init, optimizer.update))
  inside = {name for name, _ in parts}
  if 'MultiSteps' in inside:
    checks.warn(
      'with_projection_decay is around optax.MultiSteps, so that its condition sees one '
      'micro-batch, and its step is 0 in most updates. Put MultiSteps outside: '
      'optax.MultiSteps(spd.with_projection_decay(optimizer), k).'
    )
  if twice := sorted(inside & {'projection_decay', 'with_projection_decay'}):
    checks.warn(
      f'with_projection_decay is around a {twice[0]}, so each layer is held twice. Leave one of '
      'them out.'
    )
  if decay := [x for part in parts for x in _weight_decays(part)]:
    checks.warn(
      f'with_projection_decay is around an optimizer with weight decay toward 0 ({decay[0]!r}), '
      'which pulls held layers away from their anchor. SPD replaces it: pass weight_decay=0, or '
      'optax.adam in place of optax.adamw. Only free layers may have it.'
    )
  before, behind = _neighbors()
  if found := _changing(before):
    checks.warn(
      f'with_projection_decay (or adam_spd) stands behind {", ".join(found)}, so that its '
      'condition sees no gradients any more. It belongs around the whole optimizer: '
      'spd.with_projection_decay(optax.chain(...)).'
    )
  if found := _changing(behind):
    checks.warn(
      f'with_projection_decay (or adam_spd) stands before {", ".join(found)}, which changes its '
      'step, so that held layers are not projected any more. It belongs around the whole '
      'optimizer: spd.with_projection_decay(optax.chain(...)).'
    )


def _weight_decays(part: Part) -> list[Any]:
  """Numbers other than 0, and schedules, that a part has as weight decay."""
  name, closure = part
  injected = closure.get('numeric_hps') if name == 'inject_hyperparams' else None
  found = {**closure, **(injected or {})}.get('weight_decay', 0)
  is_number = isinstance(found, int | float | np.number) and found != 0
  return [found] if is_number or callable(found) else []
