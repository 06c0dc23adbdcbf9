"""Compare SPD with its peers at their best, on ten small tasks and on larger pre-trained models.

    python examples/compare.py           # ten tasks of five kinds; resumes where it was interrupted
    python examples/compare.py --quick   # three tasks, a few steps: does it run?
    python examples/compare.py --real    # six tasks of larger models; best on a GPU
    python examples/compare.py --from A B --out C   # tables over the results of two such runs

Each of the ten tasks has a model that is pre-trained on something old and learns something new from
a few examples. Every method trains on the same examples in the same order, at four learning
rates from 3e-4 to 1e-2 and over a sweep of its own hyperparameter, five seeds each (each
with its own pre-trained model, training examples and batch order). What a method is given
in the tables is chosen on in-distribution validation data alone; *oracle* columns
show the configuration with the best mean of both test scores, which no one can choose.

With --real there are two kinds. Four tasks have models that are loaded from packages: each seed
has its own examples, batch order and linear probe to start from. The models of `letters_vit` and
`keywords_t5`, of 3 million weights, are pre-trained here, one for each seed. All have three seeds,
rates of their own over a range of 30 to 100, a warm-up over a tenth of the steps and a cosine
decay.

Writes to `--out`: `records.jsonl`, a line for each configuration of each task; `results.json`
and `README.md`, the tables; `pareto.png` and `ranks.png`; of real models `fronts.png`, of one
`held.png`, of several `headline.png`.
"""

import argparse
import importlib
import json
import multiprocessing
import time
from collections.abc import Callable, Sequence
from concurrent import futures
from pathlib import Path
from typing import Any

import jax
import numpy as np

import comparison
import reporting
import spd_optax as spd
from suite import cache, choice, earlier_runs, jobs, learned, methods, pictures, real, tables
from suite.earlier_runs import Result
from suite.methods import Method
from suite.tasks import Params, Task, cosine, in_bfloat16

# By the module of the suite that makes them. The slowest first, so that no core waits for another
# at the end.
TASKS = {
  'keywords': 'text',
  'digits_vit': 'classifiers',
  'digits_lora': 'classifiers',
  'code_to_prose': 'text',
  'prose_to_code': 'text',
  'digits_cnn': 'classifiers',
  'digits_in_turn': 'classifiers',
  'digits_mlp': 'classifiers',
  'diabetes': 'classifiers',
  'tumours': 'classifiers',
}
REAL = {
  'minilm_tense': 'minilm',
  'minilm_voice': 'minilm',
  'handwriting': 'efficientnet',
  'digits_by_hand': 'efficientnet',
  'letters_vit': 'printed',
  'keywords_t5': 'text',
}
QUICK = ('digits_mlp', 'code_to_prose', 'tumours')
DEFAULTS = {
  'projection_decay': comparison.DEFAULT,
  'adam_spd': comparison.ADAM_SPD,
  'SignificantProjection': {'z': spd.SignificantProjection.z},
}

ALL = TASKS | REAL
METHODS = dict.fromkeys((*methods.METHODS, *learned.METHODS, *real.METHODS))


def maker(name: str) -> Callable[[], Task]:
  """The function that makes a task; text has more to import than other tasks need."""
  made: Callable[[], Task] = getattr(importlib.import_module(f'suite.{ALL[name]}'), name)
  return made


def compared(args: argparse.Namespace) -> dict[str, Method]:
  """The methods that the command line says."""
  usual = real.METHODS if args.real else methods.METHODS
  found = usual if args.real else usual | learned.METHODS
  return {name: each for name, each in found.items() if name in (args.methods or usual)}


def run_task(name: str, args: argparse.Namespace) -> Result:
  """All methods on one task, as far as they are not in the cache."""
  task = scaled(maker(name)(), args.quick, args.no_warmup, args.steps)
  start_from = foundation(name, task, args)
  rates = args.rates or task.rates
  common = {
    'seeds': args.seeds,
    'rates': rates,
    'steps': task.steps,
    'pretrain_steps': task.pretrain_steps,
    'at_once': args.at_once,
    'bfloat16': args.bfloat16,
    'pace': task.pace,
  }
  task = in_bfloat16(task) if args.bfloat16 else task
  before = jobs.measure(task, start_from, np.arange(args.seeds), args.seeds)
  records = []
  for title, method in compared(args).items():
    start = time.perf_counter()
    key = cache.digest(maker(name), jobs.run, method.optimizer, method=method[1:], **common)
    path = args.out / 'cache' / name / f'{title}.json'
    records += jobs.run(
      *(task, title, method, rates, start_from, args.seeds, task.steps, args.at_once),
      lambda part, make: cache.records(path.with_suffix(f'.{part}.json'), key, make),  # noqa: B023
    )
    print(f'{name}: {title}, {time.perf_counter() - start:.0f} s', flush=True)
  pretrained = {'id': before['id'].tolist(), 'ood': np.mean([*before['ood'].values()], 0).tolist()}
  records = [choice.without_diverged(record) for record in records]
  if args.real:
    pretrained['old'] = real.on_old(name, before['ood'])
    records = [record | {'old': real.on_old(name, record['sets'])} for record in records]
  found = {
    'title': task.title,
    'protocol': {'seeds': args.seeds, 'steps': task.steps, 'pace': task.pace}
    | ({'compute': 'bfloat16'} if args.bfloat16 else {}),
    'before': pretrained,
    'records': records,
  }
  if not task.by_layer:
    return found
  sizes = {
    jax.tree_util.keystr(path, simple=True, separator='/'): x[0].size
    for path, x in jax.tree.leaves_with_path(start_from)
  }
  return found | {'sizes': sizes}


def foundation(name: str, task: Task, args: argparse.Namespace) -> Params:
  """The pre-trained models of a task; from the cache if they were made here."""
  if task.pretrained:
    return jobs.load(task, args.seeds)
  return cache.params(
    args.out / 'cache' / name / 'foundation',
    cache.digest(maker(name), jobs.pretrain, seeds=args.seeds, pretrain_steps=task.pretrain_steps),
    lambda: jobs.pretrain(task, args.seeds, task.pretrain_steps),
  )


def scaled(task: Task, quick: bool, no_warmup: bool = False, steps: int | None = None) -> Task:
  """The task, with few steps if it is to be quick; with the decay of results/real alone; or with
  so many steps for each of its stages.
  """
  task = task._replace(pace=cosine(0, 10)) if no_warmup else task
  task = task._replace(steps=30, pretrain_steps=40) if quick else task
  return task._replace(steps=steps or task.steps)


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
  run = {record['method'] for found in records.values() for record in found}
  defaults = {method: setting for method, setting in DEFAULTS.items() if method in run}
  if args.real:  # other methods of SPD have one setting there
    defaults = {method: x for method, x in defaults.items() if method == 'projection_decay'}
  best = {name: choice.chosen(found, defaults) for name, found in records.items()}
  found = tables.all_of(records, before, best, defaults)
  sizes = {name: result['sizes'] for name, result in results.items() if 'sizes' in result}
  if sizes:
    found = tables.of_real_models(records, before, sizes, defaults) | found
  for name, table in found.items():
    reporting.show(titles.get(name, name), table)
  methods, values = choice.scores(best, choice.both)
  settings = {
    'tasks': titles,
    'rates': {name: sorted({r['rate'] for r in found}) for name, found in records.items()},
    'friedman': choice.friedman(values) if min(values.shape) > 2 else None,
    'protocols': {name: result['protocol'] for name, result in results.items()},
    'layers': sizes,
  }
  reporting.write_json(args.out / 'results.json', settings, found)
  (args.out / 'README.md').write_text(tables.page(title(results), titles, found))
  if not args.folders:  # these have them
    with (args.out / 'records.jsonl').open('w') as file:
      for name, each in records.items():
        lines = (json.dumps({'task': name} | record, allow_nan=False) for record in each)
        file.writelines(line + '\n' for line in lines)
  pictures.pareto(args.out / 'pareto.png', titles, records, before, best)
  pictures.ranks(args.out / 'ranks.png', methods, choice.ranks(values))
  if sizes:
    pictures.front_curves(args.out / 'fronts.png', titles, records, defaults)
  if len(sizes) > 1:
    pictures.headline(args.out / 'headline.png', found['headline'], list(records))
  elif found.get('kinds'):
    ((task, of_task),) = titles.items()
    pictures.held(args.out / 'held.png', f'{task}: {of_task}', found['kinds'])
  print(f'Results, and pictures of them: {args.out}')


def title(results: dict[str, Result]) -> str:
  """Of the page of tables."""
  (of,) = {'Real models' if 'sizes' in result else 'Small tasks' for result in results.values()}
  computed = {result['protocol'].get('compute') for result in results.values()} - {None}
  return ', '.join([of, *(f'computed in {width}' for width in computed)])


def main(arguments: Sequence[str] | None = None) -> dict[str, Result]:
  """Runs what the command line says."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--quick', action='store_true', help='three tasks, a few steps, two seeds')
  parser.add_argument('--real', action='store_true', help='larger models on real data')
  parser.add_argument('--no-warmup', action='store_true', help='of real models: only the decay')
  parser.add_argument('--tasks', nargs='+', choices=ALL, metavar='TASK', help=', '.join(ALL))
  parser.add_argument(
    '--methods',
    nargs='+',
    choices=METHODS,
    metavar='METHOD',
    help='Adam and some; default: all but those of suite/learned.py',
  )
  parser.add_argument(
    '--from',
    dest='folders',
    nargs='+',
    type=Path,
    metavar='FOLDER',
    help='make tables of the results in these folders, of real models; trains nothing',
  )
  parser.add_argument(
    '--bfloat16',
    action='store_true',
    help='compute losses of small tasks in bfloat16; weights stay float32',
  )
  parser.add_argument('--seeds', type=int, help='default: 5, of real models 3')
  parser.add_argument('--steps', type=int, help='of fine-tuning; default: those of each task')
  parser.add_argument('--rates', type=float, nargs='+', help='default: those of each task')
  parser.add_argument('--workers', type=int, help='tasks at a time; default: one for each core')
  parser.add_argument(
    '--at-once', type=int, help='configurations at a time; fewer need less memory; default: all'
  )
  parser.add_argument('--out', type=Path, help='default: runs/compare, of real models runs/real')
  args = parser.parse_args(arguments)
  if args.folders:
    others = [args.quick, args.real, args.no_warmup, args.bfloat16, args.tasks, args.methods]
    others += [args.seeds, args.steps, args.rates, args.workers, args.at_once]
    if not args.out or any(x is not None and x is not False for x in others):
      parser.error('--from needs --out, and has no other options')
    args.real = True
    results = earlier_runs.read(args.folders)
    publish(args, results)
    return results
  if args.steps is not None and args.steps < 1:
    parser.error(f'--steps: expected at least 1, found {args.steps}')
  args.tasks = args.tasks or list(REAL if args.real else QUICK if args.quick else TASKS)
  if {name in REAL for name in args.tasks} != {args.real}:
    parser.error('tasks on real models need --real, and other tasks are not compared with them')
  if args.bfloat16 and args.real:
    parser.error('--bfloat16: --real has models that read pictures in float32')
  if args.no_warmup and not args.real:
    parser.error('--no-warmup needs --real: other tasks have a constant learning rate')
  if choice.PEER not in (args.methods or [choice.PEER]):
    parser.error(f'--methods: all are compared with {choice.PEER}, so name it, too')
  args.out = args.out or Path('runs', 'real' if args.real else 'compare')
  args.seeds = args.seeds or (2 if args.quick else 3 if args.real else 5)
  suite_rates = () if args.real else methods.RATES
  args.rates = args.rates or (suite_rates[1:3] if args.quick else suite_rates)
  for name in args.tasks if args.real else ():
    maker(name)()  # builds its files here, before several processes need them
  results = each_task(run_task, args)
  publish(args, results)
  return results


if __name__ == '__main__':
  main()
