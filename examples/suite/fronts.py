"""Fronts: what a method keeps out of distribution at equal accuracy in it.

A method's front runs over all its learning rates, its settings, and all α of WiSE-FT on top of it.
"""

from collections.abc import Mapping, Sequence
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


def points(records: Sequence[Record], method: str) -> np.ndarray:
  """(ID, OOD) of every configuration of a method, means over seeds: [n, 2]."""
  found = [record for record in records if base(record) == method]
  return np.array([(choice.mean(record, ID), choice.mean(record, OOD)) for record in found])


def front(found: np.ndarray, levels: np.ndarray) -> np.ndarray:
  """The best OOD of a configuration whose ID is at least so much; NaN where there is none."""
  best = [found[found[:, 0] >= level, 1] for level in levels]
  return np.array([values.max() if len(values) else np.nan for values in best])


def differences(records: Sequence[Record], method: str) -> np.ndarray:
  """A method's front minus Adam's at each of the levels `BELOW`."""
  adam, own = points(records, PEER), points(records, method)
  levels = adam[:, 0].max() - np.array(BELOW)
  return front(own, levels) - front(adam, levels)


def table(records: Mapping[str, Sequence[Record]]) -> dict[str, dict[str, Any]]:
  """A row for each method.

  For each task: the best ID minus Adam's, and the mean difference of the fronts over the levels
  that the method reaches, with their number. Of several tasks also both with one value per task,
  and the number of levels, where the method reaches some on each. Fronts are chosen on test data,
  for all alike.
  """
  rows: dict[str, dict[str, Any]] = {}
  gains: dict[str, list[tuple[float, float, int]]] = {}
  counts: dict[str, int] = {}
  for task, each in records.items():
    best = points(each, PEER)[:, 0].max()
    for method in dict.fromkeys(map(base, each)):
      own, found = points(each, method), differences(each, method)
      known = found[~np.isnan(found)]
      row = rows.setdefault(method, {})
      counts[method] = counts.get(method, 0) + len(own)
      row['configurations'] = str(counts[method])
      row[f'{task}: best ID − Adam'] = f'{own[:, 0].max() - best:.1f}'
      mean = f'{known.mean():.1f} ({len(known)} of {len(found)})' if len(known) else '–'
      row[f'{task}: OOD − Adam'] = mean
      if len(known):
        gains.setdefault(method, []).append((own[:, 0].max() - best, known.mean(), len(known)))
  for method, found in gains.items() if len(records) > 1 else ():
    if len(found) == len(records):
      of_id, of_ood, levels = zip(*found, strict=True)
      rows[method] |= {'best ID − Adam': list(of_id), 'OOD − Adam': list(of_ood)}
      rows[method]['levels'] = f'{sum(levels)} of {len(BELOW) * len(records)}'
  return rows
