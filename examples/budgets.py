"""A budget for what is lost, in one run. Is it met, and at what cost? On the tasks of compare.py.

    python examples/budgets.py                    # the ten tasks of compare.py
    python examples/budgets.py --steps-factor 4   # four times as many steps
    python examples/budgets.py --real             # digits_by_hand: an EfficientNet

The drift is KL(π_0 ‖ π) between what the base model and the present one say about up to 64 of
a seed's own training inputs, in nats. Labels do not enter it. Of `diabetes` it is the mean squared
change of the predictions. It is measured before each step. Where styles are learned in turn, each
stage has its own start for a base, and the same budget.

A task has one learning rate, the one that validation chose for Adam in `results/compare`, with a
warm-up over a tenth of the steps and a cosine decay. Adam runs first. The budgets are a half and a
fifth of the drift at which it ends, rounded to two digits. All other runs come after that.

At equal drift a budget is compared with the strengths that a sweep would have tried: their
scores, linear between two neighbours in the logarithm of the drift. WiSE-FT mixes Adam's weights
with the base so that the drift is the budget. Where no strength of the sweep ends within a budget,
there is nothing to compare with but WiSE-FT.

Writes to `--out`: `records.jsonl`, a line for each configuration of each task; `results.json`
and `README.md`, the tables; `drift.png`. Tasks that an earlier call has left there stay.
"""

import argparse
import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

import compare
import reporting
from suite import budgeted, cache, choice, tables
from suite.budgeted import ADAM, AROUND, BUDGETED, DIALS, FIXED, L2, LINK, WISE
from suite.choice import ID, OOD, Record
from suite.tasks import cosine

QUICK = ('tumours',)
REAL = ('digits_by_hand',)
SHARES = (0.5, 0.2)  # of the drift at which Adam ends
STRENGTHS = (0.3, 1.0, 3.0, 10.0, 30.0, 100.0)  # of the sweep
NEAR = 0.1  # a budget is met where the drift is within so much of it

Records = Mapping[str, Sequence[Record]]

METHODS = (LINK, AROUND, L2, FIXED, WISE)
DEFAULTS = {LINK: 1.0, AROUND: 1.0, L2: 0.01}  # strengths of the library


def two_digits(value: float) -> float:
  """0.01234 -> 0.012."""
  return float(f'{value:.2g}')


def rate_of(name: str) -> float:
  """The learning rate that validation chose for Adam."""
  folder = 'compare' if name in compare.TASKS else name
  path = Path(__file__).parent / 'results' / folder / 'records.jsonl'
  each = (json.loads(line) for line in path.read_text().splitlines())
  found = choice.of([record for record in each if record['task'] == name], choice.PEER)
  return float(choice.by_validation(found)['rate'])


def run_task(name: str, args: argparse.Namespace) -> list[Record]:
  """All methods on one task, as far as they are not in the cache."""
  task = compare.scaled(compare.maker(name)(), args.quick)
  start_from = compare.foundation(name, task, args)
  task = task._replace(pace=cosine(), steps=task.steps * args.steps_factor)
  rate = rate_of(name)

  def records(title: str, make: Any, settings: Sequence[Mapping[str, float]]) -> list[Record]:
    start = time.perf_counter()
    common = {
      'seeds': args.seeds,
      'most': args.inputs,
      'rate': rate,
      'steps': task.steps,
      'settings': settings,
    }
    key = cache.digest(compare.maker(name), budgeted.run, make, title=title, **common)
    path = args.out / 'cache' / name / f'{title}.json'
    arguments = (task, title, make, rate, settings, start_from, args.seeds, args.inputs)
    found = cache.records(path, key, lambda: budgeted.run(*arguments))
    print(f'{name}: {title}, {time.perf_counter() - start:.0f} s', flush=True)
    return found

  found = records(ADAM, budgeted.adam, [{}])
  budgets = [two_digits(share * np.mean(found[0]['drift'])) for share in SHARES]
  found += records(FIXED, budgeted.fixed, [{'strength': strength} for strength in STRENGTHS])
  for title, (make, dials) in BUDGETED.items():
    settings = [{'budget': budget, 'init': init} for budget in budgets for init in dials]
    found += records(title, make, settings)
  found += records(WISE, budgeted.adam, [{'budget': budget} for budget in budgets])
  return found


# Tables.


def budgets_of(records: Sequence[Record]) -> list[float]:
  """The budgets of a task, the loosest first."""
  return [record['setting']['budget'] for record in choice.of(records, WISE)]


def at(records: Sequence[Record], method: str, budget: float, init: float | None = None) -> Record:
  """The run of a method with a budget; with its middle first strength if not said otherwise."""
  if method in BUDGETED:
    dials = BUDGETED[method][1]
    setting = {'budget': budget, 'init': dials[len(dials) // 2] if init is None else init}
  else:
    setting = {'budget': budget}
  return choice.of(records, method, setting=setting)[0]


COLUMNS = {f'{LINK}, from {dial:g}': (LINK, dial) for dial in DIALS} | {
  AROUND: (AROUND, None),
  L2: (L2, None),
}


def reached(records: Records) -> reporting.Results:
  """The drift at the end over the budget: for each task, budget and method."""
  table: dict[str, Any] = {}
  for task, found in records.items():
    for budget in budgets_of(found):
      row = table[f'{task}, {budget:g}'] = {}
      row['Adam'] = cell([x / budget for x in choice.of(found, ADAM)[0]['drift']])
      for column, which in COLUMNS.items():
        row[column] = cell(ratios(found, budget, *which))
  return table


def met(records: Records) -> reporting.Results:
  """How often each method met its budgets."""
  table: dict[str, Any] = {}
  for column, which in COLUMNS.items():
    each = {
      task: [ratios(found, budget, *which) for budget in budgets_of(found)]
      for task, found in records.items()
    }
    for title, count in counts(records, each, *which).items():
      table.setdefault(title, {})[column] = count
  return table


def ratios(
  records: Sequence[Record], budget: float, method: str, init: float | None = None
) -> list[float]:
  """The drift of each seed over the budget."""
  return [x / budget for x in at(records, method, budget, init)['drift']]


def counts(
  records: Records, each: Mapping[str, list[list[float]]], method: str, init: float | None
) -> dict[str, str]:
  """How often a method met its budgets; `each` has the ratios by task, budget and seed."""
  means = {task: np.array([np.mean(x) for x in found]) for task, found in each.items()}
  met = {task: np.abs(x - 1) <= NEAR for task, x in means.items()}
  runs = np.array([x for found in each.values() for ratio in found for x in ratio])
  last = np.array(
    [
      x
      for found in records.values()
      for budget in budgets_of(found)
      for x in at(found, method, budget, init)['last']
    ]
  )
  below, free = runs < 1 - NEAR, last <= DEFAULTS[method]
  share = f'{100 * NEAR:g} %'
  return {
    f'tasks with both budgets within {share}': f'{sum(map(np.all, met.values()))} of {len(met)}',
    f'budgets within {share}': f'{sum(map(np.sum, met.values()))} of {np.size([*met.values()])}',
    f'runs within {share}': f'{np.sum(np.abs(runs - 1) <= NEAR)} of {len(runs)}',
    f'runs more than {share} above': f'{np.sum(runs > 1 + NEAR)}',
    f'runs more than {share} below': f'{np.sum(below)}',
    'of these with λ at its default or below at the end': f'{np.sum(below & free)}',
  }


def cell(values: Sequence[float]) -> str:
  """Two digits, since a tenth is what matters."""
  return reporting.cell(values, 2)


def interpolated(records: Sequence[Record], drift: float, column: str) -> float:
  """The score of a fixed strength at a drift, between those of the sweep; Adam's is 0."""
  tried = [*choice.of(records, ADAM), *choice.of(records, FIXED)]
  points = sorted((math.log(choice.mean(r, 'drift')), choice.mean(r, column)) for r in tried)
  return float(np.interp(math.log(drift), *zip(*points, strict=True)))


def in_reach(records: Sequence[Record], budget: float) -> bool:
  """Whether some strength of the sweep ended within the budget."""
  least = min(choice.mean(record, 'drift') for record in choice.of(records, FIXED))
  return least <= (1 + NEAR) * budget


def differences(records: Records, method: str, column: str, which: Sequence[int]) -> list[float]:
  """A method minus the sweep at the drift that the method reached: a mean for each task.

  Args:
    records: by task.
    method: with a budget.
    column: of scores.
    which: budgets, by their index; those that are out of the sweep's reach are left out.
  """
  found = []
  for each in records.values():
    budgets = [budget for i, budget in enumerate(budgets_of(each)) if i in which]
    runs = [at(each, method, budget) for budget in budgets if in_reach(each, budget)]
    values = [
      choice.mean(run, column) - interpolated(each, choice.mean(run, 'drift'), column)
      for run in runs
    ]
    found += [float(np.mean(values))] if values else []
  return found


def against_mixes(records: Records, method: str, column: str) -> list[float]:
  """A method minus WiSE-FT with the same budgets: a mean for each task."""
  return [
    float(
      np.mean(
        [
          choice.mean(at(each, method, budget), column)
          - choice.mean(at(each, WISE, budget), column)
          for budget in budgets_of(each)
        ]
      )
    )
    for each in records.values()
  ]


RUNS = {LINK: '1', AROUND: '1', L2: '1', WISE: '1, and a bisection'}


def at_equal_drift(records: Records) -> reporting.Results:
  """A row per method: differences to the sweep and to WiSE-FT, one value per task."""
  table: dict[str, Any] = {}
  for method, runs in RUNS.items():
    row = table[method] = {'runs': runs}
    for title, column in (('ID', ID), ('OOD', OOD)):
      for which, share in enumerate(SHARES):
        row[f'{title} − sweep, {share:g}'] = differences(records, method, column, [which]) or '–'
      row[f'{title} − sweep'] = differences(records, method, column, range(len(SHARES))) or '–'
      row[f'{title} − WiSE-FT'] = against_mixes(records, method, column)
  reach = [[in_reach(each, budget) for budget in budgets_of(each)] for each in records.values()]
  counts = {
    f'ID − sweep, {share:g}': f'{sum(found)} of {len(found)}'
    for share, found in zip(SHARES, zip(*reach, strict=True), strict=True)
  }
  tasks = {'ID − sweep': f'{sum(map(any, reach))} of {len(reach)}'}
  return table | {f'tasks in reach of the {len(STRENGTHS)} runs': counts | tasks}


def scores(records: Records) -> reporting.Results:
  """A row for each task and budget: ID / OOD of each method at about that drift."""
  table = {}
  for task, found in records.items():
    row = table[f'{task}, Adam'] = {}
    row['Adam'] = _pair(*(choice.mean(choice.of(found, ADAM)[0], c) for c in (ID, OOD)))
    for budget in budgets_of(found):
      row = table[f'{task}, {budget:g}'] = {}
      drift = choice.mean(at(found, LINK, budget), 'drift')
      for method in METHODS:
        if method == FIXED and not in_reach(found, budget):
          row['a fixed strength'] = 'not reached'
        elif method == FIXED:
          row['a fixed strength'] = _pair(*(interpolated(found, drift, c) for c in (ID, OOD)))
        else:
          row[method] = _pair(*(choice.mean(at(found, method, budget), c) for c in (ID, OOD)))
  return table


def _pair(*values: float) -> str:
  return ' / '.join(f'{value:.1f}' for value in values)


def new_inputs(records: Records) -> reporting.Results:
  """The drift on inputs that were not measured, over the budget."""
  table: dict[str, Any] = {}
  for task, found in records.items():
    for budget in budgets_of(found):
      table[f'{task}, {budget:g}'] = {
        method: cell([x / budget for x in at(found, method, budget)['drift, test']])
        for method in (LINK, AROUND, L2, WISE)
      }
  return table


TABLES: dict[str, Callable[[Records], reporting.Results]] = {
  'met': met,
  'reached': reached,
  'equal': at_equal_drift,
  'scores': scores,
  'new': new_inputs,
}


SECTIONS = {
  'met': 'How often budgets were met',
  'reached': 'The drift at the end, over the budget',
  'equal': 'At equal drift',
  'scores': 'ID / OOD',
  'new': 'The drift on in-distribution test inputs at the end, over the budget',
}


def picture(path: Path, records: Records) -> None:
  """The drift of each task over the steps, as a share of Adam's at the end."""
  columns = min(5, len(records))
  rows = -(-len(records) // columns)
  figure, grid = plt.subplots(
    rows,
    columns,
    figsize=(max(3 * columns, 8) + 1, 2.6 * rows + 0.6),  # the legend needs 9
    layout='constrained',
    squeeze=False,
  )
  for axes in grid.flat[len(records) :]:
    axes.axis('off')
  for axes, (task, found) in zip(grid.flat, records.items(), strict=False):
    end = choice.mean(choice.of(found, ADAM)[0], 'drift')
    axes.plot(np.array(choice.of(found, ADAM)[0]['trace']) / end, color='black', label='Adam')
    for color, budget in zip(('tab:red', 'tab:blue'), budgets_of(found), strict=True):
      axes.axhline(budget / end, color=color, linewidth=0.8, linestyle=':')
      for style, dial in zip((':', '-', '--'), DIALS, strict=True):
        trace = np.array(at(found, LINK, budget, dial)['trace']) / end
        axes.plot(trace, style, color=color, label=f'{budget / end:.1f} of Adam, from {dial:g}')
    axes.set(title=task, yscale='log')
    axes.set_ylim(bottom=0.02)
    axes.grid(alpha=0.3)
  for axes in grid[:, 0]:
    axes.set_ylabel("drift / Adam's at the end")
  for axes in grid[-1]:
    axes.set_xlabel('steps, in thirtieths of a stage')
  names = ['Adam', *(f'{share:g} of it, from {dial:g}' for share in SHARES for dial in DIALS)]
  figure.legend(axes_of(grid), names, loc='outside lower center', ncols=4, fontsize=9)
  figure.savefig(path, dpi=90)
  plt.close(figure)


def axes_of(grid: np.ndarray) -> list[Any]:
  """The lines of the first picture, without those of the budgets."""
  return grid.flat[0].get_legend_handles_labels()[0]


def with_earlier(path: Path, results: Records) -> Records:
  """The records, and those of other tasks that an earlier call has left in the file."""
  found: dict[str, list[Record]] = {}
  for line in path.read_text().splitlines() if path.exists() else ():
    record = json.loads(line)
    found.setdefault(record.pop('task'), []).append(record)
  found |= results
  return {name: found[name] for name in compare.ALL if name in found}


def publish(args: argparse.Namespace, results: Records) -> None:
  """Writes and prints everything."""
  records = with_earlier(args.out / 'records.jsonl', results)
  titles = {name: compare.maker(name)().title for name in records}
  found = {name: table(records) for name, table in TABLES.items()}
  for name, table in found.items():
    reporting.show(name, table)
  settings = {'tasks': titles, 'inputs': args.inputs, 'steps_factor': args.steps_factor}
  settings['rates'] = {name: each[0]['rate'] for name, each in records.items()}
  reporting.write_json(args.out / 'results.json', settings, found)
  (args.out / 'README.md').write_text(tables.page('Budgets', SECTIONS, found, 'budgets.py'))
  with (args.out / 'records.jsonl').open('w') as file:
    for name, each in records.items():
      lines = (json.dumps({'task': name} | record, allow_nan=False) for record in each)
      file.writelines(line + '\n' for line in lines)
  picture(args.out / 'drift.png', records)


def main(arguments: Sequence[str] | None = None) -> Records:
  """Runs what the command line says."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--quick', action='store_true', help='one task, a few steps, two seeds')
  parser.add_argument('--real', action='store_true', help=', '.join(REAL))
  parser.add_argument('--tasks', nargs='+', choices=compare.ALL, metavar='TASK')
  parser.add_argument('--seeds', type=int, help='default: 5, of real models 3')
  parser.add_argument(
    '--inputs', type=int, default=64, help='on which the drift is measured; default: %(default)s'
  )
  parser.add_argument('--steps-factor', type=int, default=1, help="times the task's steps")
  parser.add_argument('--workers', type=int, default=os.cpu_count(), help='tasks at a time')
  parser.add_argument('--out', type=Path, help='default: runs/budgets, or runs/budgets_real')
  args = parser.parse_args(arguments)
  args.tasks = args.tasks or list(REAL if args.real else QUICK if args.quick else compare.TASKS)
  args.seeds = args.seeds or (2 if args.quick else 3 if args.real else 5)
  args.out = args.out or Path('runs', 'budgets_real' if args.real else 'budgets')
  results = compare.each_task(run_task, args)
  publish(args, results)
  print(f'Results: {args.out}/README.md, results.json, records.jsonl, drift.png')
  return results


if __name__ == '__main__':
  main()
