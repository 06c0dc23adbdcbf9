"""Results of earlier runs on real models, read again: for tables over several of them."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from suite import real
from suite.choice import ID, OLD, OOD, PEER

Result = dict[str, Any]  # title, before, records and, by layer, sizes of a task


def before(task: str, start: Mapping[str, Any]) -> Result:
  """Scores of the start; some earlier results lack the one of what the model could before."""
  old = start.get('old', start['OOD'] if task not in real.OTHER_DATA else None)
  return {ID: start['ID'], OOD: start['OOD']} | ({} if old is None else {OLD: old})


def read(folders: Sequence[Path]) -> dict[str, Result]:
  """The results of all tasks in these folders.

  A task may be in several, each with other methods; of equal configurations the first counts.

  Raises:
    ValueError: for results that cannot be in one table.
  """
  found: dict[str, Result] = {}
  for folder in folders:
    document = json.loads((folder / 'results.json').read_text())
    settings = document['settings']
    if 'layers' not in settings or 'protocols' not in settings:
      raise ValueError(f'{folder}: expected results of compare.py --real')
    for name, title in settings['tasks'].items():
      start = document['results'][name]['pre-trained']
      result = {
        'title': title,
        'protocol': settings['protocols'][name],
        'before': before(name, start),
        'sizes': settings['layers'][name],
      }
      known = found.setdefault(name, {**result, 'records': {}})
      known['before'] = result['before'] | known['before']  # one may lack the score of the old
      result['before'] = known['before'] | result['before']
      if differ := [key for key, value in result.items() if known[key] != value]:
        raise ValueError(f'{folder}: {name} differs from that of another folder in {differ}')
    for line in (folder / 'records.jsonl').read_text().splitlines():
      record = json.loads(line)
      task = record.pop('task')
      if OLD not in record:  # as in results of earlier versions
        record[OLD] = real.on_old(task, record['sets'])
      key = json.dumps([record['method'], record['setting'], record['rate']])
      found[task]['records'].setdefault(key, record)
  for name, result in found.items():
    result['records'] = list(result['records'].values())
    if PEER not in {record['method'] for record in result['records']}:
      raise ValueError(f'{name}: all are compared with {PEER}, and there is none')
  return found
