"""Pictures of one run, or of two side by side: what was held, distances, and metrics."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from spd_optax import reports
from spd_optax.audit.format import printable
from spd_optax.audit.report import Curve, Series

LABELS = 48  # layers' names along an axis
CURVES = 10  # layers with a curve of their own color
SMALLEST = 1e-4  # distance shown, relative to the largest


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
    title = (
      "distance of each layer, % of its anchor's norm" if relative else 'distance of each layer'
    )
    axes.set(xlabel='step', ylabel=label, title=f'{_text(series.name)}: {title}')
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
        if reports.of_budget(name) == 'strength':
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
  own = {
    metric: curve
    for metric, curve in series.metrics.items()
    if reports.of_budget(metric) not in ('budget', 'measured')
  }
  return {'layers held, %': (series.edges[1:], share), name: (series.step, far), **own}
