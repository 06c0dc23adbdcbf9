"""Warnings where a transformation stands in a wrong place.

No transformation of optax knows its neighbors. So this looks at what `init` or `update` was called
from, and at the functions that an optimizer is made of. A link without state, such as a constant
learning rate, shows itself in `update` alone. It warns of nothing that it cannot see.
"""

import contextlib
import inspect
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import Any

import jax
import numpy as np
import optax

from spd_optax import checks
from spd_optax.rules import L2SP, GradientTurn, Rule

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


def frames(module: str) -> Iterator[FrameType]:
  """The functions of a module that called this one, from the inside out."""
  frame = inspect.currentframe()
  while (frame := frame and frame.f_back) is not None:
    if frame.f_globals.get('__name__') == module:
      yield frame


def _neighbors() -> tuple[list[Part], list[Part]]:
  """The parts before and behind the link whose function runs, of all chains around it."""
  before: list[Any] = []
  behind: list[Any] = []
  called = None
  for frame in frames(optax.chain.__module__):
    found, at = frame.f_locals, 0
    links: tuple[Any, ...] = ()
    called = found.get('fn', called)
    own = found.get('init_fns', found.get('update_fns', ()))
    if called in own:  # of optax.chain
      links, at = own, own.index(called)
    elif isinstance(found.get('transforms'), list) and 'name' in found:  # of optax.named_chain
      names, links = zip(*found['transforms'], strict=True)
      at = names.index(found['name'])
    if links:
      apart = _is_masked(links[at])  # two masked links may see different leaves
      before += [x for x in links[:at] if not (apart and _is_masked(x))]
      behind += [x for x in links[at + 1 :] if not (apart and _is_masked(x))]
      called = None
  return list(_parts(*before)), list(_parts(*behind))


def _is_masked(link: Any) -> bool:
  """Whether a link, or its function, is of `optax.masked`."""
  function = getattr(link, 'init', link)
  return getattr(function, '__qualname__', '').startswith('masked.<locals>')


def _changing(parts: Sequence[Part]) -> list[str]:
  """The names of those that turn gradients into steps, or change steps."""
  names = {name for name, _ in parts if name == 'trace' or name.startswith('scale_by_')}
  return sorted(names | ({'a learning rate'} if any(map(_is_negative_scale, parts)) else set()))


def _is_negative_scale(part: Part) -> bool:
  """Whether a part is what optax makes of a constant learning rate; −1 may turn a reward around."""
  name, closure = part
  size = closure.get('step_size')
  if name != 'scale' or not isinstance(size, int | float | np.number):
    return False
  return bool(size < 0 and size != -1)


class LinkCheck:
  """Warns of a link in a wrong place at each `init`, and in `update` if nothing was said before."""

  def __init__(self, rule: Rule):
    self.rule, self.has_warned, self.has_run = rule, False, False

  def at_init(self) -> None:
    """Looks at the links that have a state."""
    self.has_warned = self._warn() or self.has_warned

  def at_update(self, gradients: optax.Updates) -> None:
    """Looks at all links, at trace time or in the first step."""
    tracing = any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(gradients))
    if not self.has_warned and (tracing or not self.has_run):
      self.has_warned, self.has_run = self._warn(), True

  def _warn(self) -> bool:
    if isinstance(self.rule, GradientTurn):
      return _warn_of_turn()
    return _warn_of_pull('l2_sp' if isinstance(self.rule, L2SP) else 'projection_decay')


def _warn_of_pull(name: str) -> bool:
  """Warns of a link behind the learning rate, where its pull has the wrong sign."""
  before, _ = _neighbors()
  rates = [p for p in before if p[0] == 'scale_by_learning_rate' or _is_negative_scale(p)]
  if rates:
    checks.warn(
      f'{name} stands behind a learning rate, so that its pull has the wrong sign and drives the '
      f'params away from the anchor. Put it first: optax.chain(spd.{name}(), optax.adam(...)); or, '
      'decoupled, between optax.scale_by_adam() and optax.scale_by_learning_rate(...).'
    )
  return bool(rates)


def _warn_of_turn() -> bool:
  """Warns of a `projection_decay` that sees no gradients any more, or is one of two."""
  before, behind = _neighbors()
  found = _changing(before)
  if found:
    checks.warn(
      f'projection_decay stands behind {", ".join(found)}, so that it sees steps, not gradients, '
      'and its pull has the wrong sign. Put it first: '
      'optax.chain(spd.projection_decay(), optax.adam(...)).'
    )
  twice = any(name == 'with_projection_decay' for name, _ in before + behind)
  if twice:
    checks.warn(
      'projection_decay and an optimizer of with_projection_decay (or adam_spd) are links of one '
      'chain, so each layer is held twice. Leave one of them out.'
    )
  return bool(found or twice)


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
  if any(frames(optax.contrib.schedule_free.__module__)):
    checks.warn(
      'with_projection_decay (or adam_spd) is inside optax.contrib.schedule_free, which adds its '
      'step to other weights than the params, so that held layers may move away. Put it around: '
      'spd.with_projection_decay(optax.contrib.schedule_free(...)).'
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
