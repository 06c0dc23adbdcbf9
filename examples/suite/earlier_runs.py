"""Results of earlier runs on real models, read again: for tables over several of them."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from suite.choice import ID, OOD, PEER

Result = dict[str, Any]  # title, before, records and, by layer, sizes of a task


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
        'before': {ID: start['ID'], OOD: start['OOD']},
        'sizes': settings['layers'][name],
      }
      known = found.setdefault(name, {**result, 'records': {}})
      if differ := [key for key, value in result.items() if known[key] != value]:
        raise ValueError(f'{folder}: {name} differs from that of another folder in {differ}')
    for line in (folder / 'records.jsonl').read_text().splitlines():
      record = json.loads(line)
      key = json.dumps([record['method'], record['setting'], record['rate']])
      found[record.pop('task')]['records'].setdefault(key, record)
  for name, result in found.items():
    result['records'] = list(result['records'].values())
    if PEER not in {record['method'] for record in result['records']}:
      raise ValueError(f'{name}: all are compared with {PEER}, and there is none')
  return found
