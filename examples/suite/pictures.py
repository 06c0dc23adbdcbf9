"""The suite's pictures: configurations and fronts, ranks, differences from Adam, what was held."""

import itertools
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use('Agg')
import matplotlib.pyplot as plt
import numpy as np

import reporting
from suite import choice, fronts
from suite.choice import ID, OOD, PEER, Record
from suite.methods import SPD
from suite.tables import HELD, Table

PEER_COLOR = '0.75'
COLORS = {
  'Adam': 'black',
  'L2-SP': 'tab:blue',
  'L2-SP, decoupled': 'tab:cyan',
  'WiSE-FT': 'tab:olive',
  'adam_spd': 'tab:orange',
  'projection_decay': 'tab:red',
  'adam_spd, near': 'tab:purple',
  'adam_spd, relieved': 'tab:brown',
  'FTP': 'tab:green',
  'SignificantProjection': 'tab:pink',
}
LINES = {  # of the fronts: these beside `COLORS`, thinner and dashed
  'Cautious decay to the start': 'tab:brown',
  'DiGraP': '0.55',
  'KL to the base': 'tab:olive',
}

MARKERS = 'os^DvPX*'
SETTINGS = {  # of a method in `held`, in their order
  'adam_spd': 'o',
  'adam_spd, near': 'v',
  'projection_decay': '^D',
  'SignificantProjection': 's',
}
# By Okabe and Ito: told apart by everyone.
TASK_COLORS = ('#0072b2', '#e69f00', '#009e73', '#cc79a7', '#56b4e9', '#d55e00')


def pareto(
  path: Path,
  titles: Mapping[str, str],
  records: Mapping[str, Sequence[Record]],
  before: Mapping[str, Record],
  chosen: Mapping[str, Mapping[str, Record]],
) -> None:
  """Every configuration of every task as a point: score in distribution against out of it.

  A star is what validation chose, of the default setting where there is one. The dotted line is
  the pre-trained model out of distribution. All other peers are grey.
  """
  columns = 2 if len(records) == 4 else min(3, len(records))
  rows = -(-len(records) // columns)
  figure, grid = plt.subplots(
    rows,
    columns,
    figsize=(max(4.6 * columns, 5.5), 3.9 * rows),
    layout='constrained',
    squeeze=False,
  )
  for axes in grid.flat[len(records) :]:
    axes.axis('off')
  for axes, (task, found) in zip(grid.flat, records.items(), strict=False):
    _configurations(axes, found, chosen[task])
    axes.axhline(choice.mean(before[task], OOD), color='gray', linestyle=':', linewidth=1)
    axes.set_title(_title(task, titles[task]), fontsize=9)
    axes.grid(alpha=0.3)
  for axes in grid[:, 0]:
    axes.set_ylabel('out of distribution')
  for axes in grid[-1]:
    axes.set_xlabel('in distribution')
  handles, labels = grid.flat[0].get_legend_handles_labels()
  figure.legend(handles, labels, loc='outside lower center', ncols=min(4, 3 * columns), fontsize=9)
  figure.savefig(path, dpi=110)
  plt.close(figure)


def _title(task: str, title: str) -> str:
  return f'{task}\n{textwrap.fill(title, 52)}'


def _configurations(
  axes: plt.Axes, records: Sequence[Record], chosen: Mapping[str, Record]
) -> None:
  def points(of: Sequence[Record]) -> tuple[list[float], list[float]]:
    return [choice.mean(r, ID) for r in of], [choice.mean(r, OOD) for r in of]

  others = [record for record in records if record['method'] not in COLORS]
  axes.scatter(*points(others), s=9, color=PEER_COLOR, label='all other peers')
  stars = []
  for method, color in COLORS.items():
    found = choice.of(records, method)
    if not found:
      continue
    axes.scatter(*points(found), s=14, color=color, alpha=0.6, label=method)
    stars.append(chosen.get(f'{method}, default', chosen[method]))
    axes.scatter(*points(stars[-1:]), s=130, marker='*', color=color, edgecolor='white', zorder=3)
  for limit, column in ((axes.set_xlim, ID), (axes.set_ylim, OOD)):
    values = [choice.mean(record, column) for record in records]
    limit(_floor(values, min(choice.mean(star, column) for star in stars)))


def _floor(values: Sequence[float], shown: float) -> float:
  """Leaves out the worst fifth, which would press the rest together, unless it is to be shown."""
  low, high = min(np.quantile(values, 0.2), shown), max(values)
  return float(low - 0.05 * (high - low))


def front_curves(
  path: Path,
  titles: Mapping[str, str],
  records: Mapping[str, Sequence[Record]],
  default: Mapping[str, Mapping[str, float]],
) -> None:
  """What each method keeps at equal accuracy: its front, in each task; the higher, the better.

  A method with a default shows the front of its default. With several tasks, the last panel has the
  mean over tasks of the differences from Adam's front, as far as a method reaches it on each.
  """
  below = np.linspace(0, max(fronts.BELOW), 161)
  count = len(records) + (len(records) > 1)
  columns = min(3, count)
  rows = -(-count // columns)
  size = (max(4.6 * columns, 6), 3.7 * rows + 0.6)
  figure, grid = plt.subplots(rows, columns, figsize=size, layout='constrained', squeeze=False)
  every = fronts.methods(records, default)
  shown = {title: of for title, of in every.items() if f'{title}, default' not in every}
  adam = {task: fronts.points(each, PEER) for task, each in records.items()}
  for title, (method, setting) in shown.items():
    style = {
      'color': COLORS.get(method, LINES.get(method, PEER_COLOR)),
      'linewidth': 2 if method.startswith((*SPD, PEER)) else 1.2,
      'linestyle': '--' if method in LINES else '-',
      'label': title,
    }
    gains = []
    for axes, (task, each) in zip(grid.flat, records.items(), strict=False):
      own = fronts.points(each, method, setting)
      best = adam[task][:, 0].max()
      levels = np.linspace(best - max(fronts.BELOW), max([best, *own[:, 0]]), 321)
      axes.plot(levels, fronts.front(own, levels), **style)
      gains.append(fronts.differences(own, adam[task], below))
    if len(records) > 1:
      grid.flat[len(records)].plot(below, np.mean(gains, 0), **style)
  for axes, (task, title) in zip(grid.flat, titles.items(), strict=False):
    axes.axvline(adam[task][:, 0].max(), color='gray', linestyle=':', linewidth=1)
    axes.set_title(_title(task, title), fontsize=9)
    axes.set_xlabel('in distribution, at least', fontsize=9)
  if len(records) > 1:
    axes = grid.flat[len(records)]
    axes.set_title('mean of the tasks', fontsize=9)
    axes.set_xlabel("points of ID below Adam's best", fontsize=9)
    axes.set_ylabel("OOD minus that of Adam's front", fontsize=9)
    axes.invert_xaxis()
  for axes in grid[:, 0]:
    axes.set_ylabel('best out of distribution', fontsize=9)
  for axes in grid.flat[:count]:
    axes.grid(alpha=0.3)
  for axes in grid.flat[count:]:
    axes.axis('off')
  handles, labels = grid.flat[0].get_legend_handles_labels()
  figure.legend(handles, labels, loc='outside lower center', ncols=min(4, 3 * columns), fontsize=9)
  figure.savefig(path, dpi=110)
  plt.close(figure)


def ranks(path: Path, methods: Sequence[str], values: np.ndarray) -> None:
  """The rank of each method on each task, and its mean: [tasks, methods], the best first."""
  order = np.argsort(values.mean(0))[::-1]
  figure, axes = plt.subplots(figsize=(7, 0.32 * len(methods) + 1), layout='constrained')
  for y, i in enumerate(order):
    color = 'tab:red' if methods[i].startswith(SPD) else '0.35'
    axes.scatter(values[:, i], np.full(len(values), y), s=12, color=color, alpha=0.35)
    axes.scatter(values[:, i].mean(), y, s=60, marker='D', color=color)
  axes.set_yticks(range(len(methods)), [methods[i] for i in order])
  axes.set_xlabel('rank of (ID + OOD) / 2, 1 is best: each task, and the mean')
  axes.grid(axis='x', alpha=0.3)
  figure.savefig(path, dpi=110)
  plt.close(figure)


def headline(path: Path, table: Table, tasks: Sequence[str]) -> None:
  """Scores of the new task and the old minus Adam's: a point for each task, and their mean.

  Args:
    path: of the picture.
    table: what `tables.of_real_models` calls 'headline'.
    tasks: their names, in the order of its values.
  """
  columns = {
    'ID − Adam': 'the new task: points more than Adam',
    'old − Adam': 'what the model could before: points more than Adam',
  }
  rows = {method: row for method, row in table.items() if method != choice.PEER}
  at = np.arange(len(rows))
  size = (9.5, 0.5 * len(rows) + 1.4)
  figure, panels = plt.subplots(ncols=2, figsize=size, sharey=True, layout='constrained')
  for axes, (column, title) in zip(panels, columns.items(), strict=True):
    means, errors = np.array([reporting.mean_and_error(row[column]) for row in rows.values()]).T
    axes.errorbar(
      *(means, at + 0.24),
      xerr=errors,
      fmt='D',
      color='black',
      markersize=6,
      capsize=3,
      label='mean ± standard error',
    )
    for i, (task, marker) in enumerate(zip(tasks, itertools.cycle(MARKERS), strict=False)):
      each = [row[column][i] for row in rows.values()]
      shift = -0.3 + 0.4 * i / len(tasks)
      color = TASK_COLORS[i % len(TASK_COLORS)]
      axes.scatter(each, at + shift, s=26, marker=marker, color=color, label=task)
    axes.axvline(0, color='gray', linewidth=1)
    for line in at[:-1] + 0.5:
      axes.axhline(line, color='0.9', linewidth=0.8)
    axes.set_xlabel(title, fontsize=9)
    axes.grid(axis='x', alpha=0.3)
  panels[0].set_yticks(at, [*rows])
  for label in panels[0].get_yticklabels():
    label.set_fontweight('bold' if label.get_text().startswith(SPD) else 'normal')
  panels[0].invert_yaxis()
  handles, labels = panels[0].get_legend_handles_labels()
  figure.legend(handles, labels, loc='outside lower center', ncols=3, fontsize=9)
  figure.savefig(path, dpi=110)
  plt.close(figure)


def held(path: Path, title: str, kinds: Table) -> None:
  """Share of the steps in which layers of a kind were held: a point for each method of SPD.

  Args:
    path: of the picture.
    title: of the task.
    kinds: what `tables.by_kind` says of it.
  """
  size = (7.5, 0.25 * len(kinds) + 1.8)
  figure, axes = plt.subplots(figsize=size, layout='constrained')
  columns = [column for column in next(iter(kinds.values())) if column.startswith(HELD)]
  markers = {method: iter(marks) for method, marks in SETTINGS.items()}
  for i, column in enumerate(columns):
    method = column.removeprefix(HELD)
    of = max((name for name in COLORS if method.startswith(name)), key=len, default='')
    shift = 0.12 * (i - (len(columns) - 1) / 2)
    axes.scatter(
      *([np.mean(row[column]) for row in kinds.values()], np.arange(len(kinds)) + shift),
      s=26,
      marker=next(markers.get(of, iter('')), 'X'),
      color=COLORS.get(of, PEER_COLOR),
      label=method,
      zorder=3,
    )
  names = [f'{name.partition(", ")[2]}  ({row["weights of each"]})' for name, row in kinds.items()]
  axes.set_yticks(range(len(names)), names, fontsize=8)
  axes.invert_yaxis()
  axes.axvline(50, color='gray', linestyle=':', linewidth=1)
  axes.set_xlim(-2, 102)
  axes.grid(alpha=0.3)
  figure.suptitle(
    f'{textwrap.fill(title, 90)}\nin brackets: the number of weights of each layer', fontsize=9
  )
  axes.set_xlabel('held, % of the steps', fontsize=9)
  figure.legend(loc='outside lower center', ncols=min(3, len(columns)), fontsize=8)
  figure.savefig(path, dpi=110)
  plt.close(figure)
