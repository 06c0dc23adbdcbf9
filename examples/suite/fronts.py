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


def points(
  records: Sequence[Record], method: str, setting: Mapping[str, float] | None = None
) -> np.ndarray:
  """(ID, OOD) of every configuration of a method, of one setting or all: [n, 2], seeds' means."""
  found = [
    (choice.mean(record, ID), choice.mean(record, OOD))
    for record in records
    if base(record) == method
    and (setting is None or setting == {k: v for k, v in record['setting'].items() if k != 'alpha'})
  ]
  return np.array(found).reshape(-1, 2)


def front(found: np.ndarray, levels: np.ndarray) -> np.ndarray:
  """The best OOD of a configuration whose ID is at least so much; NaN where there is none."""
  best = [found[found[:, 0] >= level, 1] for level in levels]
  return np.array([values.max() if len(values) else np.nan for values in best])


def differences(
  records: Sequence[Record], method: str, setting: Mapping[str, float] | None = None
) -> np.ndarray:
  """A method's front minus Adam's at each of the levels `BELOW`."""
  adam, own = points(records, PEER), points(records, method, setting)
  levels = adam[:, 0].max() - np.array(BELOW)
  return front(own, levels) - front(adam, levels)


def table(
  records: Mapping[str, Sequence[Record]], defaults: Mapping[str, Mapping[str, float]]
) -> dict[str, dict[str, Any]]:
  """A row for each method, with all its settings, and for those in `defaults` one more without.

  `best ID − Adam` and `OOD − Adam` have one value per task, the latter a mean over the levels
  that the method reaches. The other columns are means over tasks at one level.
  """
  methods = dict.fromkeys(base(record) for each in records.values() for record in each)
  rows = {}
  for method in methods:
    for setting in (None, defaults[method]) if method in defaults else (None,):
      found = np.array([differences(each, method, setting) for each in records.values()])
      reached = [
        points(each, method, setting)[:, 0].max() - points(each, PEER)[:, 0].max()
        for each in records.values()
      ]
      configurations = max(len(points(each, method, setting)) for each in records.values())
      row: dict[str, Any] = {'configurations': str(configurations), 'best ID − Adam': reached}
      row['OOD − Adam'] = [float(np.nanmean(each)) for each in found if not np.isnan(each).all()]
      for level, values in zip(BELOW, found.T, strict=True):
        known = values[~np.isnan(values)]
        mean = f'{known.mean():.1f}' if len(known) else '–'
        row[f'at −{level:g}'] = mean + (f' ({len(known)})' if 0 < len(known) < len(found) else '')
      rows[method if setting is None else f'{method}, default'] = row
  return dict(sorted(rows.items(), key=lambda row: -np.mean(row[1]['OOD − Adam'])))
