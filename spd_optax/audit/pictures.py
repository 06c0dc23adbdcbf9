"""The pictures of a report, of one run or of two: what was held, distances, and metrics."""

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from spd_optax.audit import tables
from spd_optax.audit.tables import Curve, Series

LABELS = 48  # layers' names along an axis
CURVES = 12  # layers with a curve of their own color
COLUMNS = 120  # of a heat map
POINTS = 600  # of a curve
SMALLEST = 1e-4  # distance shown, relative to the largest
DPI = 120


def draw(runs: Sequence[Series]) -> dict[str, Figure]:
  """Every picture by its name; the relative distances only if a norm is known."""
  found = {'held': held(runs)}
  found['distance'] = distances(runs, [x.distance for x in runs], '‖θ − θ₀‖', log=True)
  relative = [100 * series.relative for series in runs]
  if any(np.isfinite(values).any() for values in relative):
    label = '‖θ − θ₀‖ / ‖θ₀‖, %'
    found['relative_distance'] = distances(runs, relative, label, log=False)
  return found | {'metrics': metrics(runs)}


def held(runs: Sequence[Series]) -> Figure:
  """A heat map of layers × time: the share of the updates with a true condition."""
  count = max(len(series.layers) for series in runs)
  figure = Figure(figsize=(10 + 2 * (len(runs) - 1), min(1.7 + 0.22 * count, 12)), dpi=DPI)
  figure.set_layout_engine('constrained')
  same = all(series.layers == runs[0].layers for series in runs)
  row = figure.subplots(1, len(runs), squeeze=False)[0]
  for i, (axes, series) in enumerate(zip(row, runs, strict=True)):
    steps, shares = tables.held_between(series, COLUMNS)
    image = axes.pcolormesh(
      steps, np.arange(len(series.layers) + 1), shares.T, vmin=0, vmax=1, cmap='viridis'
    )
    image.set_rasterized(True)
    axes.set_facecolor('0.85')  # where a layer had no update
    axes.invert_yaxis()
    _name_layers(axes, series.layers, shown=i == 0 or not same)
    axes.set(xlabel='step', title=f'{_text(series.name)}: updates held')
  figure.colorbar(image, ax=row[-1], label='share of the updates held', fraction=0.05)
  return figure


def _name_layers(axes: Axes, layers: Sequence[str], shown: bool) -> None:
  """Names each layer, or each block of layers where there are many, left of the axes."""
  found = tables.blocks(layers, LABELS)
  for block in found[1:] if len(found) < len(layers) else ():
    axes.axhline(block.begin, color='white', linewidth=0.6)
  apart, last = len(layers) / LABELS, -math.inf
  named: dict[float, str] = {}
  for block in found:
    middle = (block.begin + block.end) / 2
    if middle - last >= 0.7 * apart:  # else the names would overlap
      named[middle] = _text(block.name) if shown else ''
      last = middle
  axes.set_yticks(list(named), list(named.values()), fontsize=8 if len(named) <= 30 else 7)
  axes.tick_params(axis='y', length=0)


def _text(name: str) -> str:
  """A name as it is, but the end of a long one; no part of it is taken for mathematics."""
  shown = tables.printable(name)
  shown = shown if len(shown) <= 44 else '…' + shown[-43:]
  return shown.replace('$', r'\$')


def distances(
  runs: Sequence[Series], values: Sequence[np.ndarray], label: str, log: bool
) -> Figure:
  """Curves of each layer over time."""
  figure = Figure(figsize=(10, 5.5 * len(runs)), dpi=DPI)
  figure.set_layout_engine('constrained')
  column = figure.subplots(len(runs), 1, squeeze=False, sharex=True, sharey=True)[:, 0]
  for axes, series, value in zip(column, runs, values, strict=True):
    _layer_curves(axes, series, np.where(np.isfinite(value), value, np.nan), log)
    axes.set(xlabel='step', ylabel=label, title=f'{_text(series.name)}: distance of each layer')
    axes.grid(alpha=0.3)
  every = np.concatenate([np.ravel(value) for value in values])
  shown = every[np.isfinite(every) & (every > 0)]
  if log and len(shown):  # the axes are shared
    column[0].set_yscale('log')
    column[0].set_ylim(max(shown.min(), shown.max() * SMALLEST), 2 * shown.max())
  return figure


def _layer_curves(axes: Axes, series: Series, values: np.ndarray, log: bool) -> None:
  """All layers as lines; where there are many, only the farthest in color and with a name."""
  at = tables.thinned(len(series.step), POINTS)
  steps, values = series.step[at], values[at]
  if log:
    values = np.where(values > 0, values, np.nan)
  known = np.flatnonzero(np.isfinite(values).any(axis=0))
  last = np.array([values[np.isfinite(values[:, i]), i][-1] for i in known])
  order = known[np.argsort(-last, kind='stable')]
  marker = 'o' if len(at) == 1 else ''
  rest, named = order[CURVES:], []
  if len(rest):
    axes.plot(steps, values[:, rest], color='0.75', linewidth=0.5, marker=marker, zorder=1)
    named += [(axes.plot([], [], color='0.75')[0], f'the other {len(rest)} layers')]
    middle = np.ma.median(np.ma.masked_invalid(values[:, known]), axis=1).filled(np.nan)
    named += [(axes.plot(steps, middle, 'k--')[0], 'median of all layers')]
  for place, i in enumerate(order[:CURVES]):
    style = '-' if place < 10 else '--'
    line = axes.plot(steps, values[:, i], style, color=f'C{place % 10}', marker=marker, lw=1.3)[0]
    named.append((line, _text(series.layers[i])))
  lines = [line for line, _ in named]
  legend = axes.legend(
    lines,
    [''] * len(lines),
    fontsize=7,
    loc='center left',
    bbox_to_anchor=(1.01, 0.5),
    frameon=False,
  )
  for shown, (_, name) in zip(legend.get_texts(), named, strict=True):
    shown.set_text(name)  # a label that begins with '_' would be left out


def metrics(runs: Sequence[Series]) -> Figure:
  """One panel for each of the user's metrics, after the share held and the distance of all."""
  panels = [_panels(series) for series in runs]
  names = list(dict.fromkeys(name for panel in panels for name in panel))
  rows = math.ceil(len(names) / 3)
  figure = Figure(figsize=(12, 2.9 * rows), dpi=DPI)
  figure.set_layout_engine('constrained')
  grid = figure.subplots(rows, 3, squeeze=False).flat
  for name, axes in zip(names, grid, strict=False):
    for series, panel in zip(runs, panels, strict=True):
      if name in panel:
        steps, values = panel[name]
        at = tables.thinned(len(steps), POINTS)
        marker = '.' if len(at) < 40 else ''
        axes.plot(steps[at], values[at], marker=marker, label=_text(series.name), lw=1.3)
    axes.set_title(_text(name), fontsize=9)
    axes.grid(alpha=0.3)
    axes.set_xlabel('step', fontsize=8)
    if len(runs) > 1:
      axes.legend(fontsize=7)
  for axes in list(grid):
    axes.set_visible(False)
  return figure


def _panels(series: Series) -> dict[str, Curve]:
  """Curves by name, those of the library first."""
  steps, shares = tables.held_between(series, COLUMNS)
  name, far = tables.overall(series)
  share = 100 * np.ma.masked_invalid(shares).mean(axis=1).filled(np.nan)
  return {'layers held, %': (steps[1:], share), name: far, **series.metrics}
