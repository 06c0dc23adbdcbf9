"""Which setting of a method should be its default: one for all tasks, by one rule.

The learning rate of each setting is chosen on validation data, task by task. Among the settings
whose mean score in distribution, over tasks, is not below that of swept Adam, the default
is the one with the highest mean out of distribution. How that would do on a task that had
no say in it is measured by leaving out each task in turn.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from suite import choice
from suite.choice import ID, OOD, PEER, Record
from suite.methods import SPD, WISE_FT

Setting = dict[str, float]
ByTask = Mapping[str, Sequence[Record]]


def settings_of(records: ByTask, method: str) -> list[Setting]:
  """A method's settings that all tasks have, in order."""
  first = choice.of(next(iter(records.values())), method)
  settings = [dict(x) for x in dict.fromkeys(tuple(r['setting'].items()) for r in first)]
  return [
    setting
    for setting in settings
    if all(choice.of(found, method, setting=setting) for found in records.values())
  ]


def gains(records: ByTask, method: str, setting: Setting) -> np.ndarray:
  """Scores minus swept Adam's: [tasks, (ID, OOD)]."""

  def scores(found: Sequence[Record]) -> list[float]:
    best = choice.by_validation(found)
    return [choice.mean(best, ID), choice.mean(best, OOD)]

  return np.array(
    [
      np.subtract(scores(choice.of(found, method, setting=setting)), scores(choice.of(found, PEER)))
      for found in records.values()
    ]
  )


def chosen(by_setting: Sequence[np.ndarray]) -> int:
  """The place of the setting that the rule picks; where all cost something, the cheapest."""
  means = [gain.mean(0) for gain in by_setting]
  free = [i for i, (in_distribution, _) in enumerate(means) if in_distribution >= 0]
  if not free:
    return int(np.argmax([in_distribution for in_distribution, _ in means]))
  return max(free, key=lambda i: means[i][1])


def left_out(by_setting: Sequence[np.ndarray]) -> np.ndarray:
  """What the rule gains on each task by the setting that it picks on all others: [tasks, 2]."""
  found = []
  for task in range(len(by_setting[0])):
    others = [np.delete(gain, task, axis=0) for gain in by_setting]
    found.append(by_setting[chosen(others)][task])
  return np.array(found)


def table(records: ByTask, methods: Sequence[str]) -> dict[str, dict[str, Any]]:
  """A row for each setting: its gains over swept Adam, one value per task."""
  rows = {}
  for method in methods:
    settings = settings_of(records, method)
    by_setting = [gains(records, method, setting) for setting in settings]
    best = chosen(by_setting)
    for i, (setting, gain) in enumerate(zip(settings, by_setting, strict=True)):
      mark = ', by the rule' if i == best else ''
      rows[f'{method}: {choice.shown(setting)}{mark}'] = _row(gain)
    if len(records) > 1:
      rows[f'{method}: by the rule, on the other tasks'] = _row(left_out(by_setting))
  return rows


def among_rules(records: ByTask) -> dict[str, dict[str, Any]]:
  """A row for each setting of each function and rule of SPD, and one for the choice among them.

  Candidates are in the results of all tasks.
  """
  candidates = [
    (method, setting)
    for method in choice.methods_in(next(iter(records.values())))
    for setting in settings_of(records, method)
    if method.startswith(SPD) and WISE_FT not in method
  ]
  if len(candidates) < 2:
    return {}
  by_setting = [gains(records, *candidate) for candidate in candidates]
  titles = (', '.join(filter(None, (name, choice.shown(setting)))) for name, setting in candidates)
  rows = {title: _row(gain) for title, gain in zip(titles, by_setting, strict=True)}
  return rows | {'by the rule, on the other tasks': _row(left_out(by_setting))}


def _row(gain: np.ndarray) -> dict[str, Any]:
  return {
    'ID − Adam': gain[:, 0].round(3).tolist(),
    'OOD − Adam': gain[:, 1].round(3).tolist(),
    'medians': ' / '.join(f'{value:.1f}' for value in np.median(gain, axis=0)),
    'tasks with ID below −0.5': f'{np.sum(gain[:, 0] < -0.5)} of {len(gain)}',
  }
