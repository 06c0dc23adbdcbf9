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
- `anchor`: `fingerprint`, as of `spd.fingerprint`; `source`, as the user named it, null where
  it was not named; `captured`, true where the user says that it is the params at the first
  update, false where it was passed, null where neither was said; `moving`, whether it is meant to
  change; `norms`: ‖θ_0‖ for each layer, 0 also where the anchor is `0`, null where not known.
- `layers`: names; every list per layer is in this order. Slices of a stacked leaf follow each
  other: 'layers/kernel[0]', 'layers/kernel[1]', ...
- `states`: how many of the layers are in each state of SPD, those of one state in a row; several
  numbers only where the optimizer has several states (`optax.partition`).

Every other line is a record:

- `step`: the user's; `time`: seconds since 1970.
- `updates`: updates so far, a number for each of `states`. They differ where one part is updated
  more rarely, as under `optax.MultiSteps`.
- `held`: 0 or 1 for each layer, the condition at the last update; `ratio`, `distance`: as in
  `ProjectionDecayState`, to 7 digits; `steps`: updates so far with a true condition.
- `metrics`: the user's numbers by name.
- `resumed`: only in the first record after the file was reopened: `versions` as above. Its step
  may lie before that of earlier records, which are then superseded.

Numbers that are not finite are the strings 'NaN', 'Infinity' and '-Infinity'.
"""

import json
import math
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np

from spd_optax.audit import headers
from spd_optax.audit.lines import AuditFileError, Fields, Lines


class Record(NamedTuple):
  """What was logged at one step; arrays have an entry per layer."""

  step: int
  time: float
  updates: np.ndarray  # int32, of the state that the layer is in
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
  """

  path: Path
  header: Fields
  norms: np.ndarray
  records: list[Record]
  hash: str
  torn: int

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
  lines = Lines(path)
  header: Fields | None = None
  records: list[Record] = []
  for at, line in enumerate(lines, 1):
    if header is None:
      header = headers.checked(lines.path, line)
    elif not lines.problems:  # else there is no run to return
      record, problem = _record(line, header)
      records += [record] if record else []
      if problem:
        lines.report(at, problem)
  header = _whole(lines, header)
  return Run(lines.path, header, norms_of(header), records, lines.hash, lines.torn)


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
  if hash is not None and not any(line.endswith(f'"{hash}"}}\n'.encode()) for line in Lines(path)):
    raise AuditFileError(
      f'{path}: no line has the hash {hash}; the end was cut off, or it is the log of another run'
    )
  return run


def read_header(path: Path) -> Fields | None:
  """The first line, checked; None for a file without one, or with a torn one."""
  return next((headers.checked(path, line) for line in Lines(path)), None)


def check_lines(path: Path) -> tuple[Fields, Lines]:
  """The header, and all lines after the check of each seal; no record is kept or parsed.

  Raises:
    AuditFileError, OSError: as `read`.
  """
  lines = Lines(path)
  header: Fields | None = None
  for line in lines:
    header = headers.checked(path, line) if header is None else header
  return _whole(lines, header), lines


def _whole(lines: Lines, header: Fields | None) -> Fields:
  """The header, if there is one and every line is as it was written."""
  if header is None:
    raise AuditFileError(f'{lines.path}: no audit log: not one whole line in it')
  if lines.problems:
    more = lines.wrong - len(lines.problems)
    shown = [*lines.problems, *([f'and {more} more'] if more else [])]
    raise AuditFileError(f'{lines.path}: not as it was written:\n  ' + '\n  '.join(shown))
  return header


def _record(line: bytes, header: Fields) -> tuple[Record | None, str | None]:
  try:
    fields = json.loads(line)
    record = Record(
      step=int(fields['step']),
      time=float(fields['time']),
      updates=np.repeat(np.array(fields['updates'], np.int32), header['states']),
      held=np.array(fields['held'], bool),
      ratio=np.array(fields['ratio'], np.float32),
      distance=np.array(fields['distance'], np.float32),
      steps=np.array(fields['steps'], np.int32),
      metrics={str(name): float(value) for name, value in fields['metrics'].items()},
      resumed='resumed' in fields,
    )
  except (KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError) as error:
    return None, f'no record of this schema: {type(error).__name__} {error}'
  columns = record.held, record.ratio, record.distance, record.steps
  lengths, layers = {len(x) for x in columns}, len(header['layers'])
  if lengths != {layers}:
    return None, f'has values for {sorted(lengths)} layers, the header names {layers}'
  return record, None
