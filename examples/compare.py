"""Compare SPD with its peers at their best, on ten tasks of five kinds.

    python examples/compare.py           # all tasks; resumes where it was interrupted
    python examples/compare.py --quick   # three tasks, a few steps: does it run?

Each task has a model that is pre-trained on something old and learns something new from a
few examples. Every method trains on the same examples in the same order, at four learning
rates from 3e-4 to 1e-2 and over a sweep of its own hyperparameter, five seeds each (each
with its own pre-trained model, training examples and batch order). What a method is given
in the tables is chosen on in-distribution validation data alone; *oracle* columns
show the configuration with the best mean of both test scores, which no one can choose.

Writes to `--out`: `records.jsonl`, a line for each configuration of each task; `results.json`
and `README.md`, the tables; `pareto.png` and `ranks.png`.
"""

import argparse
import json
import multiprocessing
import os
import time
from collections.abc import Callable, Sequence
from concurrent import futures
from pathlib import Path
from typing import Any

import numpy as np

import comparison
import reporting
from suite import cache, choice, classifiers, jobs, pictures, tables, text
from suite.methods import ALPHAS, METHODS, RATES
from suite.tasks import Params, Task

# The slowest first, so that no core waits for another at the end.
TASKS: dict[str, Callable[[], Task]] = {
  'keywords': text.keywords,
  'digits_vit': classifiers.digits_vit,
  'digits_lora': classifiers.digits_lora,
  'code_to_prose': text.code_to_prose,
  'prose_to_code': text.prose_to_code,
  'digits_cnn': classifiers.digits_cnn,
  'digits_in_turn': classifiers.digits_in_turn,
  'digits_mlp': classifiers.digits_mlp,
  'diabetes': classifiers.diabetes,
  'tumours': classifiers.tumours,
}
QUICK = ('digits_mlp', 'code_to_prose', 'tumours')


DEFAULTS = {
  'projection_decay': comparison.DEFAULT,
  'adam_spd': comparison.ADAM_SPD,
}

Result = dict[str, Any]  # title, before, records of a task


def run_task(name: str, args: argparse.Namespace) -> Result:
  """All methods on one task, as far as they are not in the cache."""
  task = scaled(TASKS[name](), args.quick)
  start_from = foundation(name, task, args)
  common = {
    'seeds': args.seeds,
    'rates': args.rates,
    'steps': task.steps,
    'pretrain_steps': task.pretrain_steps,
    'alphas': ALPHAS,
  }
  before = jobs.measure(task, start_from, np.arange(args.seeds), args.seeds)
  records = []
  for i, (title, method) in enumerate(METHODS.items()):
    start = time.perf_counter()
    records += cache.records(
      args.out / 'cache' / name / f'{i:02} {title}.json',
      cache.digest(TASKS[name], method.optimizer, method=method[1:], **common),
      lambda: jobs.run(task, title, method, args.rates, start_from, args.seeds, task.steps),  # noqa: B023
    )
    print(f'{name}: {title}, {time.perf_counter() - start:.0f} s', flush=True)
  pretrained = {'id': before['id'].tolist(), 'ood': np.mean([*before['ood'].values()], 0).tolist()}
  records = [choice.without_diverged(record) for record in records]
  return {'title': task.title, 'before': pretrained, 'records': records}


def foundation(name: str, task: Task, args: argparse.Namespace) -> Params:
  """The pre-trained models of a task, from the cache if they are there."""
  return cache.params(
    args.out / 'cache' / name / 'foundation',
    cache.digest(TASKS[name], jobs.pretrain, seeds=args.seeds, pretrain_steps=task.pretrain_steps),
    lambda: jobs.pretrain(task, args.seeds, task.pretrain_steps),
  )


def scaled(task: Task, quick: bool) -> Task:
  """The task, with few steps if it is to be quick."""
  return task._replace(steps=20, pretrain_steps=40) if quick else task


def each_task(
  run: Callable[[str, argparse.Namespace], Any], args: argparse.Namespace
) -> dict[str, Any]:
  """Runs all tasks, as many at a time as there are cores: a small model keeps only one busy."""
  spawn = multiprocessing.get_context('spawn')
  with futures.ProcessPoolExecutor(args.workers, spawn, max_tasks_per_child=1) as pool:
    running = {name: pool.submit(run, name, args) for name in args.tasks}
    return {name: future.result() for name, future in running.items()}


def publish(args: argparse.Namespace, results: dict[str, Result]) -> None:
  """Writes and prints everything."""
  titles = {name: result['title'] for name, result in results.items()}
  before = {name: result['before'] for name, result in results.items()}
  records = {name: result['records'] for name, result in results.items()}
  best = {name: choice.chosen(found, DEFAULTS) for name, found in records.items()}
  found = tables.all_of(records, before, best, DEFAULTS)
  for name, table in found.items():
    reporting.show(titles.get(name, name), table)
  methods, values = choice.scores(best, choice.both)
  settings = {
    'tasks': titles,
    'seeds': args.seeds,
    'rates': args.rates,
    'friedman': choice.friedman(values),
  }
  reporting.write_json(args.out / 'results.json', settings, found)
  (args.out / 'README.md').write_text(tables.page(titles, found))
  with (args.out / 'records.jsonl').open('w') as file:
    for name, each in records.items():
      lines = (json.dumps({'task': name} | record, allow_nan=False) for record in each)
      file.writelines(line + '\n' for line in lines)
  pictures.pareto(args.out / 'pareto.png', titles, records, before, best)
  pictures.ranks(args.out / 'ranks.png', methods, choice.ranks(values))


def main(arguments: Sequence[str] | None = None) -> dict[str, Result]:
  """Runs what the command line says."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--quick', action='store_true', help='three tasks, a few steps, two seeds')
  parser.add_argument('--tasks', nargs='+', choices=TASKS, metavar='TASK', help=', '.join(TASKS))
  parser.add_argument('--seeds', type=int, help='default: 5')
  parser.add_argument('--workers', type=int, default=os.cpu_count(), help='tasks at a time')
  parser.add_argument('--out', type=Path, default=Path('runs/compare'), help='default: %(default)s')
  args = parser.parse_args(arguments)
  args.tasks = args.tasks or list(QUICK if args.quick else TASKS)
  args.seeds = args.seeds or (2 if args.quick else 5)
  args.rates = RATES[1:3] if args.quick else RATES
  results = each_task(run_task, args)
  publish(args, results)
  print(f'Results: {args.out}/README.md, results.json, records.jsonl, pareto.png, ranks.png')
  return results


if __name__ == '__main__':
  main()
