"""The tables of a report, as rows of strings for a terminal or a page."""

import json
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from spd_optax import reports
from spd_optax.audit import series as over_time
from spd_optax.audit.lines import Fields
from spd_optax.audit.reading import Run
from spd_optax.audit.series import Series


class Table(NamedTuple):
  """A title, a header, and rows of as many cells."""

  title: str
  header: list[str]
  rows: list[list[str]]


def facts(run: Run) -> Table:
  """What the header says, and how much was logged."""
  header, records = run.header, run.records
  anchor = header['anchor']
  steps = f'{records[0].step} to {records[-1].step}' if records else 'none'
  resumed = [str(record.step) for record in records if record.resumed]
  rows = [
    ['transform', header['transform']],
    ['hyperparameters', json.dumps(header['hyperparameters'], ensure_ascii=False)[1:-1] or '–'],
    ['anchor', _anchor(anchor, run.norms)],
    ['its source', 'not named' if anchor['source'] is None else anchor['source']],
    ['fingerprint', anchor['fingerprint']],
    ['started', header['started']],
    ['versions', ', '.join(f'{name} {v}' for name, v in header['versions'].items())],
    ['records', f'{len(records)}, steps {steps}'],
    ['layers', str(len(run.layers))],
    ['last hash', run.hash],
  ]
  rows += [['resumed at step', ', '.join(resumed)]] if resumed else []
  rows += [['torn', torn(run)]] if run.torn else []
  return Table(run.path.name, ['', ''], [[printable(cell) for cell in row] for row in rows])


def _anchor(anchor: Fields, norms: np.ndarray) -> str:
  """Where the anchor is, by what the user said and the norms show."""
  said = {True: 'captured: the params at the first update', False: 'passed', None: ''}
  zero = np.count_nonzero(norms == 0)
  parts = [
    said[anchor['captured']],
    '' if not zero else 'zero' if zero == len(norms) else f'zero in {zero} of {len(norms)} layers',
    'moving' if anchor['moving'] else '',
  ]
  return '; '.join(filter(None, parts)) or 'not said whether captured or passed'


def torn(run: Run) -> str:
  """What to say about a torn last line."""
  return (
    f'the last line is torn ({run.torn} bytes): its writer was killed, or is writing now; all '
    f'{len(run.records)} whole records are here'
  )


def layers(series: Series, most: int | None = None) -> Table:
  """A row per layer; where there are more than `most`, those that were held most."""
  share, far = over_time.shares(series), _last(over_time.relative(series))
  chosen = _most_held(share, most)
  rows = [
    [
      printable(series.layers[i]),
      'yes' if series.held[i] else '',
      f'{100 * share[i]:.1f}',
      f'{series.ratio[i]:.3g}',
      f'{_last(series.distance)[i]:.4g}',
      _percent(far[i]),
    ]
    for i in chosen
  ]
  header = ['layer', 'held now', 'held, %', 'ratio', 'distance', '% of ‖θ₀‖']
  title = 'Layers' if len(rows) == len(share) else 'Layers held most'
  return Table(_title(title, chosen, len(share)), header, rows)


def blocks(series: Series, most: int) -> Table:
  """A row per block of layers, where there are more than `most` of them; else none."""
  share, distance = over_time.shares(series), _last(series.distance)
  rows = []
  for name, begin, end in over_time.blocks(series.layers, most):
    part = slice(begin, end)
    rows.append(
      [
        printable(name),
        str(end - begin),
        f'{100 * np.mean(series.held[part]):.1f}',
        f'{100 * np.mean(share[part]):.1f}',
        _number(float(np.linalg.norm(distance[part]))),
        _percent(float(reports.overall(distance[part], series.norms[part]))),
      ]
    )
  header = ['block', 'layers', 'held now, %', 'held, %', 'distance', '% of ‖θ₀‖']
  return Table('Blocks of layers', header, rows if len(rows) < len(series.layers) else [])


def compared(a: Series, b: Series, most: int | None = None) -> Table:
  """A row per layer of either run; where there are more than `most`, those that differ most."""
  names = list(dict.fromkeys([*a.layers, *b.layers]))
  columns = [_by_name(series) for series in (a, b)]
  held = [np.array([column.get(name, _NOTHING)[0] for name in names]) for column in columns]
  chosen = _most_held(np.abs(np.nan_to_num(held[0]) - np.nan_to_num(held[1])), most)
  rows = [
    [
      printable(names[i]),
      *(
        cell(column.get(names[i], _NOTHING)[field])
        for field, cell in enumerate((_percent, _number, _percent))
        for column in columns
      ),
    ]
    for i in chosen
  ]
  fields = ('held, %', 'distance', '% of ‖θ₀‖')
  header = ['layer', *(cell for field in fields for cell in (f'{field}: A', 'B'))]
  title = 'Layers' if len(chosen) == len(names) else 'Layers that differ most'
  title += f', {printable(a.name)} and {printable(b.name)}'
  return Table(_title(title, chosen, len(names)), header, rows)


_NOTHING = (np.nan, np.nan, np.nan)


def _by_name(series: Series) -> dict[str, tuple[float, float, float]]:
  """Share held, distance and relative distance of each layer at the last record."""
  columns = over_time.shares(series), _last(series.distance), _last(over_time.relative(series))
  return dict(zip(series.layers, zip(*(c.tolist() for c in columns), strict=True), strict=True))


def metrics(runs: Sequence[Series]) -> Table:
  """A row per metric and run: its first, last, smallest and largest value."""
  names = dict.fromkeys(name for series in runs for name in series.metrics)
  rows = []
  for name in names:
    for series in runs:
      if name in series.metrics:
        values = series.metrics[name][1]
        finite = values[np.isfinite(values)]
        ends = (finite.min(), finite.max()) if len(finite) else (np.nan, np.nan)
        cells = [_number(x) for x in (values[0], values[-1], *ends)]
        rows.append([printable(name), printable(series.name), *cells])
  return Table('Metrics', ['metric', 'run', 'first', 'last', 'smallest', 'largest'], rows)


def _last(values: np.ndarray) -> np.ndarray:
  return values[-1] if len(values) else np.full(values.shape[1:], np.nan)


def _most_held(share: np.ndarray, most: int | None) -> list[int]:
  if most is None or len(share) <= most:
    return list(range(len(share)))
  chosen: list[int] = np.argsort(-share, kind='stable')[:most].tolist()
  return chosen


def _title(title: str, chosen: Sequence[int], count: int) -> str:
  return title if len(chosen) == count else f'{title} ({len(chosen)} of {count}; --all: all)'


def _number(value: float) -> str:
  return '–' if np.isnan(value) else f'{value:.4g}'


def _percent(value: float) -> str:
  return '–' if np.isnan(value) else f'{100 * value:.1f}'


def printable(text: str) -> str:
  """The text without characters that could steer a terminal."""
  return ''.join(c if c.isprintable() else '\N{REPLACEMENT CHARACTER}' for c in str(text))


def printable_lines(text: str) -> str:
  """The same for a message of several lines."""
  return '\n'.join(map(printable, text.split('\n')))
