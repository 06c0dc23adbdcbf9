"""The first line of an audit log: every field checked when it is read."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from spd_optax import checks
from spd_optax.audit.lines import SCHEMA, AuditFileError, Fields

Check = tuple[str, Callable[[Any], bool]]  # what is expected, and whether a value is that


def _is_text(value: Any) -> bool:
  return isinstance(value, str)


def _is_number(value: Any) -> bool:
  return isinstance(value, int | float) and not isinstance(value, bool)


def _is_count(value: Any) -> bool:
  return isinstance(value, int) and not isinstance(value, bool) and value >= 0


TEXT: Check = ('a string', _is_text)
BOOL: Check = ('true or false', lambda value: isinstance(value, bool))
FIELDS: dict[str, Check] = {
  'schema': ('a number', _is_count),
  'started': TEXT,
  'transform': TEXT,
  'versions': (
    'strings by name',
    lambda value: isinstance(value, dict) and all(map(_is_text, value.values())),
  ),
  'hyperparameters': ('values by name', lambda value: isinstance(value, dict)),
  'anchor': ('an object', lambda value: isinstance(value, dict)),
  'layers': (
    'a list of names',
    lambda value: isinstance(value, list) and all(map(_is_text, value)),
  ),
  'states': (
    'a list of numbers of layers',
    lambda value: isinstance(value, list) and all(map(_is_count, value)),
  ),
}
ANCHOR: dict[str, Check] = {
  'fingerprint': TEXT,
  'source': ('a string or null', lambda value: value is None or _is_text(value)),
  'captured': ('true, false or null', lambda value: value is None or isinstance(value, bool)),
  'moving': BOOL,
  'norms': (
    'a list of numbers and nulls',
    lambda value: isinstance(value, list) and all(x is None or _is_number(x) for x in value),
  ),
}


def checked(path: Path, line: bytes) -> Fields:
  """The fields of a header, a line that begins as one.

  Raises:
    AuditFileError: if it is of a newer schema; naming every field that is not as described
      in `reading`.
  """
  try:
    fields: Fields = json.loads(line)
  except (ValueError, RecursionError):  # of lists in lists in lists …
    fields = {}
  schema: Any = fields.get('schema')
  if _is_count(schema) and schema > SCHEMA:
    raise AuditFileError(
      f'{path}: has schema {schema}, this version of spd_optax reads up to {SCHEMA}: '
      "pip install --upgrade 'spd_optax[audit]'"
    )
  if problems := _problems(fields) if fields else ['not JSON']:
    raise AuditFileError(
      f'{path}: line 1: the header was edited, or AuditLog did not write it:\n  '
      + '\n  '.join(problems)
    )
  return fields


def _problems(fields: Fields) -> list[str]:
  found = _unexpected(fields, FIELDS, '')
  if isinstance(fields.get('anchor'), dict):
    found += _unexpected(fields['anchor'], ANCHOR, 'anchor.')
  if not found:
    layers = len(fields['layers'])
    counts = {'anchor.norms': len(fields['anchor']['norms']), 'states': sum(fields['states'])}
    found = [
      f'{name}: of {n} layers, layers: {layers}' for name, n in counts.items() if n != layers
    ]
  return found


def _unexpected(fields: Fields, expected: dict[str, Check], start: str) -> list[str]:
  return [
    f'{start}{name}: expected {what}, found '
    + (checks.kind_of(fields[name]) if name in fields else 'nothing')
    for name, (what, is_right) in expected.items()
    if not (name in fields and is_right(fields[name]))
  ]
