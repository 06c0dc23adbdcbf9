"""Results of earlier runs, read again: for tables over several of them."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from suite.choice import ID, OOD, Record

Result = dict[str, Any]  # title, before, records and perhaps sizes of a task


def configuration(record: Record) -> str:
  """What tells a record from the others of its task."""
  return json.dumps([record['method'], record['setting'], record['rate']])


def read(folders: Sequence[Path]) -> dict[str, Result]:
  """The results of all tasks in these folders.

  A task may be in several, each with other methods; of equal configurations the first counts.
  """
  found: dict[str, Result] = {}
  for folder in folders:
    document = json.loads((folder / 'results.json').read_text())
    sizes = document['settings'].get('layers', {})
    for name, title in document['settings']['tasks'].items():
      start = document['results'][name]['pre-trained']
      result = found.setdefault(
        name, {'title': title, 'before': {ID: start['ID'], OOD: start['OOD']}, 'records': []}
      )
      if name in sizes:
        result['sizes'] = sizes[name]
    for line in (folder / 'records.jsonl').read_text().splitlines():
      record = json.loads(line)
      records = found[record.pop('task')]['records']
      if configuration(record) not in map(configuration, records):
        records.append(record)
  return found
