"""The pictures of a report, of one run or of two: what was held, distances, and metrics."""

import math
from collections.abc import Sequence
from typing import Any

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
BESIDE: dict[str, Any] = {
  'loc': 'center left',
  'bbox_to_anchor': (1.01, 0.5),
  'frameon': False,
}  # a legend


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
    steps, shares = tables.held_between(series, COLUMNS)
    edges = np.arange(len(series.layers) + 1)
    image = axes.pcolormesh(steps, edges, shares.T, vmin=0, vmax=1, rasterized=True)
    axes.set_facecolor('0.85')  # where a layer had no update
    axes.invert_yaxis()
    _name_layers(axes, series.layers, axes is panels[0] or series.layers != runs[0].layers)
    axes.set(xlabel='step', title=f'{_text(series.name)}: updates held')
  figure.colorbar(image, ax=panels[-1], label='share of the updates held', fraction=0.05)
  return figure


def _name_layers(axes: Axes, layers: Sequence[str], shown: bool) -> None:
  """Names each layer, or each block of layers where there are many, left of the axes."""
  found = tables.blocks(layers, LABELS)
  for block in found[1:] if len(found) < len(layers) else ():
    axes.axhline(block.begin, color='white', linewidth=0.6)
  named: dict[float, str] = {}
  for name, begin, end in found:
    middle = (begin + end) / 2
    if not named or middle - max(named) >= 0.7 * len(layers) / LABELS:  # else names would overlap
      named[middle] = _text(name) if shown else ''
  axes.set_yticks(list(named), list(named.values()), fontsize=8 if len(named) <= 30 else 7)
  axes.tick_params(axis='y', length=0)


def _text(name: str) -> str:
  """A name as it is, but the end of a long one; no part of it is taken for mathematics."""
  shown = tables.printable(name)
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
  at = tables.thinned(len(series.step), POINTS)
  steps, values = series.step[at], values[at]
  known = np.flatnonzero(np.isfinite(values).any(axis=0))
  last = np.array([values[np.isfinite(values[:, i]), i][-1] for i in known])
  order = known[np.argsort(-last, kind='stable')]
  rest, shown = order[CURVES:], order[:CURVES]
  marker = 'o' if len(at) == 1 else ''
  lines, names = [], [_text(series.layers[i]) for i in shown]
  if len(rest):
    middle = np.ma.median(np.ma.masked_invalid(values[:, known]), axis=1).filled(np.nan)
    lines = axes.plot(steps, values[:, rest], color='0.75', lw=0.5, marker=marker, zorder=1)[:1]
    lines += axes.plot(steps, middle, 'k--')
    names = [f'the other {len(rest)} layers', 'median of all layers', *names]
  lines += axes.plot(steps, values[:, shown[:10]], marker=marker, lw=1.3)
  lines += axes.plot(steps, values[:, shown[10:]], '--', marker=marker, lw=1.3)
  legend = axes.legend(lines, [''] * len(lines), fontsize=7, **BESIDE)
  for text, name in zip(legend.get_texts(), names, strict=True):
    text.set_text(name)  # a label that begins with '_' would be left out


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
        at = tables.thinned(len(steps), POINTS)
        marker = '.' if len(at) < 40 else ''
        axes.plot(steps[at], values[at], marker=marker, label=_text(series.name), lw=1.3)
    axes.set_title(_text(name), fontsize=9)
    axes.set_xlabel('step', fontsize=8)
    axes.grid(alpha=0.3)
    if len(runs) > 1:
      axes.legend(fontsize=7)
  return figure


def _panels(series: Series) -> dict[str, Curve]:
  """Curves by name, those of the library first."""
  steps, shares = tables.held_between(series, COLUMNS)
  name, far = tables.overall(series)
  share = 100 * np.ma.masked_invalid(shares).mean(axis=1).filled(np.nan)
  return {'layers held, %': (steps[1:], share), name: far, **series.metrics}
