"""A report of one run, or of two side by side: in the terminal, as pictures, and as a page."""

import base64
import io
import json
import math
import os
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import rich.box
import rich.table
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console

from spd_optax import reports
from spd_optax.audit.advice import advise
from spd_optax.audit.format import AuditFileError, Run, printable, torn

ROWS = 40  # layers that are shown one by one in the terminal
FIRST = 20  # that are shown if there are more
WIDTH, PAGE_WIDTH = 120, 200  # of what is no terminal
PAGE = """<!doctype html>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>SPD audit</title>
<style>img { max-width: 100% }</style>
"""
TEXT = '<pre>{code}</pre>\n'
LABELS = 48  # layers' names along an axis
CURVES = 10  # layers with a curve of their own color
SMALLEST = 1e-4  # distance shown, relative to the largest
POINTS = 240  # of a run in pictures
OWN = re.compile(r'spd/(state_\d+/)?budget')  # what the log itself calls a metric
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
    'torn': torn(run) if run.torn else '',
  } | _verdicts(Series(run))
  return _table(run.path.name, ['', ''], [row for row in rows.items() if row[1]])


def _budgets(series: Series) -> dict[str, list[np.ndarray]]:
  """For each budget of a run what its names begin with, and [steps, budget, drift, strength]."""
  starts = [name.removesuffix('budget') for name in series.metrics if OWN.fullmatch(name)]
  return {
    start: [
      series.metrics[f'{start}budget'][0],
      *(series.metrics[start + name][1] for name in ('budget', 'drift', 'strength')),
    ]
    for start in starts
  }


def _verdicts(series: Series) -> dict[str, str]:
  """Whether each budget was kept, when it bound, and what it cost, in words."""
  found = {}
  for start, (steps, budget, drift, strength) in _budgets(series).items():
    share, at_work = drift / budget, np.flatnonzero(strength > 0)
    last = share[-1]
    kept = 'kept' if last <= 1 else 'kept within 10 %' if last <= 1.1 else 'not kept'
    text = f'{kept}: the last drift is {drift[-1]:.3g}, {100 * last:.0f} % of {budget[-1]:.3g}'
    text = text if np.isfinite(last) else f'{budget[-1]:.3g}, but no drift was measured'
    if over := np.count_nonzero(share > 1):
      text += f'; above it in {over} of {len(steps)} records, at most {np.nanmax(share):.2g} times'
    if len(at_work):
      often, most = 100 * len(at_work) / len(steps), np.max(strength)
      text += f'. It bound from step {steps[at_work[0]]} on, in {often:.0f} % of the records'
      text += f'. Cost: strength {strength[-1]:.3g} at the end, {most:.3g} at most; layers held in '
      text += f'{100 * np.mean(series.share):.0f} % of the updates'
    else:
      text += '. It never bound, and cost nothing: in each record all layers were free'
    found[f'{start}budget'.removeprefix('spd/')] = text
  return found


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
  runs: Sequence[Run], out: Path | None, html: Path | None, every: bool, patience: int
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
  known = sys.stdout.isatty() or 'COLUMNS' in os.environ
  _print(_console(None if known else WIDTH), [*facts, *_tables(series, every)], advice)
  out = out or runs[0].path.parent / ('_'.join(run.path.stem for run in runs) + '_report')
  out.mkdir(parents=True, exist_ok=True)
  drawn = {out / f'{name}.png': figure for name, figure in draw(series).items()}
  for path, figure in drawn.items():
    figure.savefig(path)
  print(f'Pictures: {", ".join(map(str, drawn))}')
  if html:
    html.write_text(_page(facts, advice, list(drawn), _tables(series, every=True)), 'utf-8')
    print(f'Page: {html}')


def _page(
  facts: Sequence[Table], advice: Sequence[str], images: Sequence[Path], shown: Sequence[Table]
) -> str:
  console = _console(PAGE_WIDTH, file=io.StringIO(), record=True)
  _print(console, facts, advice)
  page = PAGE + console.export_html(code_format=TEXT, inline_styles=True)
  for path in images:
    data = base64.b64encode(path.read_bytes()).decode()
    page += f'<p><img alt="{path.stem}" src="data:image/png;base64,{data}"></p>\n'
  _print(console, shown, [])
  return page + console.export_html(code_format=TEXT, inline_styles=True)


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


# The pictures: what was held, distances, and metrics.


def draw(runs: Sequence[Series]) -> dict[str, Figure]:
  """Every picture by its name; the relative distances only if a norm is known."""
  found = {'held': held(runs), 'distance': distances(runs, relative=False)}
  if any(np.isfinite(series.relative).any() for series in runs):
    found['relative_distance'] = distances(runs, relative=True)
  return found | {'metrics': metrics(runs)}


def _figure(rows: int, columns: int, size: Any, **options: Any) -> tuple[Figure, Any]:
  """A figure, and a grid of its panels."""
  figure = Figure(figsize=size, dpi=120, layout='constrained')
  return figure, figure.subplots(rows, columns, squeeze=False, **options)


def held(runs: Sequence[Series]) -> Figure:
  """A heat map of layers × time: the share of the updates with a true condition."""
  height = 1.7 + 0.22 * max(len(series.layers) for series in runs)
  figure, ((*panels,),) = _figure(1, len(runs), (8 + 2 * len(runs), min(height, 12)))
  for axes, series in zip(panels, runs, strict=True):
    rows = np.arange(len(series.layers) + 1)
    image = axes.pcolormesh(series.edges, rows, series.held.T, vmin=0, vmax=1, rasterized=True)
    axes.set_facecolor('0.85')  # where a layer had no update
    axes.invert_yaxis()
    _name_layers(axes, series.layers)
    axes.set(xlabel='step', title=f'{_text(series.name)}: updates held')
  figure.colorbar(image, ax=panels[-1], label='share of the updates held', fraction=0.05)
  return figure


def _name_layers(axes: Axes, layers: Sequence[str]) -> None:
  """Names the layers left of the axes; of many as many as there is room for."""
  at = range(0, len(layers), math.ceil(len(layers) / LABELS))
  axes.set_yticks([i + 0.5 for i in at], [_text(layers[i]) for i in at], fontsize=7)
  axes.tick_params(axis='y', length=0)


def _text(name: str) -> str:
  """A name as it is, but the end of a long one; no part of it is taken for mathematics."""
  shown = printable(name)
  shown = shown if len(shown) <= 44 else '…' + shown[-43:]
  return shown.replace('$', r'\$')


def distances(runs: Sequence[Series], relative: bool) -> Figure:
  """Curves of each layer over time; relative to the anchor, or on a logarithmic axis."""
  figure, grid = _figure(len(runs), 1, (10, 5.5 * len(runs)), sharex=True, sharey=True)
  for axes, series in zip(grid[:, 0], runs, strict=True):
    values = 100 * series.relative if relative else series.distance
    shown = np.where(np.isfinite(values) & (relative | (values > 0)), values, np.nan)
    _layer_curves(axes, series, shown)
    label = '‖θ − θ₀‖ / ‖θ₀‖, %' if relative else '‖θ − θ₀‖'
    axes.set(xlabel='step', ylabel=label, title=f'{_text(series.name)}: distance of each layer')
    axes.grid(alpha=0.3)
  largest = max(axes.dataLim.y1 for axes in grid[:, 0])
  if not relative and 0 < largest < math.inf:  # the axes are shared
    smallest = min(axes.dataLim.y0 for axes in grid[:, 0])
    axes.set(yscale='log', ylim=(max(smallest, largest * SMALLEST), 2 * largest))
  return figure


def _layer_curves(axes: Axes, series: Series, values: np.ndarray) -> None:
  """All layers as lines; where there are many, only the farthest in color and with a name."""
  steps = series.step
  known = np.flatnonzero(np.isfinite(values).any(axis=0))
  last = np.array([values[np.isfinite(values[:, i]), i][-1] for i in known])
  order = known[np.argsort(-last, kind='stable')]
  rest, shown = order[CURVES:], order[:CURVES]
  marker = 'o' if len(steps) == 1 else ''
  lines, names = [], [_text(series.layers[i]) for i in shown]
  if len(rest):
    middle = np.ma.median(np.ma.masked_invalid(values[:, known]), axis=1).filled(np.nan)
    lines = axes.plot(steps, values[:, rest], color='0.75', lw=0.5, marker=marker, zorder=1)[:1]
    lines += axes.plot(steps, middle, 'k--')
    names = [f'the other {len(rest)} layers', 'median of all layers', *names]
  lines += axes.plot(steps, values[:, shown], marker=marker, lw=1.3)
  beside: dict[str, Any] = {'loc': 'center left', 'bbox_to_anchor': (1.01, 0.5), 'frameon': False}
  labels = [f' {name}' for name in names]  # one that begins with '_' would be left out
  axes.legend(lines, labels, fontsize=7, **beside)


def metrics(runs: Sequence[Series]) -> Figure:
  """One panel for each of the user's metrics, after the share held and the distance of all."""
  panels = [_panels(series) for series in runs]
  names = list(dict.fromkeys(name for panel in panels for name in panel))
  rows = math.ceil(len(names) / 3)
  figure, grid = _figure(rows, 3, (12, 2.9 * rows))
  for axes in grid.flat[len(names) :]:
    axes.remove()
  for name, axes in zip(names, grid.flat, strict=False):
    for series, panel in zip(runs, panels, strict=True):
      if name in panel:
        steps, values = panel[name]
        marker = '.' if len(steps) < 40 else ''
        (line,) = axes.plot(steps, values, marker=marker, label=_text(series.name), lw=1.3)
        if (budget := f'{name.removesuffix("drift")}budget') in series.metrics:
          axes.plot(*series.metrics[budget], color=line.get_color(), ls='--')
        if OWN.fullmatch(f'{name.removesuffix("strength")}budget'):
          axes.set_yscale('symlog', linthresh=0.01)
    axes.set_title(_text(name), fontsize=9)
    axes.set_xlabel('step', fontsize=8)
    axes.grid(alpha=0.3)
    if len(runs) > 1:
      axes.legend(fontsize=7)
  return figure


def _panels(series: Series) -> dict[str, Curve]:
  """Curves by name, those of the library first."""
  share = 100 * np.ma.masked_invalid(series.held).mean(axis=1).filled(np.nan)
  name, far = 'distance, % of ‖θ₀‖', 100 * reports.overall(series.distance, series.norms)
  if np.isnan(far).all():
    name, far = 'distance', np.linalg.norm(series.distance, axis=-1)
  own = {name: curve for name, curve in series.metrics.items() if not OWN.fullmatch(name)}
  return {'layers held, %': (series.edges[1:], share), name: (series.step, far), **own}
