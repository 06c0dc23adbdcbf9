"""A report of one run, or of two side by side: in the terminal, and as a page with pictures."""

import base64
import html
import io
import json
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import rich.box
import rich.table
from rich.console import Console

from spd_optax import reports
from spd_optax.audit.advice import advise
from spd_optax.audit.format import AuditFileError, Run, printable, torn

ROWS = 40  # layers that are shown one by one in the terminal
FIRST = 20  # that are shown if there are more
WIDTH, PAGE_WIDTH = 120, 200  # of what is no terminal
WORDS = {
  'held': 'the rule was true, so the layer was taken back; "held, %" is the share of its updates',
  'ratio': 'around an optimizer: the part of the distance by which the last step grew; in a chain: '
  'the pull, relative to the gradient',
  'distance': '‖θ − θ₀‖, from the anchor θ₀, before the last update',
  '% of ‖θ₀‖': "the distance relative to the anchor's norm; – where that is 0 or not known",
  'slope, slope_square': 'of SignificantProjection: means of ⟨g, d⟩ / ‖d‖ and its square',
  'budget, drift': 'what may be lost, and what was measured; "measured": how often',
  'strength': 'λ as the budget set it; 0 leaves all layers free, above 10 none is',
}
PAGE = """<!doctype html>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>SPD audit</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
body { font-family: sans-serif; max-width: 75em; margin: 1em auto; padding: 0 1em }
img { max-width: 100% }
pre { overflow-x: auto }
</style>
"""
TEXT = '<pre>{code}</pre>\n'
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
    self.baseline = run.header.baseline
    self.states = run.header.states  # layers in each
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


def facts_table(run: Run) -> Table:
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
    'earlier runs': _earlier(run),
    'torn': torn(run) if run.torn else '',
  } | _verdicts(Series(run))
  return _table(run.path.name, ['', ''], [row for row in rows.items() if row[1]])


def _earlier(run: Run) -> str:
  """What is said of runs that were begun again in the same file."""
  records = run.records
  starts = [i for i, x in enumerate(records) if x.resumed and x.step <= records[0].step]
  return (
    f'{starts[-1]} records before the last start at the first step, not shown' if starts else ''
  )


class BudgetCurves(NamedTuple):
  """What a run logged of one budget, at these steps, and the layers whose strength it set."""

  steps: np.ndarray
  budget: np.ndarray
  drift: np.ndarray
  strength: np.ndarray
  measured: np.ndarray
  layers: slice


def _budgets(series: Series) -> dict[str, BudgetCurves]:
  """The budgets of a run, by what their names begin with: '' or 'state_0/'."""
  ends = np.cumsum(series.states)
  found = {}
  for name in series.metrics:
    match = reports.OWN.fullmatch(name)
    if match and match[2] == 'budget':
      start, of = name.removesuffix('budget'), match[1]
      if not {start + each for each in reports.OF_BUDGET} <= set(series.metrics):
        continue  # a metric of the user's own
      budget, drift, strength, measured = (series.metrics[start + x] for x in reports.OF_BUDGET)
      at = int(of[len('state_') : -1]) if of else 0
      layers = slice(ends[at] - series.states[at], ends[at]) if of else slice(None)
      found[of or ''] = BudgetCurves(*budget, drift[1], strength[1], measured[1], layers)
  return found


def _verdicts(series: Series) -> dict[str, str]:
  """Whether each budget was kept, when it bound, and what it cost, in words."""
  return {f'{of}budget': _of_budget(series, x) for of, x in _budgets(series).items()}


def _of_budget(series: Series, curves: BudgetCurves) -> str:
  steps, budget, drift, strength, measured, layers = curves
  share, bound = drift / budget, strength > 0
  if not measured.any():
    return f'{budget[-1]:.3g}, but no drift was measured, so all layers were free'
  kept = 'kept' if share[-1] <= 1 else 'kept within 10 %' if share[-1] <= 1.1 else 'not kept'
  text = f'{kept}: the last drift is {drift[-1]:.3g}, {100 * share[-1]:.0f} % of {budget[-1]:.3g}'
  if over := np.count_nonzero(share > 1):
    text += f'; above it in {over} of {len(steps)} records, at most {np.nanmax(share):.2g} times'
  if bound.any():
    text += (
      f'. It bound from step {steps[bound][0]} on, in {100 * bound.mean():.0f} % of the records'
    )
  elif series.last.constrained[layers].any():
    text += '. It bound between records only'
  else:
    return text + '. It never bound, and cost nothing: all layers were free'
  return (
    f'{text}. Cost: strength {strength[-1]:.3g} at the end, {strength.max():.3g} at most; layers '
    f'held in {100 * series.share[layers].mean():.0f} % of the updates'
  )


def verdict(series: Series) -> str:
  """What SPD did in a run, in words."""
  last, share = series.last, 100 * series.share
  updates = int(last.updates.max(initial=0))
  if series.baseline:
    text = f'A run of {updates} updates without SPD.'
  elif not last.constrained.any():
    text = f"No layer was held in {updates} updates: this run equals its inner optimizer's. "
    if _budgets(series):
      text += 'The budget left all layers free.'
    elif not last.distance.any():
      text += 'The params have not left their anchor; is the learning rate 0, as in a warm-up?'
    else:
      text += (
        'Every gradient pointed away from the anchor, as happens without momentum, with full '
        'batches and at small learning rates. A margin holds layers earlier.'
      )
  elif share.min() > 99:
    text = f'Every layer was held in each of {updates} updates, as by a uniform pull.'
  else:
    few, most = (series.layers[i] for i in (share.argmin(), share.argmax()))
    text = (
      f'Layers were held in {share.mean():.0f} % of {updates} updates: from {share.min():.0f} % '
      f'({few}) to {share.max():.0f} % ({most}).'
    )
  far = 100 * reports.overall(last.distance, series.norms)
  if np.isfinite(far):
    text += f" In the end the params are {far:.3g} % of the anchor's norm away from it."
  budgets = [f' {name.capitalize()} {words}.' for name, words in _verdicts(series).items()]
  return printable(text + ''.join(budgets))


def layers_table(runs: Sequence[Series], most: int | None = None) -> Table:
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


def metrics_table(runs: Sequence[Series]) -> Table:
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


def show(
  runs: Sequence[Run], out: Path | None, page: Path | None, every: bool, patience: int
) -> None:
  """Prints the tables of one or two runs, and writes the pictures; see `__main__`."""
  empty = [str(run.path) for run in runs if not (run.records and run.layers)]
  if empty:
    raise AuditFileError(f'no records yet, or no layers: {", ".join(empty)}')
  starts = ['A: ', 'B: '] if len(runs) > 1 else ['']
  named = list(zip(starts, runs, strict=True))
  series = [Series(run, start + run.path.stem) for start, run in named]
  advice = [
    f'{start}step {found.step}: {printable(found.message)}'
    for start, run in named
    for found in advise(run, patience)
  ]
  facts = [facts_table(run) for run in runs]
  verdicts = [start + verdict(one) for start, one in zip(starts, series, strict=True)]
  out = out or runs[0].path.parent / ('_'.join(run.path.stem for run in runs) + '_report')
  drawn = {out / f'{name}.png': figure for name, figure in _pictures(series).items()}
  # All files first: a reader of the text may close the pipe, as `head` does.
  for path, figure in drawn.items():
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
  if page:
    tables = _tables(series, every=True)
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(_page(verdicts, facts, advice, list(drawn), tables), 'utf-8')
  print('\n'.join(verdicts))
  known = sys.stdout.isatty() or 'COLUMNS' in os.environ
  _print(_console(None if known else WIDTH), [*facts, *_tables(series, every)], advice)
  if drawn:
    print(f'Pictures: {", ".join(map(str, drawn))}')
  if page:
    print(f'Page: {page}')


def _pictures(series: Sequence[Series]) -> dict[str, Any]:
  """Every picture by its name; none without matplotlib."""
  try:
    from spd_optax.audit import pictures
  except ImportError as error:
    print(f"no pictures, which need {error.name}: pip install 'spd_optax[audit]'", file=sys.stderr)
    return {}
  return pictures.draw(series)


def _page(
  verdicts: Sequence[str],
  facts: Sequence[Table],
  advice: Sequence[str],
  images: Sequence[Path],
  shown: Sequence[Table],
) -> str:
  console = _console(PAGE_WIDTH, file=io.StringIO(), record=True)

  def exported(tables: Sequence[Table], advice: Sequence[str] = ()) -> str:
    _print(console, tables, advice)
    return console.export_html(code_format=TEXT, inline_styles=True)

  page = PAGE + '<h1>SPD audit</h1>\n'
  page += ''.join(f'<p><strong>{html.escape(text)}</strong></p>\n' for text in verdicts)
  page += exported([], advice) if advice else ''
  page += '<h2>Pictures</h2>\n' if images else ''
  for path in images:
    data = base64.b64encode(path.read_bytes()).decode()
    page += f'<p><img alt="{path.stem}" src="data:image/png;base64,{data}"></p>\n'
  page += f'<h2>Numbers</h2>\n{exported(shown)}<h2>Words</h2>\n<dl>\n'
  page += ''.join(f'<dt>{html.escape(x)}</dt><dd>{html.escape(WORDS[x])}</dd>\n' for x in WORDS)
  return f'{page}</dl>\n<h2>The run</h2>\n{exported(facts)}'


def _tables(runs: Sequence[Series], every: bool) -> list[Table]:
  """The metrics; then every layer, or of many layers the first of them."""
  most = None if every or len(runs[0].layers) <= ROWS else FIRST
  return [metrics_table(runs), layers_table(runs, most)]


def _console(width: int | None, **options: Any) -> Console:
  return Console(width=width, markup=False, emoji=False, highlight=False, **options)


def _print(console: Console, shown: Sequence[Table], advice: Sequence[str]) -> None:
  for title, header, rows in shown:
    table = rich.table.Table(title=title, title_justify='left', box=rich.box.SIMPLE_HEAD)
    table.show_header = any(header)
    for i, column in enumerate(header):
      number = i > 0 and table.show_header
      justify: Any = 'right' if number else 'left'
      table.add_column(column, justify=justify, no_wrap=number, overflow='fold')
    for row in rows:
      table.add_row(*row)
    if rows:
      console.print(table)
  for message in advice:
    console.print(f'WARNING: {message}', style='bold yellow')
