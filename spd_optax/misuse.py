"""Warnings where a transformation stands in a wrong place.

No transformation of optax knows its neighbors. So this looks at what `init` was called from, and at
the functions that an optimizer is made of. What it cannot see, it does not warn of.
"""

import inspect
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import optax

from spd_optax import checks
from spd_optax.rules import GradientTurn

HARMLESS = {'scale_by_learning_rate', 'scale_by_schedule'}  # before a link of a chain


def names_in(*functions: Any) -> Iterator[tuple[str, dict[str, Any]]]:
  """What an optimizer is made of: names like 'scale_by_adam', each with its closure by name."""
  seen, waiting = set(), list(functions)
  while waiting:
    value = waiting.pop()
    if id(value) in seen:
      continue
    seen.add(id(value))
    if isinstance(value, tuple | list | dict):
      waiting += value.values() if isinstance(value, dict) else value
    elif inspect.ismethod(value):
      yield type(value.__self__).__name__, {}
    elif inspect.isfunction(value):
      closure = dict(inspect.getclosurevars(value).nonlocals) if value.__closure__ else {}
      yield value.__qualname__.split('.')[0], closure
      waiting += closure.values()


def _neighbors() -> tuple[list[str], list[str]]:
  """The names of the links before and behind the one whose `init` runs, of all chains around it."""
  before: list[str] = []
  behind: list[str] = []
  frame, called = inspect.currentframe(), None
  while frame is not None:
    if frame.f_globals.get('__name__') == optax.chain.__module__:
      called = frame.f_locals.get('fn', called)
      links = frame.f_locals.get('init_fns', ())
      if called in links:
        at = links.index(called)
        before += _names(links[:at])
        behind += _names(links[at + 1 :])
        called = None
    frame = frame.f_back
  return before, behind


def _names(functions: Iterable[Callable[..., Any]]) -> list[str]:
  return [name for name, _ in names_in(*functions)]


def _optimizers(names: Iterable[str]) -> list[str]:
  """Those that turn gradients into steps of other directions."""
  return sorted({x for x in names if x == 'trace' or x.startswith('scale_by_')} - HARMLESS)


def warn_of_link() -> None:
  """Warns of a `projection_decay` that sees no gradients any more, or is one of two."""
  before, behind = _neighbors()
  if found := _optimizers(before):
    checks.warn(
      f'projection_decay stands behind {", ".join(found)}, so that it sees steps, not gradients, '
      'and its pull has the wrong sign. Put it first: '
      'optax.chain(spd.projection_decay(), optax.adam(...)).'
    )
  if '_Around' in before + behind:
    checks.warn(
      'projection_decay and an optimizer of with_projection_decay (or adam_spd) are links of one '
      'chain, so each layer is held twice. Leave one of them out.'
    )


def warn_of_optimizer(optimizer: Any) -> None:
  """Warns of what `with_projection_decay` is around, and of links around it."""
  parts = list(names_in(optimizer.init, optimizer.update))
  inside = {name for name, _ in parts}
  if 'MultiSteps' in inside:
    checks.warn(
      'with_projection_decay is around optax.MultiSteps, so that its condition sees one '
      'micro-batch, and its step is 0 in most updates. Put MultiSteps outside: '
      'optax.MultiSteps(spd.with_projection_decay(optimizer), k).'
    )
  rules = [closure['engine'].rule for name, closure in parts if name == '_link' and closure]
  if any(isinstance(rule, GradientTurn) for rule in rules):
    checks.warn(
      'with_projection_decay is around a projection_decay, so each layer is held twice. Leave one '
      'of them out.'
    )
  decays = [closure['weight_decay'] for _, closure in parts if 'weight_decay' in closure]
  if decay := [x for x in decays if not checks.is_zero(x)]:
    checks.warn(
      f'with_projection_decay is around an optimizer with weight decay toward 0 ({decay[0]!r}), '
      'which pulls away from the anchor. SPD replaces it: pass weight_decay=0, or optax.adam in '
      'place of optax.adamw.'
    )
  before, behind = _neighbors()
  if found := _optimizers(before):
    checks.warn(
      f'with_projection_decay (or adam_spd) stands behind {", ".join(found)}, so that its '
      'condition sees no gradients any more. It belongs around the whole optimizer: '
      'spd.with_projection_decay(optax.chain(...)).'
    )
  if found := sorted({x for x in behind if x == 'trace' or x.startswith('scale_by_')}):
    checks.warn(
      f'with_projection_decay (or adam_spd) stands before {", ".join(found)}, which changes its '
      'step, so that held layers are not projected any more. It belongs around the whole '
      'optimizer: spd.with_projection_decay(optax.chain(...)).'
    )
