"""What the runs say: which setting a method is given, how the methods rank, and how surely.

A *configuration* is a method with one setting and one learning rate: a record of `jobs.records`.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from scipy import stats

Record = dict[str, Any]
Table = dict[str, dict[str, list[float]]]

PEER = 'Adam'
VALIDATION, ID, OOD, OLD = 'validation', 'id', 'ood', 'old'


def without_diverged(record: Record) -> Record:
  """The record with scores of 0, and no distance, for each seed whose run diverged.

  Such a run has a score or a distance that is not finite. A classifier with NaN for logits
  still names class 0, which may be right; only the distance gives it away.
  """
  columns = [values for values in record.values() if isinstance(values, list)]
  finite = np.isfinite(columns).all(0)

  def kept(values: Sequence[float], other: float | None) -> list[float | None]:
    return [value if good else other for value, good in zip(values, finite, strict=True)]

  scores = {column: kept(record[column], 0.0) for column in (VALIDATION, ID, OOD)}
  sets = {name: kept(values, 0.0) for name, values in record['sets'].items()}
  return record | scores | {'sets': sets, 'moved': kept(record['moved'], None)}


def mean(record: Record, column: str) -> float:
  """Over seeds."""
  return float(np.mean(record[column]))


def by_validation(records: Iterable[Record]) -> Record:
  """The configuration with the best mean score on in-distribution validation data.

  That is how the paper chooses; no out-of-distribution data are seen. Of equals the first.
  """
  return max(records, key=lambda record: mean(record, VALIDATION))


def by_oracle(records: Iterable[Record]) -> Record:
  """The one with the best mean of the test scores in and out of distribution: hindsight."""
  return max(records, key=lambda record: mean(record, ID) + mean(record, OOD))


def of(records: Iterable[Record], method: str, **fixed: Any) -> list[Record]:
  """A method's configurations; with `setting=` or `rate=` only those."""
  return [
    record
    for record in records
    if record['method'] == method and all(record[key] == value for key, value in fixed.items())
  ]


def methods_in(records: Iterable[Record]) -> list[str]:
  """In order of their first appearance."""
  return list(dict.fromkeys(record['method'] for record in records))


Chooser = Callable[[Iterable[Record]], Record]


def chosen(
  records: Sequence[Record], defaults: dict[str, dict[str, float]], choose: Chooser = by_validation
) -> dict[str, Record]:
  """A configuration for each method, and for those in `defaults` one more, without a sweep."""
  found = {}
  for method in methods_in(records):
    found[method] = choose(of(records, method))
    if method in defaults:
      found[f'{method}, default'] = choose(of(records, method, setting=defaults[method]))
  return found


def shown(setting: dict[str, float]) -> str:
  """'λ = 1, m = 0.05'; a number of steps that never comes is left out."""
  short = {'strength': 'λ', 'margin': 'm', 'alpha': 'α', 'decay': 'λ'}
  return ', '.join(
    f'{short.get(name, name)} = {value:g}' for name, value in setting.items() if value < 1e9
  )


Score = Callable[[Record], float]


def scores(tasks: dict[str, dict[str, Record]], score: Score) -> tuple[list[str], np.ndarray]:
  """Methods that every task has, and the score of each: [tasks, methods]."""
  common = [m for m in next(iter(tasks.values())) if all(m in found for found in tasks.values())]
  return common, np.array([[score(found[m]) for m in common] for found in tasks.values()])


def both(record: Record) -> float:
  """The mean of the scores in and out of distribution."""
  return (mean(record, ID) + mean(record, OOD)) / 2


def ranks(values: np.ndarray) -> np.ndarray:
  """1 is the best of its task; equals share: [tasks, methods]."""
  return stats.rankdata(-values, axis=1)


def friedman(values: np.ndarray) -> float:
  """p of Friedman's test that all methods rank alike over the tasks."""
  return float(stats.friedmanchisquare(*values.T).pvalue)


def against(values: np.ndarray, methods: Sequence[str], one: str) -> dict[str, float]:
  """p of Wilcoxon's signed-rank test over tasks of one method against each other, by Holm."""
  at = methods.index(one)
  others = [i for i in range(len(methods)) if i != at]
  p = [_wilcoxon(values[:, at] - values[:, i]) for i in others]
  return dict(zip((methods[i] for i in others), holm(p), strict=True))


def _wilcoxon(differences: np.ndarray) -> float:
  return float(stats.wilcoxon(differences).pvalue) if np.any(differences) else 1.0


def holm(p: Sequence[float]) -> list[float]:
  """Holm's correction for several tests."""
  order = np.argsort(p)
  scaled = np.array(p)[order] * np.arange(len(p), 0, -1)
  corrected = np.empty(len(p))
  corrected[order] = np.minimum(np.maximum.accumulate(scaled), 1)
  return [float(value) for value in corrected]
