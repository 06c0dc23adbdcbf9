"""Fronts: what a method keeps out of distribution at equal accuracy in it.

A method's front runs over all its learning rates, its settings, and all α of WiSE-FT on top of it.
"""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np

from suite import choice
from suite.choice import ID, OOD, PEER, Record
from suite.methods import WISE_FT

BELOW = (0.0, 0.5, 1.0, 2.0, 4.0, 8.0)  # points of ID below the best that Adam reaches


def base(record: Record) -> str:
  """The method that trained the weights."""
  name = str(record['method'])
  return PEER if name == WISE_FT else name.removesuffix(f' + {WISE_FT}')


def points(
  records: Sequence[Record], method: str, setting: Mapping[str, Any] = MappingProxyType({})
) -> np.ndarray:
  """(ID, OOD) of the configurations of a method that have this setting, means over seeds: [n, 2].

  WiSE-FT adds its α to the setting of the method that it goes on from.
  """
  found = [r for r in records if base(r) == method and setting.items() <= r['setting'].items()]
  return np.array([(choice.mean(r, ID), choice.mean(r, OOD)) for r in found]).reshape(-1, 2)


def front(found: np.ndarray, levels: np.ndarray) -> np.ndarray:
  """The best OOD of a configuration whose ID is at least so much; NaN where there is none."""
  best = [found[found[:, 0] >= level, 1] for level in levels]
  return np.array([values.max() if len(values) else np.nan for values in best])


def differences(own: np.ndarray, adam: np.ndarray, below: Sequence[float] = BELOW) -> np.ndarray:
  """A front minus Adam's, at so many points of ID below Adam's best.

  Args:
    own: the `points` of a method.
    adam: those of Adam.
    below: points of ID.
  """
  levels = adam[:, 0].max() - np.array(below)
  return front(own, levels) - front(adam, levels)


def methods(
  records: Mapping[str, Sequence[Record]], default: Mapping[str, Mapping[str, Any]]
) -> dict[str, tuple[str, Mapping[str, Any]]]:
  """By title: each method with all its settings, and again with its default if it has others."""
  found: dict[str, tuple[str, Mapping[str, Any]]] = {}
  every = [record for each in records.values() for record in each]
  for method in dict.fromkeys(map(base, every)):
    found[method] = (method, {})
    trained = {choice.shown(r['setting']) for r in every if r['method'] == method}
    if method in default and len(trained) > 1:
      found[f'{method}, default'] = (method, default[method])
  return found


def table(
  records: Mapping[str, Sequence[Record]],
  default: Mapping[str, Mapping[str, Any]] = MappingProxyType({}),
) -> dict[str, dict[str, Any]]:
  """A row for each method, and for each default.

  The best ID minus Adam's, of a method that ran on all tasks; the mean difference of the fronts
  over the levels that the method reaches, if it reaches some on each task; the number of levels.
  With several tasks there is one value per task, and a column of each task with its levels.
  Fronts are chosen on test data, for all alike.
  """
  adam = {task: points(each, PEER) for task, each in records.items()}
  rows: dict[str, dict[str, Any]] = {}
  for title, (method, setting) in methods(records, default).items():
    own = {task: points(each, method, setting) for task, each in records.items()}
    ran = {task: found for task, found in own.items() if len(found)}
    best = {task: found[:, 0].max() - adam[task][:, 0].max() for task, found in ran.items()}
    gains = {task: differences(found, adam[task]) for task, found in ran.items()}
    known = {task: gain[~np.isnan(gain)] for task, gain in gains.items()}
    row = rows[title] = {'configurations': str(sum(map(len, ran.values())))}
    if len(ran) == len(records):
      row['best ID − Adam'] = [*best.values()]
    if len(ran) == len(records) and all(map(len, known.values())):
      row['OOD − Adam'] = [gain.mean() for gain in known.values()]
    row['levels'] = f'{sum(map(len, known.values()))} of {len(BELOW) * len(ran)}'
    for task, gain in known.items() if len(records) > 1 else ():
      mean = f'{gain.mean():+.1f} ({len(gain)})' if len(gain) else '–'
      row[task] = f'{best[task]:+.1f} / {mean}'
  return rows
