"""Warnings that a person can act on, found in the records of a run."""

from collections import deque
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from spd_optax import checks
from spd_optax.audit.format import Header, Record, Run

PATIENCE = 100  # updates
KEPT = 16  # records within so many updates
ALWAYS = 0.99  # the share of layers and updates that counts as all
GROWTH = 1.1  # by how much a distance grows that should not
ROUNDED = 0.01  # how far, relative to the anchor, a narrower anchor_dtype rounds at most
FAR = 0.5  # how far, relative to the anchor, no run goes in its first updates
FIRST = 10  # updates


class AuditWarning(UserWarning):
  """A warning of `AuditLog` about the run that it logs."""


class Advice(NamedTuple):
  """One warning.

  Attributes:
    code: 'never held', 'always held', 'anchor', 'growing' or 'not finite'.
    step: at which it was found.
    message: what was seen, and what to look at.
  """

  code: str
  step: int
  message: str


class Watcher:
  """Looks at record after record, and gives each advice once.

  Args:
    header: of the log: the layers, and what is known of their anchor.
    patience: updates after which to say that something never, or always, happens.
  """

  def __init__(self, header: Header, patience: int = PATIENCE):
    self.layers, self.norms = header.layers, header.norms()
    source, captured = header.anchor.source, header.anchor.captured
    self.expects_start = source is None if captured is None else captured
    self.patience = patience
    self.kept: deque[Record] = deque()  # some 16, however large `patience` is
    self.given: set[str] = set()
    self.first = True

  def see(self, record: Record) -> list[Advice]:
    """What is to be said for the first time after this record."""
    now = age(record)
    while self.kept and age(self.kept[-1]) > now:
      self.kept.pop()  # a resumed run went back
    if not self.kept or now - age(self.kept[-1]) >= max(self.patience // KEPT, 1):
      self.kept.append(record)
    while len(self.kept) > 1 and age(self.kept[1]) <= now - self.patience:
      self.kept.popleft()
    found = [
      Advice(code, record.step, message)
      for code, check in CHECKS.items()
      if code not in self.given and (message := check(self, record))
    ]
    self.given |= {advice.code for advice in found}
    self.first = False
    return found

  def held_since(self, record: Record) -> tuple[Record, np.ndarray] | None:
    """A record at least `patience` updates old, and the share of the updates held since then."""
    base = self.kept[0]
    if age(base) > age(record) - self.patience:
      return None
    updates = record.updates - base.updates
    return base, (record.constrained - base.constrained) / np.maximum(updates, 1)

  def named(self, which: np.ndarray) -> str:
    """'block/kernel, block/bias and 7 more'."""
    names = [self.layers[i] for i in np.flatnonzero(which).tolist()]
    more = f' and {len(names) - 4} more' if len(names) > 4 else ''
    return ', '.join(names[:4]) + more


def age(record: Record) -> int:
  """Updates so far; of several states, of the one with the fewest."""
  return int(record.updates.min()) if len(record.updates) else 0


def never_held(watcher: Watcher, record: Record) -> str | None:
  """No condition was ever true."""
  if age(record) < watcher.patience or record.constrained.any():
    return None
  return (
    f'SPD has not constrained any layer in {age(record)} updates; until it does this run equals '
    'its inner optimizer. That is right while every gradient keeps pointing away from the anchor. '
    'Look at the learning rate (too small to overshoot, or 0 in a warm-up), the momentum (none) '
    'and the noise of the gradients (full batches have none); a margin holds layers earlier.'
  )


def always_held(watcher: Watcher, record: Record) -> str | None:
  """Every condition was true at every update."""
  found = watcher.held_since(record)
  if found is None or not len(record.constrained):
    return None
  base, share = found
  if np.mean(share) < ALWAYS:
    return None
  return (
    f'SPD constrained {100 * np.mean(share):.0f} % of the layers in the last '
    f'{age(record) - age(base)} updates: it is no longer selective, and the model hardly adapts. '
    'Look at the margin (too large), the anchor '
    '(not where training started, so that every gradient points back to it), the sign of the loss, '
    'and the order of the chain (projection_decay belongs before the optimizer).'
  )


def not_at_start(watcher: Watcher, record: Record) -> str | None:
  """A captured anchor is far away right after the capture."""
  updates = int(record.updates.max(initial=0))
  if not (watcher.expects_start and watcher.first and 0 < updates <= FIRST):
    return None
  known = watcher.norms > 0
  if updates == 1:
    moved = known & (record.distance > ROUNDED * watcher.norms)
    far = watcher.named(moved) if moved.any() else None
  else:
    distance, norm = (np.linalg.norm(x[known]) for x in (record.distance, watcher.norms))
    far = f'{distance / norm:.0%} of its norm' if norm > 0 and distance > FAR * norm else None
  if far is None:
    return None
  return (
    f'the anchor is not where training started: after {updates} update(s) the params are away '
    f'from it already ({far}). A captured anchor is the params at the first update of this '
    'optimizer state: load the checkpoint before that update, or pass the anchor; '
    'spd.reanchor(opt_state, params) makes the current params the anchor. If it was passed, and is '
    'meant to be elsewhere, say AuditLog(captured=False).'
  )


def growing(watcher: Watcher, record: Record) -> str | None:
  """Layers that are held all the time go away all the same."""
  found = watcher.held_since(record)
  if found is None:
    return None
  base, share = found
  grown = record.distance > GROWTH * base.distance
  away = (share >= ALWAYS) & grown & (base.distance > 0)
  if not away.any():
    return None
  return (
    f'the distance from the anchor grows although the layer is constrained all the time: '
    f'{watcher.named(away)}. The transform may sit behind the optimizer instead of before it: '
    'optax.chain(spd.projection_decay(), optax.adam(...)), or '
    'spd.with_projection_decay(optax.adam(...)). If it is before it, raise the strength.'
  )


def not_finite(watcher: Watcher, record: Record) -> str | None:
  """NaN or infinity."""
  bad = ~(np.isfinite(record.distance) & np.isfinite(record.ratio))
  metrics = [name for name, value in record.metrics.items() if not np.isfinite(value)]
  found = ([f'layers {watcher.named(bad)}'] if bad.any() else []) + (
    [f'metrics {", ".join(metrics)}'] if metrics else []
  )
  if not found:
    return None
  return (
    f'not finite: {"; ".join(found)}. SPD holds no layer whose gradient is NaN or infinite. Look '
    'at the learning rate, the scale of the loss, and the last step before this one; '
    'optax.apply_if_finite passes over single bad gradients.'
  )


CHECKS: dict[str, Callable[[Watcher, Record], str | None]] = {
  'never held': never_held,
  'always held': always_held,
  'anchor': not_at_start,
  'growing': growing,
  'not finite': not_finite,
}


def advise(run: Run, patience: int = PATIENCE) -> list[Advice]:
  """All that is to be said about a run, in the order in which it was found.

  Raises:
    TypeError: if the run is none that `read` or `verify` returned, or `patience` no integer ≥ 1.
  """
  if not isinstance(run, Run):
    raise TypeError(f'run: expected what audit.read returns, found {checks.kind_of(run)}')
  if not checks.is_count(patience):
    raise TypeError(f'patience: expected an integer of 1 or more, found {checks.kind_of(patience)}')
  watcher = Watcher(run.header, patience)
  return [advice for record in run.records for advice in watcher.see(record)]
