"""The pictures of a report: what was held, the distances, and the metrics over time.

Each takes one run, or two to compare.
"""

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from spd_optax.audit import series as over_time
from spd_optax.audit.series import Curve, Series
from spd_optax.audit.tables import printable

LABELS = 48  # layers' names along an axis
CURVES = 12  # layers with a curve of their own color
COLUMNS = 120  # of a heat map
POINTS = 600  # of a curve
SMALLEST = 1e-4  # distance shown, relative to the largest
DPI = 120


def held(runs: Sequence[Series]) -> Figure:
  """A heat map of layers × time: the share of the updates with a true condition."""
  count = max(len(series.layers) for series in runs)
  figure = Figure(figsize=(10 + 2 * (len(runs) - 1), min(1.7 + 0.22 * count, 12)), dpi=DPI)
  figure.set_layout_engine('constrained')
  same = all(series.layers == runs[0].layers for series in runs)
  row = figure.subplots(1, len(runs), squeeze=False)[0]
  for i, (axes, series) in enumerate(zip(row, runs, strict=True)):
    steps, shares = over_time.held_between(series, COLUMNS)
    image = axes.pcolormesh(
      steps, np.arange(len(series.layers) + 1), shares.T, vmin=0, vmax=1, cmap='viridis'
    )
    image.set_rasterized(True)
    axes.set_facecolor('0.85')  # where a layer had no update
    axes.invert_yaxis()
    _name_layers(axes, series.layers, shown=i == 0 or not same)
    axes.set(xlabel='step', title=f'{printable(series.name)}: updates held')
  figure.colorbar(image, ax=row[-1], label='share of the updates held', fraction=0.05)
  return figure


def _name_layers(axes: Axes, layers: Sequence[str], shown: bool) -> None:
  """Names each layer, or each block of layers where there are many, left of the axes."""
  found = over_time.blocks(layers, LABELS)
  for block in found[1:] if len(found) < len(layers) else ():
    axes.axhline(block.begin, color='white', linewidth=0.6)
  apart, last = len(layers) / LABELS, -math.inf
  named: dict[float, str] = {}
  for block in found:
    middle = (block.begin + block.end) / 2
    if middle - last >= 0.7 * apart:  # else the names would overlap
      named[middle] = _short(printable(block.name)) if shown else ''
      last = middle
  axes.set_yticks(list(named), list(named.values()), fontsize=8 if len(named) <= 30 else 7)
  axes.tick_params(axis='y', length=0)


def _short(name: str) -> str:
  """The end of a long name."""
  return name if len(name) <= 44 else '…' + name[-43:]


def distances(runs: Sequence[Series]) -> Figure:
  """The distance from the anchor of each layer over time."""
  return _curves(runs, [series.distance for series in runs], '‖θ − θ₀‖', log=True)


def relative_distances(runs: Sequence[Series]) -> Figure | None:
  """The distance per norm of the anchor, in %; None where no norm is known."""
  values = [100 * over_time.relative(series) for series in runs]
  if not any(np.isfinite(v).any() for v in values):
    return None
  return _curves(runs, values, '‖θ − θ₀‖ / ‖θ₀‖, %', log=False)


def _curves(runs: Sequence[Series], values: Sequence[np.ndarray], label: str, log: bool) -> Figure:
  figure = Figure(figsize=(10, 5.5 * len(runs)), dpi=DPI)
  figure.set_layout_engine('constrained')
  column = figure.subplots(len(runs), 1, squeeze=False, sharex=True, sharey=True)[:, 0]
  for axes, series, value in zip(column, runs, values, strict=True):
    _layer_curves(axes, series, np.where(np.isfinite(value), value, np.nan), log)
    axes.set(xlabel='step', ylabel=label, title=f'{printable(series.name)}: distance of each layer')
    axes.grid(alpha=0.3)
  every = np.concatenate([np.ravel(value) for value in values])
  shown = every[np.isfinite(every) & (every > 0)]
  if log and len(shown):  # the axes are shared
    column[0].set_yscale('log')
    column[0].set_ylim(max(shown.min(), shown.max() * SMALLEST), 2 * shown.max())
  return figure


def _layer_curves(axes: Axes, series: Series, values: np.ndarray, log: bool) -> None:
  """All layers as lines; where there are many, only the farthest in color and with a name."""
  at = over_time.thinned(len(series.step), POINTS)
  steps, values = series.step[at], values[at]
  if log:
    values = np.where(values > 0, values, np.nan)
  known = np.flatnonzero(np.isfinite(values).any(axis=0))
  last = np.array([values[np.isfinite(values[:, i]), i][-1] for i in known])
  order = known[np.argsort(-last, kind='stable')]
  marker = 'o' if len(at) == 1 else ''
  rest = order[CURVES:]
  if len(rest):
    axes.plot(steps, values[:, rest], color='0.75', linewidth=0.5, marker=marker, zorder=1)
    axes.plot([], [], color='0.75', label=f'the other {len(rest)} layers')
    middle = np.ma.median(np.ma.masked_invalid(values[:, known]), axis=1).filled(np.nan)
    axes.plot(steps, middle, color='black', linestyle='--', label='median of all layers')
  for place, i in enumerate(order[:CURVES]):
    style = '-' if place < 10 else '--'
    name = _short(printable(series.layers[i]))
    axes.plot(steps, values[:, i], style, color=f'C{place % 10}', marker=marker, label=name, lw=1.3)
  if len(order):
    axes.legend(fontsize=7, loc='center left', bbox_to_anchor=(1.01, 0.5), frameon=False)


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
        at = over_time.thinned(len(steps), POINTS)
        marker = '.' if len(at) < 40 else ''
        axes.plot(steps[at], values[at], marker=marker, label=printable(series.name), lw=1.3)
    axes.set_title(_short(printable(name)), fontsize=9)
    axes.grid(alpha=0.3)
    axes.set_xlabel('step', fontsize=8)
    if len(runs) > 1:
      axes.legend(fontsize=7)
  for axes in list(grid):
    axes.set_visible(False)
  return figure


def _panels(series: Series) -> dict[str, Curve]:
  """Curves by name, those of the library first."""
  steps, shares = over_time.held_between(series, COLUMNS)
  name, far = over_time.overall(series)
  share = 100 * np.ma.masked_invalid(shares).mean(axis=1).filled(np.nan)
  return {'layers held, %': (steps[1:], share), name: far, **series.metrics}
