"""Audit logs as files: the format, and how to read one with every check.

A log is a text file of JSON objects, one a line. Each line is sealed. Its last two keys are
`previous`, the hash of the line before ('' in the first), and `hash`. `hash` is the SHA-256 of the
line without `hash` itself: the bytes up to `,"hash":`, and a closing brace. So a reader finds a
line that was edited, removed, inserted or moved. It does not find lines that were cut off at the
end. For that, keep a later `AuditLog.hash` elsewhere, and pass it to `verify`.

The first line is the header:

- `format`: 'spd_optax audit'; `schema`: 1. Readers refuse a newer schema.
- `started`: ISO 8601 in UTC; `versions`: of Python and the libraries.
- `transform`, `hyperparameters`: as the user named them.
- `anchor`: an object. `fingerprint` comes from `spd.fingerprint`. `source`, `captured` and `moving`
  are as the user named them to `AuditLog`. `norms` has ‖θ_0‖ for each layer: 0 also if the anchor
  is `0`, null if it is not known.
- `layers`: the names of the layers. Every list per layer is in this order. Slices of a stacked leaf
  follow each other: 'layers/kernel[0]', 'layers/kernel[1]', ...
- `states`: the number of layers in each state of SPD. There are several numbers only for an
  optimizer with several states (`optax.partition`). The layers of one state follow each other.
- `baseline`: whether the run is without SPD; false if it is missing.

Every other line is a record:

- `step`: the user's; `time`: seconds since 1970; `metrics`: the user's numbers by name. If a budget
  sets the strength, the log adds `spd/budget`, `spd/drift`, `spd/strength` and `spd/measured`. If
  there are several states, the number of the state follows `spd/`: `spd/state_0/budget`.
- `updates`: updates so far, a number for each of `states`. They differ if one part is updated less
  often, as under `optax.MultiSteps`.
- `condition` (0 or 1), `ratio`, `distance` (7 digits), `constrained`: as in `ProjectionDecayState`,
  for each layer.
- `rule_state`: the rule's own numbers by name, a list for each; 'NaN' for a layer whose rule has no
  such number.
- `resumed`: only in the first record after the file was opened again: `versions` as above. Its step
  may be before the step of earlier records. These are then superseded.

Numbers that are not finite are the strings 'NaN', 'Infinity' and '-Infinity'.
"""

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

import msgspec
import numpy as np

FORMAT = 'spd_optax audit'
SCHEMA = 1
START = f'{{"format":"{FORMAT}","schema":'.encode()  # of every log
SEAL = len(',"hash":""}\n') + 64  # bytes at the end of a line

Count = Annotated[int, msgspec.Meta(ge=0, lt=2**31)]
T = TypeVar('T')
Number = float | Literal['NaN', 'Infinity', '-Infinity']
COLUMNS = {'condition': bool, 'ratio': np.float32, 'distance': np.float32, 'constrained': np.int32}


class AuditFileError(ValueError):
  """The file is not a valid audit log: another file, edited, incomplete, or of a newer schema."""


class Anchor(msgspec.Struct, frozen=True):
  """The anchor in a header."""

  fingerprint: str
  source: str | None
  captured: bool | None
  moving: bool
  norms: list[float | None]


class Header(msgspec.Struct, frozen=True):
  """The first line of a log."""

  format: str
  schema: int
  started: str
  versions: dict[str, str]
  transform: str
  hyperparameters: dict[str, Any]
  anchor: Anchor
  layers: list[str]
  states: list[Count]
  baseline: bool = False

  def __post_init__(self) -> None:
    for name, count in (('anchor.norms', len(self.anchor.norms)), ('states', sum(self.states))):
      if count != len(self.layers):
        raise ValueError(f'{name}: of {count} layers, layers: {len(self.layers)}')


class Line(msgspec.Struct, omit_defaults=True):
  """A record as JSON has it."""

  step: int
  time: float
  updates: list[Count]
  condition: list[Literal[0, 1]]
  ratio: list[Number]
  distance: list[Number]
  constrained: list[Count]
  rule_state: dict[str, list[Number]]
  metrics: dict[str, Number]
  resumed: dict[str, str] | None = None


class Record(NamedTuple):
  """What was logged at one step; arrays have an entry per layer, with the dtype of the state."""

  step: int
  time: float
  updates: np.ndarray  # of the state that has the layer
  condition: np.ndarray
  ratio: np.ndarray
  distance: np.ndarray
  constrained: np.ndarray
  rule_state: dict[str, np.ndarray]  # by name; NaN where a layer has no such number
  metrics: dict[str, float]
  resumed: bool


class Run(NamedTuple):
  """A log as read from its file.

  `hash` is the hash of the last whole line. `torn` is the number of bytes after it, from a line
  whose writer was killed.
  """

  path: Path
  header: Header
  records: list[Record]
  hash: str
  torn: int

  @property
  def layers(self) -> list[str]:
    """The names of the layers."""
    return self.header.layers

  @property
  def norms(self) -> np.ndarray:
    """‖θ_0‖ for each layer, float64; NaN if it is not known."""
    return np.array(self.header.anchor.norms, float)

  def current(self) -> list[Record]:
    """The records, without those that a resumed run repeated."""
    found: list[Record] = []
    for record in self.records:
      while record.resumed and found and found[-1].step >= record.step:
        found.pop()
      found.append(record)
    return found


def torn(run: Run) -> str:
  """What to say about a torn last line."""
  return (
    f'the last line is torn ({run.torn} bytes): its writer was killed, or is writing now; all '
    f'{len(run.records)} whole records are here'
  )


def read(path: str | os.PathLike[str]) -> Run:
  """Reads a log that `AuditLog` wrote, or is writing, and checks every whole line.

  Raises:
    AuditFileError: if it is not an audit log, is damaged, or has a newer schema. The message names
      the first line that was edited, or that follows a missing line.
    OSError: if the file is missing, or cannot be read.
  """
  lines = Lines(path)
  records = [lines.parsed(_record, line, lines.header) for line in lines]
  if lines.header is None:
    raise AuditFileError(f'{path}: no audit log: not one whole line in it')
  return Run(lines.path, lines.header, records, lines.hash, lines.torn)


def verify(path: str | os.PathLike[str], hash: str | None = None) -> Run:
  """Does what `read` does, and checks that a line has `hash`, an `AuditLog.hash` that you kept.

  Raises:
    AuditFileError: as `read`, or if no line has this hash.
  """
  run = read(path)
  if hash is not None and f'"{hash}"}}\n'.encode() not in run.path.read_bytes():
    raise AuditFileError(
      f'{path}: no line has the hash {hash}; the end was cut off, or it is the log of another run'
    )
  return run


class Lines:
  """The whole lines of a log but the first, one at a time, each checked against the one before.

  `header` is None before it was read, and if there is no whole one. `count` lines were read, of
  `whole` bytes; the last has this `hash`. `torn` bytes follow it.
  """

  def __init__(self, path: str | os.PathLike[str]):
    self.path = Path(path)
    self.header: Header | None = None
    self.hash, self.count, self.whole, self.torn = '', 0, 0, 0

  def __iter__(self) -> Iterator[bytes]:
    if self.path.exists() and not self.path.is_file():
      raise AuditFileError(f'{self.path}: a directory or a device; pass the .jsonl of a run')
    with self.path.open('rb') as file:
      if not START.startswith(start := file.read(len(START))):
        raise AuditFileError(
          f'{self.path}: no audit log; expected a first line {START.decode()}…, found {start!r}'
        )
      file.seek(0)
      for line in file:
        if not line.endswith(b'\n'):
          self.torn = len(line)
          return
        self.count, self.whole = self.count + 1, self.whole + len(line)
        if self.count == 1:
          self.header = self.parsed(_header, line, self.path)
        self._check_seal(line)
        if self.count > 1:
          yield line

  def parsed(self, parse: Callable[..., T], *arguments: Any) -> T:
    """What `parse` makes of the last line; an AuditFileError if that is damaged."""
    try:
      return parse(*arguments)
    except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
      raise self.damaged(f'was edited, or AuditLog did not write it: {error}') from None

  def _check_seal(self, line: bytes) -> None:
    body, before = line[:-SEAL] + b'}', self.hash
    self.hash = hashlib.sha256(body).hexdigest()
    if line[-SEAL:] != f',"hash":"{self.hash}"}}\n'.encode():
      raise self.damaged('its hash does not fit: it was edited, or AuditLog did not write it')
    if not body.endswith(f'"previous":"{before}"}}'.encode()):
      raise self.damaged('does not continue the line before: one is missing, added or moved')

  def damaged(self, problem: str) -> AuditFileError:
    """The error for the last line that was read."""
    return AuditFileError(f'{self.path}: not as it was written: line {self.count}: {problem}')


def _header(line: bytes, path: Path) -> Header:
  """The header in a line that begins as one."""
  schema = msgspec.json.decode(line).get('schema')
  if isinstance(schema, int) and schema > SCHEMA:
    raise AuditFileError(
      f'{path}: has schema {schema}, this version of spd_optax reads up to {SCHEMA}: '
      "pip install --upgrade 'spd_optax[audit]'"
    )
  return msgspec.json.decode(line, type=Header)


def _record(line: bytes, header: Header) -> Record:
  fields = msgspec.json.decode(line, type=Line)
  columns = {name: np.array(getattr(fields, name), dtype) for name, dtype in COLUMNS.items()}
  rule_state = {name: np.array(x, np.float32) for name, x in fields.rule_state.items()}
  lengths = {len(values) for values in (*columns.values(), *rule_state.values())}
  if lengths != {len(header.layers)} or len(fields.updates) != len(header.states):
    raise msgspec.ValidationError(f'values for {lengths} layers, not {len(header.layers)}')
  return Record(
    step=fields.step,
    time=fields.time,
    updates=np.repeat(np.array(fields.updates, np.int32), header.states),
    **columns,
    rule_state=rule_state,
    metrics={name: float(value) for name, value in fields.metrics.items()},
    resumed=fields.resumed is not None,
  )


def as_line(record: Record, header: Header) -> Line:
  """A record as JSON has it."""
  layers = np.array(header.states, int)  # of each state
  first = np.cumsum(layers) - layers
  return Line(
    step=record.step,
    time=record.time,
    updates=record.updates[first].tolist(),
    condition=record.condition.astype(int).tolist(),
    ratio=numbers(record.ratio),
    distance=numbers(record.distance),
    constrained=record.constrained.tolist(),
    rule_state={name: numbers(values) for name, values in record.rule_state.items()},
    metrics={name: number(value) for name, value in record.metrics.items()},
    resumed=header.versions if record.resumed else None,
  )


def seal(fields: msgspec.Struct, previous: str) -> tuple[bytes, str]:
  """The line for a header or record, and its hash."""
  body = msgspec.json.encode(fields)[:-1] + f',"previous":"{previous}"}}'.encode()
  digest = hashlib.sha256(body).hexdigest()
  return body[:-1] + f',"hash":"{digest}"}}\n'.encode(), digest


def numbers(values: np.ndarray) -> list[Number]:
  """A list for JSON: 7 digits, and strings for what is not finite."""
  return [number(float(f'{x:.7g}')) for x in values.tolist()]


def number(value: float) -> Any:
  """A number for JSON: a string, 'NaN' or '-Infinity', if it is not finite."""
  return value if math.isfinite(value) else json.dumps(value)


def printable(text: str) -> str:
  """The text without characters that could steer a terminal."""
  return ''.join(c if c.isprintable() else '\N{REPLACEMENT CHARACTER}' for c in text)
