"""Audit logs as files: the format, and reading one with every check.

A log is a text file of JSON objects, one a line, each line sealed: its last two keys are
`previous`, the hash of the line before ('' in the first), and `hash`, the SHA-256 of the
line without `hash` itself (the bytes up to `,"hash":`, and a closing brace). So a line that
was edited, removed, inserted or moved is found. Lines cut off at the end are not: to find that,
keep a later `AuditLog.hash` elsewhere and pass it to `verify`.

The first line is the header:

- `format`: 'spd_optax audit'; `schema`: 1. Readers refuse a newer schema.
- `started`: ISO 8601 in UTC; `versions`: of python, jax, jaxlib, optax, numpy and spd_optax.
- `transform`, `hyperparameters`: as the user named them.
- `anchor`: `fingerprint`, as of `spd.fingerprint`; `source`, as the user named it, null
  where it was captured from the params; `moving`, whether it is meant to change; `norms`:
  ‖θ_0‖ for each layer, null where not known.
- `layers`: names; every list below is in this order. Slices of a stacked leaf follow each other:
  'layers/kernel[0]', 'layers/kernel[1]', ...

Every other line is a record:

- `step`: the user's; `time`: seconds since 1970; `updates`: updates so far.
- `held`: 0 or 1 for each layer, the condition at the last update; `ratio`, `distance`: as in
  `ProjectionDecayState`, to 7 digits; `steps`: updates so far with a true condition.
- `metrics`: the user's numbers by name.
- `resumed`: only in the first record after the file was reopened: `versions` as above. Its step
  may lie before that of earlier records, which are then superseded.

Numbers that are not finite are the strings 'NaN', 'Infinity' and '-Infinity'.
"""

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

FORMAT = 'spd_optax audit'
SCHEMA = 1
START = f'{{"format":"{FORMAT}","schema":'  # of every log
SEAL = len(',"hash":""}') + 64  # bytes at the end of a line
SHOWN = 20  # problems in one message

Fields = dict[str, Any]


class AuditFileError(ValueError):
  """A file that is no whole audit log: foreign, edited, incomplete, or of a newer schema."""


class Record(NamedTuple):
  """What was logged at one step; arrays have an entry per layer."""

  step: int
  time: float
  updates: int
  held: np.ndarray  # bool
  ratio: np.ndarray  # float32
  distance: np.ndarray  # float32
  steps: np.ndarray  # int32
  metrics: dict[str, float]
  resumed: bool


class Run(NamedTuple):
  """A log as read from its file.

  Attributes:
    header: the first line.
    norms: ‖θ_0‖ for each layer, NaN where not known.
    records: in the order of the file.
    hash: of the last whole line.
    torn: bytes after the last whole line, of a record whose writer was killed.
    whole: bytes of all whole lines.
  """

  path: Path
  header: Fields
  norms: np.ndarray
  records: list[Record]
  hash: str
  torn: int
  whole: int

  @property
  def layers(self) -> list[str]:
    names: list[str] = self.header['layers']
    return names

  def current(self) -> list[Record]:
    """The records but those that a resumed run went through again."""
    found: list[Record] = []
    for record in self.records:
      while record.resumed and found and found[-1].step >= record.step:
        found.pop()
      found.append(record)
    return found


def seal(fields: Mapping[str, Any], previous: str) -> tuple[bytes, str]:
  """The line for these fields, and its hash."""
  body = json.dumps({**fields, 'previous': previous}, separators=(',', ':'), allow_nan=False)
  digest = hashlib.sha256(body.encode()).hexdigest()
  return f'{body[:-1]},"hash":"{digest}"}}\n'.encode(), digest


def numbers(values: np.ndarray) -> list[Any]:
  """A list for JSON: 7 digits, and strings for what is not finite."""
  return [float(f'{x:.7g}') if math.isfinite(x) else number(x) for x in values.tolist()]


def number(value: float) -> Any:
  """A number for JSON: a string where it is not finite."""
  if math.isnan(value):
    return 'NaN'
  return value if math.isfinite(value) else 'Infinity' if value > 0 else '-Infinity'


def norms_of(header: Fields) -> np.ndarray:
  """‖θ_0‖ for each layer, NaN where not known."""
  values = header['anchor']['norms']
  return np.array([math.nan if value is None else float(value) for value in values])


def read(path: str | os.PathLike[str]) -> Run:
  """Reads a log, and checks every line.

  Args:
    path: a file that `AuditLog` wrote, or is writing.

  Returns:
    Every whole line. `Run.torn` says whether the last line is torn.

  Raises:
    AuditFileError: if it is no audit log, of a newer schema, or naming every line that
      was edited, or before which one is missing.
    OSError: if it is not there, or cannot be read.
  """
  path = Path(path)
  lines = _Lines(path)
  header, previous, at = None, '', 0
  records: list[Record] = []
  for at, line in enumerate(lines, 1):
    problem, fields = _opened(line, previous)
    if header is None:
      header = _header(path, line, fields)
      lines.problems += [f'line 1: {problem}'] if problem else []
    else:
      record, malformed = _record(fields, len(header['layers']))
      records += [record] if record else []
      found = problem or malformed
      lines.problems += [f'line {at}: {found}'] if found else []
    previous = str(fields.get('hash', ''))
  if header is None:
    raise AuditFileError(_not_a_log(path, lines.torn_line))
  _raise_all(path, lines.problems)
  return Run(path, header, norms_of(header), records, previous, len(lines.torn_line), lines.whole)


def verify(path: str | os.PathLike[str], hash: str | None = None) -> Run:
  """Reads a log, checks every line, and that nothing was cut off after a known one.

  Args:
    path: a file that `AuditLog` wrote.
    hash: an `AuditLog.hash` that was kept elsewhere.

  Returns:
    As `read`.

  Raises:
    AuditFileError: as `read`, or if no line has this hash.
    OSError: if it is not there, or cannot be read.
  """
  run = read(path)
  if hash is not None and not any(line.endswith(f'"{hash}"}}\n'.encode()) for line in _Lines(path)):
    raise AuditFileError(
      f'{path}: no line has the hash {hash}; the end was cut off, or it is the log of another run'
    )
  return run


def read_header(path: Path) -> Fields | None:
  """The first line, checked; None for a file without one, or with a torn one."""
  lines = _Lines(path)
  for line in lines:
    return _header(path, line, _opened(line, '')[1])
  if lines.torn_line and not START.startswith(lines.torn_line[: len(START)].decode('latin-1')):
    raise AuditFileError(_not_a_log(path, lines.torn_line))
  return None


class _Lines:
  """The whole lines of a file, one after the other; then what is torn."""

  def __init__(self, path: str | os.PathLike[str]):
    self.path = Path(path)
    self.torn_line = b''
    self.whole = 0
    self.problems: list[str] = []

  def __iter__(self) -> Iterator[bytes]:
    if self.path.exists() and not self.path.is_file():
      kind = 'a directory' if self.path.is_dir() else 'no regular file'
      raise AuditFileError(f'{self.path}: {kind}; pass the .jsonl file of a run')
    with self.path.open('rb') as file:
      for line in file:
        if not line.endswith(b'\n'):
          self.torn_line = line
          return
        self.whole += len(line)
        yield line


def _opened(line: bytes, previous: str) -> tuple[str | None, Fields]:
  """What is wrong with the seal of a line, and its fields."""
  body = line[: -SEAL - 1] + b'}'
  try:
    fields = json.loads(line)
  except ValueError:
    return 'not JSON: it was edited or damaged', {}
  if not isinstance(fields, dict) or 'hash' not in fields:
    return 'has no hash: it was edited, or AuditLog did not write it', {}
  if hashlib.sha256(body).hexdigest() != fields['hash']:
    return 'its hash does not fit: it was edited', fields
  if fields.get('previous') != previous:
    return 'does not continue the line before: lines are missing, added or in another order', fields
  return None, fields


def _header(path: Path, line: bytes, fields: Fields) -> Fields:
  if fields.get('format') != FORMAT or not isinstance(fields.get('schema'), int):
    raise AuditFileError(_not_a_log(path, line))
  if fields['schema'] > SCHEMA:
    raise AuditFileError(
      f'{path}: has schema {fields["schema"]}, this version of spd_optax reads up to {SCHEMA}: '
      "pip install --upgrade 'spd_optax[audit]'"
    )
  anchor = fields.get('anchor')
  if not (isinstance(fields.get('layers'), list) and isinstance(anchor, dict)):
    raise AuditFileError(f'{path}: line 1: the header was edited: it lacks layers or anchor')
  if len(anchor.get('norms') or ()) != len(fields['layers']):
    raise AuditFileError(f'{path}: line 1: the header was edited: a norm for each layer is missing')
  return fields


def _not_a_log(path: Path, line: bytes) -> str:
  shown = repr(line[:40].decode('utf-8', 'replace')) if line else 'nothing'
  return f'{path}: no audit log; expected a first line {START}…, found {shown}'


def _record(fields: Fields, layers: int) -> tuple[Record | None, str | None]:
  try:
    record = Record(
      step=int(fields['step']),
      time=float(fields['time']),
      updates=int(fields['updates']),
      held=np.array(fields['held'], bool),
      ratio=np.array(fields['ratio'], np.float32),
      distance=np.array(fields['distance'], np.float32),
      steps=np.array(fields['steps'], np.int32),
      metrics={str(name): float(value) for name, value in fields['metrics'].items()},
      resumed='resumed' in fields,
    )
  except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
    return None, f'no record of this schema: {type(error).__name__} {error}'
  lengths = {len(x) for x in (record.held, record.ratio, record.distance, record.steps)}
  if lengths != {layers}:
    return None, f'has values for {sorted(lengths)} layers, the header names {layers}'
  return record, None


def _raise_all(path: Path, problems: Sequence[str]) -> None:
  if problems:
    more = len(problems) - SHOWN
    shown = [*problems[:SHOWN], *([f'and {more} more'] if more > 0 else [])]
    raise AuditFileError(f'{path}: not as it was written:\n  ' + '\n  '.join(shown))
