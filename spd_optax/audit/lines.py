"""The lines of an audit log: JSON objects, each sealed with the hash of the line before it."""

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

FORMAT = 'spd_optax audit'
SCHEMA = 1
START = f'{{"format":"{FORMAT}","schema":'.encode()  # of every log
SHOWN = 20  # problems in one message
SEAL = len(',"hash":""}\n') + 64  # bytes at the end of a line

Fields = dict[str, Any]


class AuditFileError(ValueError):
  """A file that is no whole audit log: foreign, edited, incomplete, or of a newer schema."""


class Lines:
  """The whole lines of a log, each checked against the one before; one at a time in memory.

  Attributes:
    hash: of the last line that was read.
    whole: bytes of the whole lines.
    torn: bytes after the last whole line, of a line whose writer was killed.
    problems: what is wrong with the first lines that are not as they were written, and
    wrong: how many these are in all.

  Raises:
    AuditFileError: if the file does not begin as a log does, or is none.
    OSError: if it is not there, or cannot be read.
  """

  def __init__(self, path: str | os.PathLike[str]):
    self.path = Path(path)
    self.hash, self.whole, self.torn = '', 0, 0
    self.problems: list[str] = []
    self.wrong = 0

  def __iter__(self) -> Iterator[bytes]:
    if self.path.exists() and not self.path.is_file():
      kind = 'a directory' if self.path.is_dir() else 'no regular file'
      raise AuditFileError(f'{self.path}: {kind}; pass the .jsonl file of a run')
    with self.path.open('rb') as file:
      if not START.startswith(start := file.read(len(START))):
        raise AuditFileError(
          f'{self.path}: no audit log; expected a first line {START.decode()}…, found '
          f'{start.decode("utf-8", "replace")!r}'
        )
      file.seek(0)
      for at, line in enumerate(file, 1):
        if not line.endswith(b'\n'):
          self.torn = len(line)
          return
        problem, self.hash = _checked(line, self.hash)
        self.whole += len(line)
        if problem:
          self.report(at, problem)
        yield line

  def report(self, at: int, problem: str) -> None:
    """Takes down a problem of a line; of a file full of them only the first."""
    self.wrong += 1
    if self.wrong <= SHOWN:
      self.problems.append(f'line {at}: {problem}')


def seal(fields: Mapping[str, Any], previous: str) -> tuple[bytes, str]:
  """The line for these fields, and its hash."""
  body = json.dumps({**fields, 'previous': previous}, separators=(',', ':'), allow_nan=False)
  digest = hashlib.sha256(body.encode()).hexdigest()
  return f'{body[:-1]},"hash":"{digest}"}}\n'.encode(), digest


def _checked(line: bytes, previous: str) -> tuple[str | None, str]:
  """What is wrong with the seal of a line, and the hash that it says it has."""
  body, end = line[:-SEAL] + b'}', line[-SEAL:]
  if not (end.startswith(b',"hash":"') and end.endswith(b'"}\n')):
    return 'has no hash: it was edited, or AuditLog did not write it', ''
  digest = end[len(',"hash":"') :][:64].decode('latin-1')
  if hashlib.sha256(body).hexdigest() != digest:
    return 'its hash does not fit: it was edited', digest
  if not body.endswith(f'"previous":"{previous}"}}'.encode()):
    return 'does not continue the line before: lines are missing, added or in another order', digest
  return None, digest


def numbers(values: np.ndarray) -> list[Any]:
  """A list for JSON: 7 digits, and strings for what is not finite."""
  return [float(f'{x:.7g}') if math.isfinite(x) else number(x) for x in values.tolist()]


def number(value: float) -> Any:
  """A number for JSON: a string where it is not finite."""
  if math.isnan(value):
    return 'NaN'
  return value if math.isfinite(value) else 'Infinity' if value > 0 else '-Infinity'
