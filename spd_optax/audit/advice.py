"""Warnings that a person can act on, found in the records of a run."""

from typing import Any, NamedTuple

import numpy as np

from spd_optax import reports
from spd_optax.audit.format import Header, Record, Run
from spd_optax.budgets import PRESSING

PATIENCE = 100  # updates
ALWAYS = 0.99  # the share of layers and updates that counts as all
GROWTH = 1.1  # by how much a distance grows that should not
ROUNDED = 0.01  # how far, relative to the anchor, a narrower anchor_dtype rounds at most
FAR = 0.5  # how far, relative to the anchor, no run goes in its first updates
FIRST = 10  # updates

Found = dict[str, dict[str, Any]]  # by code: what the message says


class AuditWarning(UserWarning):
  """A warning of `AuditLog` about the run that it logs."""


class Advice(NamedTuple):
  """One warning: its code, the step at which it was found, and what to check."""

  code: str
  step: int
  message: str


MESSAGES = {
  'never held': 'SPD has not constrained any layer in {updates} updates; until it does this run '
  'equals its inner optimizer. That is right while every gradient keeps pointing away from the '
  'anchor. Look at the learning rate (too small to overshoot, or 0 in a warm-up), the momentum '
  '(none) and the noise of the gradients (full batches have none); a margin holds layers earlier. '
  'A run without SPD is AuditLog(baseline=True).',
  'no drift': 'the budget has seen no drift in {updates} updates, so all layers are free. Pass '
  'drift=… to update; under optax.MultiSteps in every micro-step. It counts where it is finite.',
  'always held': 'SPD constrained {share:.0f} % of the layers in the last {updates} updates: it is '
  'no longer selective, and the model hardly adapts. Look at the margin (too large), the anchor '
  '(not where training started), the sign of the loss, and the order of the chain '
  '(projection_decay belongs before the optimizer).',
  'anchor': 'the anchor is not where training started: after {updates} update(s) the params are '
  'away from it already ({far}). A captured anchor is the params at the first update: load the '
  'checkpoint before that, or pass the anchor; spd.reanchor(opt_state, params) makes the current '
  'params the anchor. If it is meant to be elsewhere, say AuditLog(captured=False).',
  'growing': 'the distance from the anchor grows although the layer is constrained all the time: '
  '{layers}. The transform may sit behind the optimizer instead of before it: '
  'optax.chain(spd.projection_decay(), optax.adam(...)). If it is before it, raise the strength.',
  'budget': 'the budget is so tight that every layer was held in the last {updates} updates '
  '(strength {strength:.3g}), as by a uniform pull. Look at the learning rate (a smaller one '
  'drifts less) and at the budget (too small for the task).',
  'not finite': 'not finite: {what}. Look at the learning rate, the scale of the loss, and the '
  'last step before this one; optax.apply_if_finite passes over single bad gradients.',
}


class Watcher:
  """Looks at record after record of a log, and gives each advice once."""

  def __init__(self, header: Header, patience: int = PATIENCE):
    self.layers, self.norms = header.layers, np.array(header.anchor.norms, float)
    source, captured = header.anchor.source, header.anchor.captured
    self.baseline = header.baseline
    captures = source is None if captured is None else captured
    self.expects_start = captures and not self.baseline
    self.patience = patience
    self.base: Record | None = None  # what the next records are compared with
    self.given: set[str] = set()

  def see(self, record: Record) -> list[Advice]:
    """What is to be said for the first time after this record."""
    found = self._of_start(record) if self.base is None else {}
    silent = not (self.baseline or record.constrained.any())
    if silent and _age(record) >= self.patience:
      measured = _of_budgets(record, 'measured')
      if not measured:
        found['never held'] = {'updates': _age(record)}
      elif not any(measured):  # a budget that is far from spent is no reason to warn
        found['no drift'] = {'updates': _age(record)}
    found |= self._of_numbers(record)
    # At the first update nothing has moved yet; a resumed run goes back.
    if self.base is None or _age(self.base) < 2 or _age(record) < _age(self.base):
      self.base = record
    elif _age(record) >= _age(self.base) + self.patience:
      found |= self._of_held(self.base, record)
      self.base = record
    new = [code for code in MESSAGES if code in found and code not in self.given]
    self.given |= set(new)
    return [Advice(code, record.step, MESSAGES[code].format(**found[code])) for code in new]

  def _named(self, which: np.ndarray) -> str:
    """'block/kernel, block/bias and 7 more'."""
    names = [self.layers[i] for i in np.flatnonzero(which).tolist()]
    return ', '.join(names[:4]) + (f' and {len(names) - 4} more' if len(names) > 4 else '')

  def _of_start(self, record: Record) -> Found:
    """A captured anchor is far away right after the capture."""
    updates, known = int(record.updates.max(initial=0)), self.norms > 0
    if not (self.expects_start and 0 < updates <= FIRST and known.any()):
      return {}
    away = known & (record.distance > ROUNDED * self.norms)
    if updates > 1 and reports.overall(record.distance, self.norms) <= FAR:
      return {}
    return {'anchor': {'updates': updates, 'far': self._named(away)}} if away.any() else {}

  def _of_held(self, base: Record, record: Record) -> Found:
    """Every condition was true at every update; or a layer goes away all the same."""
    found: Found = {}
    held, updates = record.constrained - base.constrained, record.updates - base.updates
    share = reports.constrained_share(held, updates)
    # L2-SP holds all, as it is meant to.
    uniform = base.condition & record.condition & (base.ratio == 1) & (record.ratio == 1)
    tight = [max(_of_budgets(x, 'strength'), default=0) for x in (base, record)]
    if min(tight) > PRESSING and np.mean(share) >= ALWAYS:
      return {'budget': {'updates': _age(record) - _age(base), 'strength': tight[-1]}}
    if not uniform.all() and (mean := np.mean(share[~uniform])) >= ALWAYS:
      found['always held'] = {'share': 100 * mean, 'updates': _age(record) - _age(base)}
    grown = (record.distance > GROWTH * base.distance) & (base.distance > 0)
    away = grown & (share >= ALWAYS) & ~uniform
    return found | ({'growing': {'layers': self._named(away)}} if away.any() else {})

  def _of_numbers(self, record: Record) -> Found:
    """NaN or infinity."""
    bad = ~(np.isfinite(record.distance) & np.isfinite(record.ratio))
    metrics = [name for name, value in record.metrics.items() if not np.isfinite(value)]
    what = [f'layers {self._named(bad)}'] if bad.any() else []
    what += [f'metrics {", ".join(metrics)}'] if metrics else []
    return {'not finite': {'what': '; '.join(what)}} if what else {}


def _of_budgets(record: Record, word: str) -> list[float]:
  """One number of each budget."""
  return [x for name, x in record.metrics.items() if reports.of_budget(name) == word]


def _age(record: Record) -> int:
  """Updates so far; of several states, of the one with the fewest."""
  return int(record.updates.min()) if len(record.updates) else 0


def advise(run: Run, patience: int = PATIENCE) -> list[Advice]:
  """All warnings about a run, in the order in which they were found."""
  watcher = Watcher(run.header, patience)
  return [advice for record in run.records for advice in watcher.see(record)]
