"""What an audit log has open: its file, and the record that still waits for its step."""

import atexit
from pathlib import Path
from typing import NamedTuple

import numpy as np

from spd_optax import readout
from spd_optax.audit import facts, lines
from spd_optax.audit.advice import Watcher, warn
from spd_optax.audit.file import AuditFile
from spd_optax.audit.lines import Fields
from spd_optax.audit.reading import Record


class Pending(NamedTuple):
  """A record whose step may still be computed."""

  step: int
  time: float
  metrics: tuple[str, ...]
  layout: readout.Layout
  reading: readout.Reading


class Writer:
  """Writes records to a file; apart from `AuditLog`, whose end is to close it.

  Args:
    path: of the file.
    patience: see `Watcher`.
    fsync: see `AuditFile`.

  Attributes:
    hash: of the last line written; '' before the first.
  """

  def __init__(self, path: Path, patience: int, fsync: bool):
    self._path, self._patience, self._fsync = path, patience, fsync
    self._file: AuditFile | None = None
    self._pending: Pending | None = None
    self.hash = ''

  def put(self, header: Fields, record: Pending) -> None:
    """Writes the record before, and takes this one.

    Raises:
      OSError, ValueError: see `AuditFile`. The record before then stays until it is written, and
        this one is not taken.
      RuntimeError: in a process that was forked.
    """
    if self._file is None:
      self._file = AuditFile(self._path, header, self._fsync)
      self._watcher = Watcher(header, self._patience)
      self._states, self.hash = header['states'], self._file.hash
      atexit.register(self.close)
    self.write()
    self._pending = record

  def write(self) -> None:
    """Writes the pending record, and says what is to be said about it."""
    self.check_owner()
    if self._file is None or self._pending is None:
      return
    now, size = self._pending, self._file.size_now()
    record = _record(now, self._file.resumed)
    self._pending = None
    try:
      self._file.append(_fields(record, self._states))
    except BaseException:  # a full disk, or an interrupt, perhaps behind the write
      self._pending = now if self._file.size_now() == size else None
      raise
    self.hash = self._file.hash
    for advice in self._watcher.see(record):
      warn(f'step {advice.step}: {advice.message}')

  def check_owner(self) -> None:
    """Raises a RuntimeError in a forked process, in which JAX may not compute either."""
    if self._file is not None and self._file.inherited:
      raise RuntimeError(
        f'{self._path}: this process was forked from the one that writes the audit log; only that '
        'one can'
      )

  def close(self) -> None:
    """Writes the pending record and closes the file; the next record would open it again."""
    atexit.unregister(self.close)
    try:
      if self._file is not None and not self._file.inherited:
        self.write()
    finally:
      if self._file is not None:
        self._file.close()
      self._file = None


def _record(now: Pending, resumed: bool) -> Record:
  values = readout.values_of(now.layout, now.reading)
  return Record(
    step=now.step,
    time=now.time,
    updates=values.updates,
    held=values.condition,
    ratio=values.ratio,
    distance=values.distance,
    steps=values.constrained,
    metrics={name: float(x) for name, x in zip(now.metrics, values.extra, strict=True)},
    resumed=resumed,
  )


def _fields(record: Record, states: list[int]) -> Fields:
  resumed = {'resumed': {'versions': facts.versions()}} if record.resumed else {}
  first = np.cumsum(states, dtype=int) - states  # of the layers of each state
  return {
    'step': record.step,
    'time': record.time,
    'updates': record.updates[first].tolist(),
    'held': record.held.astype(int).tolist(),
    'ratio': lines.numbers(record.ratio),
    'distance': lines.numbers(record.distance),
    'steps': record.steps.tolist(),
    'metrics': {name: lines.number(value) for name, value in record.metrics.items()},
    **resumed,
  }
