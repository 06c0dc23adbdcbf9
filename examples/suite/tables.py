"""The suite's tables: one for each task, one over all tasks, one by learning rate."""

import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

import reporting
from suite import choice, defaults, fronts
from suite.choice import ID, OLD, OOD, Record
from suite.methods import SPD, WISE_FT

Table = dict[str, dict[str, Any]]
Found = Mapping[str, Mapping[str, Record]]  # task -> method -> its chosen configuration


def all_of(
  records: Mapping[str, Sequence[Record]],
  before: Mapping[str, Mapping[str, Any]],
  best: Found,
  default: Mapping[str, Any],
) -> dict[str, Table]:
  """Every table by name: of each task, 'overall', 'hindsight', of defaults 'rates' and 'settings'.

  'rates' is left out where tasks have different ones.
  """
  found = {}
  for task, each in records.items():
    known = {'setting': '–', 'rate': '–'} | _columns(before[task])
    found[task] = {'pre-trained': known} | of_task(each, default)
  found['overall'] = overall(best)
  rates = [{record['rate'] for record in each} for each in records.values()]
  if default and all(each == rates[0] for each in rates):
    found['rates'] = by_rate(records, {choice.PEER: {}, **default})
  if default:
    found['settings'] = defaults.table(records, list(default))
  return found | {'hindsight': hindsight(records, best)}


def of_real_models(
  records: Mapping[str, Sequence[Record]],
  before: Mapping[str, Mapping[str, Any]],
  sizes: Mapping[str, Mapping[str, int]],
  default: Mapping[str, Any],
) -> dict[str, Table]:
  """More tables, for models with layers worth telling apart."""
  found = {'fronts': fronts.table(records, default)}
  if len(records) > 1:
    found['rules'] = defaults.among_rules(records)
  same_rate = like_adam(records, default)
  return found | {
    'each_rate': each_rate(records, before),
    'at_adams_rate': at_adams_rate(records),
    'headline': _minus_adam(same_rate),
    'scores': scores(same_rate, before),
    'sets': each_set(same_rate),
    'sizes': by_size(records, sizes),
    'kinds': by_kind(records, sizes),
  }


BOTH = (('ID', ID), ('OOD', OOD))  # by their titles
ALL = (('ID', ID), ('old', OLD), ('OOD', OOD))
HELD = 'held by '  # and a method: a column
# Of blocks, in the path of a layer.
NUMBERS = re.compile(r'^(block|layer)_\d+/|_\d+(?=/|$)|(/(block|layer))?/\d+(?=/)')
SIZES = (100, 1_000, 10_000, 100_000, 10**9)


def held_shares(records: Sequence[Record]) -> dict[str, Mapping[str, Sequence[float]]]:
  """Share of the steps in % in which each layer was held by each function and rule of SPD.

  All have the learning rate that validation chose for Adam.
  """
  rate = choice.by_validation(choice.of(records, choice.PEER))['rate']
  found = [
    r for r in records if 'layers' in r and r['method'].startswith(SPD) and r['rate'] == rate
  ]
  names = [r['method'] for r in found]
  return {
    f'{HELD}{r["method"]}'
    + (f', {choice.shown(r["setting"])}' if names.count(r['method']) > 1 else ''): r['layers']
    for r in found
  }


def by_size(
  records: Mapping[str, Sequence[Record]],
  sizes: Mapping[str, Mapping[str, int]],
) -> Table:
  """How often layers of a size were held.

  Args:
    records: by task.
    sizes: by task, the number of weights of each layer.
  """
  table: Table = {}
  for task, each in records.items():
    found = held_shares(each)
    for low, high in pairwise((0, *SIZES)):
      layers = [name for name, size in sizes[task].items() if low < size <= high]
      if layers and found:
        title = f'{task}, up to {high:,} weights' if high < 10**9 else f'{task}, more'
        table[title] = {'layers': str(len(layers)), **_held(found, layers)}
  return table


def by_kind(
  records: Mapping[str, Sequence[Record]],
  sizes: Mapping[str, Mapping[str, int]],
) -> Table:
  """How often layers of a kind were held; a kind is a path without the numbers of its blocks."""
  table: Table = {}
  for task, each in records.items():
    found, kinds = held_shares(each), {}
    for name in sizes[task]:
      kinds.setdefault(NUMBERS.sub('', name), []).append(name)
    for kind, layers in kinds.items() if found else ():
      few, many = (f([sizes[task][name] for name in layers]) for f in (min, max))
      weights = f'{few:,}' if few == many else f'{few:,} to {many:,}'
      table[f'{task}, {kind}'] = {
        'layers': str(len(layers)),
        'weights of each': weights,
        **_held(found, layers),
      }
  return table


def _held(
  found: Mapping[str, Mapping[str, Sequence[float]]], layers: Sequence[str]
) -> dict[str, list[float]]:
  return {title: [float(np.mean(of[name])) for name in layers] for title, of in found.items()}


def each_rate(
  records: Mapping[str, Sequence[Record]], before: Mapping[str, Mapping[str, Any]]
) -> Table:
  """Both scores of each method and setting, WiSE-FT only after Adam, at each learning rate."""
  table: Table = {}
  for task, each in records.items():
    start = f'{task}: ' if len(records) > 1 else ''
    rates = sorted({record['rate'] for record in each})
    table[f'{start}pre-trained'] = {
      f'{title}, {rate:g}': before[task][column] for rate in rates for title, column in BOTH
    }
    for record in each:
      if not record['method'].endswith(f'+ {WISE_FT}'):
        setting = choice.shown(record['setting'])
        row = table.setdefault(start + ', '.join(filter(None, (record['method'], setting))), {})
        row |= {f'{title}, {record["rate"]:g}': record[column] for title, column in BOTH}
  return table


TITLES = {
  'fronts': 'Fronts: what a method keeps at equal accuracy, over all its rates, settings and α',
  'rules': 'Functions and rules of SPD; the last row is chosen without the task it is scored on',
  'each_rate': 'Every setting at every learning rate',
  'at_adams_rate': 'Minus Adam, at the rate that validation chose for Adam',
  'headline': 'The same of methods that ran on all tasks, at their default or as validation chose',
  'scores': 'Their scores: of the new task, and of what the model could before',
  'sets': 'By test set out of distribution: the score of Adam, and the others minus it',
  'sizes': 'Share of the steps in % in which layers were held, by size, at the rate of Adam',
  'kinds': 'The same by kind: paths without the numbers of their blocks',
  'overall': 'What validation chose, over all tasks',
  'rates': 'Learning rates, means over tasks',
  'settings': 'Settings, and which of them is the default',
  'hindsight': 'In hindsight: the best OOD of a configuration that costs at most a point of ID',
}


def at_adams_rate(records: Mapping[str, Sequence[Record]]) -> Table:
  """Each method and setting minus Adam, both at the rate that validation chose for Adam.

  One value per task, or per seed where there is one task. A row is of the tasks that have it.
  """
  found = {}
  for task, each in records.items():
    of_setting = ((record, choice.shown(record['setting'])) for record in _at_its_rate(each))
    found[task] = {', '.join(filter(None, (r['method'], shown))): r for r, shown in of_setting}
  return _minus_adam(found)


def like_adam(
  records: Mapping[str, Sequence[Record]], default: Mapping[str, Any]
) -> dict[str, dict[str, Record]]:
  """By task and method, the configuration at the rate that validation chose for Adam.

  Validation chooses the setting of a method on each task; one in `default` has that setting.
  Methods that did not run on all tasks are left out.
  """
  found = {}
  for task, each in records.items():
    one_setting = [
      r for r in _at_its_rate(each) if r['setting'] == default.get(r['method'], r['setting'])
    ]
    found[task] = choice.chosen(one_setting, {})
  everywhere = set.intersection(*(set(each) for each in found.values()))
  return {
    task: {name: each[name] for name in each if name in everywhere} for task, each in found.items()
  }


def _at_its_rate(records: Sequence[Record]) -> list[Record]:
  """Those at the rate that validation chose for Adam; without WiSE-FT after another method."""
  rate = choice.by_validation(choice.of(records, choice.PEER))['rate']
  return [r for r in records if r['rate'] == rate and not r['method'].endswith(f'+ {WISE_FT}')]


def scores(found: Found, before: Mapping[str, Mapping[str, Any]]) -> Table:
  """A row for each method, and one for the start: on each task both scores, new and old."""
  starts = {task: {'pre-trained': each} for task, each in before.items() if OLD in each}
  table: Table = {}
  for task, each in found.items():
    for method, record in (starts.get(task, {}) | each).items():
      both = (np.mean(record[column]) for column in (ID, OLD))
      table.setdefault(method, {})[task] = ' / '.join(f'{score:.1f}' for score in both)
  return table


def each_set(found: Found) -> Table:
  """A row for each test set out of distribution: Adam's score, and that of others minus it."""
  table: Table = {}
  for task, each in found.items():
    peer = each[choice.PEER]['sets']
    for name, score in peer.items():
      row = table[f'{task}: {name}'] = {choice.PEER: score}
      for method, record in each.items():
        if method != choice.PEER:
          row[f'{method} − Adam'] = np.subtract(record['sets'][name], score).tolist()
  return table


def _minus_adam(found: Found) -> Table:
  """A row for each title, of the tasks that have it: one value per task, or per seed of one task.

  With several tasks, a column of each has the means: new / old. One task has no column of the old
  if its sets out of distribution ask for nothing else.
  """
  table: Table = {}
  one = len(found) == 1
  records = (record for each in found.values() for record in each.values())
  columns = ALL if not one or any(map(_has_both, records)) else BOTH
  for title in dict.fromkeys(title for each in found.values() for title in each):
    gains = {
      task: np.subtract(
        [each[title][column] for _, column in columns],
        [each[choice.PEER][column] for _, column in columns],
      )
      for task, each in found.items()
      if title in each
    }
    means = {task: gain.mean(1) for task, gain in gains.items()}
    values = next(iter(gains.values())) if one else np.array([*means.values()]).T
    table[title] = {
      f'{name} − Adam': each.tolist() for (name, _), each in zip(columns, values, strict=True)
    }
    if not one:
      table[title] |= {task: f'{new:+.1f} / {old:+.1f}' for task, (new, old, _) in means.items()}
  return table


def page(
  title: str, titles: Mapping[str, str], found: Mapping[str, Table], script: str = 'compare.py'
) -> str:
  """All tables as Markdown."""
  titles = TITLES | dict(titles)
  parts = [f'## {titles.get(name, name)}\n\n{reporting.markdown(found[name])}\n' for name in found]
  return '\n'.join(
    [f'# {title}\n\nMade by `examples/{script}`, which says what is what.\n', *parts]
  )


def of_task(records: Sequence[Record], defaults: Mapping[str, Any]) -> Table:
  """A row for each method: what validation chose, how that did, and the oracle's choice."""
  best = choice.chosen(records, defaults)
  oracle = choice.chosen(records, defaults, choice.by_oracle)
  table: Table = {}
  for method, record in best.items():
    table[method] = {
      'setting': choice.shown(record['setting']) or '–',
      'rate': f'{record["rate"]:g}',
      **_columns(record),
      'moved': [value for value in record['moved'] if value is not None] or '–',
    }
    if 'held' in record:
      table[method]['held'] = record['held']
    table[method] |= {'oracle ID': oracle[method][ID], 'oracle OOD': oracle[method][OOD]}
  return table


def _columns(record: Mapping[str, Any]) -> dict[str, list[float]]:
  """Its scores by title."""
  return {title: record[column] for title, column in (ALL if _has_both(record) else BOTH)}


def _has_both(record: Mapping[str, Any]) -> bool:
  """Whether the sets out of distribution ask for what the model could before, and for more."""
  return OLD in record and not np.allclose(record[OLD], record[OOD], atol=0.01)


def overall(found: Found) -> Table:
  """Each method over all tasks, the best mean of ID and OOD first.

  Ranks are by the mean of ID and OOD; p is of Wilcoxon's signed-rank test over tasks of that
  mean against Adam's, corrected by Holm. Differences are to Adam, with one value per task.
  """
  methods, values = choice.scores(found, choice.both)
  ranks = choice.ranks(values)
  p = choice.against(values, methods, choice.PEER)
  table = {}
  for i in np.argsort(-values.mean(0)):
    method = methods[i]
    table[method] = {
      'rank': ranks[:, i].tolist(),
      'ID': f'{_mean(found, method, ID):.1f}',
      'OOD': f'{_mean(found, method, OOD):.1f}',
      'ID − Adam': _difference(found, method, ID),
      'OOD − Adam': _difference(found, method, OOD),
    }
    if len(found) > 5:  # of fewer tasks no p is small
      table[method]['p'] = f'{p[method]:.3f}' if method in p else '–'
  return table


def hindsight(records: Mapping[str, Sequence[Record]], best: Found, cost: float = 1.0) -> Table:
  """The most that each method could keep out of distribution for a point in it.

  Of the configurations whose ID score is at most `cost` below swept Adam's, the best OOD score
  minus swept Adam's. It is chosen on test data, the same for all; more configurations
  have more to choose from. A method is left out where no configuration of it is good enough.
  """
  table = {}
  for method in choice.methods_in(next(iter(records.values()))):
    gains, sizes = [], set()
    for task, found in records.items():
      adam, own = best[task][choice.PEER], choice.of(found, method)
      sizes.add(len(own))
      floor = choice.mean(adam, ID) - cost
      good = [choice.mean(r, OOD) for r in own if choice.mean(r, ID) >= floor]
      gains += [max(good) - choice.mean(adam, OOD)] if good else []
    if gains:
      table[method] = {
        'OOD − Adam': gains,
        'tasks': f'{len(gains)} of {len(records)}',
        'configurations': f'{max(sizes)}',
      }
  return dict(sorted(table.items(), key=lambda row: -np.mean(row[1]['OOD − Adam'])))


def _mean(found: Found, method: str, column: str) -> float:
  return float(np.mean([choice.mean(best[method], column) for best in found.values()]))


def _difference(found: Found, method: str, column: str) -> list[float]:
  return [
    choice.mean(best[method], column) - choice.mean(best[choice.PEER], column)
    for best in found.values()
  ]


def by_rate(records: Mapping[str, Sequence[Record]], methods: Mapping[str, Any]) -> Table:
  """One setting of each method at every learning rate: means over tasks of ID and OOD.

  Args:
    records: by task.
    methods: by name, the setting.
  """
  table: Table = {}
  for method, setting in methods.items():
    row = table[f'{method} {choice.shown(setting)}'.strip()] = {}
    for column, title in ((ID, 'ID'), (OOD, 'OOD')):
      for rate in sorted({record['rate'] for record in next(iter(records.values()))}):
        values = [
          choice.mean(choice.of(found, method, setting=setting, rate=rate)[0], column)
          for found in records.values()
        ]
        row[f'{title}, {rate:g}'] = f'{np.mean(values):.1f}'
  return table
