"""A run over time, and the tables of a report as rows of strings."""

import json
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from spd_optax import reports
from spd_optax.audit.format import Run

POINTS = 240  # of a run in pictures
Curve = tuple[np.ndarray, np.ndarray]  # steps, values


class Series:
  """The records of a run over time, without those that it went through again.

  Of more than `most` records evenly as many, with the first and the last; metrics have them all.
  `distance` and `relative` are arrays [T, L], `share` and `norms` [L]. `edges` int[n + 1] are the
  steps between which a layer was held at a `held` share of the updates, float[n, L]. It is NaN if
  the updates do not increase: between two of `optax.MultiSteps`, or where a run went on with a new
  state.
  """

  def __init__(self, run: Run, name: str = '', most: int = POINTS):
    records = run.current()
    at = np.linspace(0, len(records) - 1, min(len(records), most)).round().astype(int)
    shown = [records[i] for i in np.unique(at)]
    self.name = name or run.path.stem
    self.layers, self.norms, self.last = run.layers, run.norms, records[-1]
    self.step = np.array([record.step for record in shown])
    self.distance = np.array([record.distance for record in shown])
    self.relative = reports.relative(self.distance, self.norms)
    self.share = reports.constrained_share(self.last.constrained, self.last.updates)
    self.edges, self.held = self.step, self.share[None]
    if len(shown) == 1:
      self.edges = self.step - np.array([1, 0])
    else:
      updates = np.diff([record.updates for record in shown], axis=0)
      held = np.diff([record.constrained for record in shown], axis=0)
      self.held = np.where(updates > 0, held, np.nan) / np.maximum(updates, 1)
    self.metrics: dict[str, Curve] = {}
    for metric in dict.fromkeys(name for record in records for name in record.metrics):
      found = [(x.step, x.metrics[metric]) for x in records if metric in x.metrics]
      self.metrics[metric] = np.array([x for x, _ in found]), np.array([x for _, x in found])


class Table(NamedTuple):
  """A title, a header, and rows of as many cells."""

  title: str
  header: list[str]
  rows: list[list[str]]


def _table(title: str, header: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
  """A table without characters that could steer a terminal."""
  return Table(printable(title), [*map(printable, header)], [[*map(printable, x)] for x in rows])


def printable(text: str) -> str:
  """The text without characters that could steer a terminal."""
  return ''.join(c if c.isprintable() else '\N{REPLACEMENT CHARACTER}' for c in text)


def facts(run: Run) -> Table:
  """What the header says, and how much was logged."""
  header, records = run.header, run.records
  said = {True: 'captured: the params at the first update', False: 'passed', None: 'not said'}
  zero = np.count_nonzero(run.norms == 0)
  rows = {
    'transform': header.transform,
    'hyperparameters': json.dumps(header.hyperparameters, ensure_ascii=False)[1:-1] or '–',
    'anchor': said[header.anchor.captured],
    'its source': header.anchor.source or 'not named',
    'anchor is zero': f'in {zero} of {len(run.layers)} layers' if zero else '',
    'anchor moves': 'yes' if header.anchor.moving else '',
    'fingerprint': header.anchor.fingerprint,
    'started': header.started,
    'versions': ', '.join(f'{name} {version}' for name, version in header.versions.items()),
    'records': f'{len(records)}, steps {records[0].step} to {records[-1].step}',
    'layers': str(len(run.layers)),
    'last hash': run.hash,
    'resumed at step': ', '.join(str(x.step) for x in records if x.resumed),
    'torn': torn(run) if run.torn else '',
  }
  return _table(run.path.name, ['', ''], [row for row in rows.items() if row[1]])


def torn(run: Run) -> str:
  """What to say about a torn last line."""
  return (
    f'the last line is torn ({run.torn} bytes): its writer was killed, or is writing now; all '
    f'{len(run.records)} whole records are here'
  )


def layers(runs: Sequence[Series], most: int | None = None) -> Table:
  """A row per layer of one run, or of two side by side; of more than `most`, the first of them.

  The first are those that were held most, or that differ most.
  """
  names = list(dict.fromkeys(name for series in runs for name in series.layers))
  title = 'Layers'
  if most is not None and len(names) > most:
    how = 'held most' if len(runs) == 1 else 'that differ most'
    title = f'Layers {how} ({most} of {len(names)}; --all: all)'
    shares = [dict(zip(series.layers, series.share, strict=True)) for series in runs]
    first, second = [*shares, {}][:2]
    names = sorted(names, key=lambda x: -abs(first.get(x, 0) - second.get(x, 0)))[:most]
  cells: list[dict[str, dict[str, str]]] = [
    {name: _cells(series, i) for i, name in enumerate(series.layers)} for series in runs
  ]
  keys = list(dict.fromkeys(key for by_name in cells for row in by_name.values() for key in row))
  rows = [[x, *(c.get(x, {}).get(key, '–') for key in keys for c in cells)] for x in names]
  if len(runs) > 1:
    title += ', ' + ' and '.join(series.name for series in runs)
    keys = [cell for key in keys for cell in (f'{key}: A', 'B')]
  return _table(title, ['layer', *keys], rows)


def _cells(series: Series, i: int) -> dict[str, str]:
  """The cells of a layer, by the header of their column."""
  last = series.last
  return {
    'held now': 'yes' if last.condition[i] else '',
    'held, %': _number(100 * series.share[i], '.1f'),
    'ratio': _number(last.ratio[i]),
    'distance': _number(last.distance[i]),
    '% of ‖θ₀‖': _number(100 * reports.relative(last.distance[i], series.norms[i]), '.1f'),
    **{name: _number(values[i]) for name, values in last.rule_state.items()},
  }


def metrics(runs: Sequence[Series]) -> Table:
  """A row per metric and run: its first, last, smallest and largest value."""
  rows = []
  for name in dict.fromkeys(name for series in runs for name in series.metrics):
    for series in runs:
      if name in series.metrics:
        values = series.metrics[name][1]
        finite = values[np.isfinite(values)] if np.isfinite(values).any() else [np.nan]
        shown = (values[0], values[-1], min(finite), max(finite))
        rows.append([name, series.name, *map(_number, shown)])
  return _table('Metrics', ['metric', 'run', 'first', 'last', 'smallest', 'largest'], rows)


def _number(value: Any, form: str = '.4g') -> str:
  return '–' if np.isnan(value) else format(value, form)
