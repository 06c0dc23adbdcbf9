"""The file of an audit log, opened for writing: whole lines, or none."""

import atexit
import contextlib
import errno
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from spd_optax import checks, trees
from spd_optax.audit import format
from spd_optax.audit.advice import AuditWarning, Watcher
from spd_optax.audit.format import Header, Line, Record

Pending = Callable[[], Record]  # waits for a step that may still be computed

try:
  import fcntl
except ImportError:  # on Windows: two writers of one file are not kept apart
  fcntl = None  # type: ignore[assignment]


class Writer:
  """Writes records; nothing here refers to the `AuditLog`, whose end is to close it.

  Args:
    path: of a regular file, or of none.
    patience: see `Watcher`.
    fsync: whether to wait after each line until the disk has it.

  Attributes:
    hash: of the last line written; '' before the first.
  """

  def __init__(self, path: Path, patience: int, fsync: bool):
    self._path, self._patience, self._fsync = path, patience, fsync
    self._file = -1  # closed
    self._resumed = False
    self._step = -math.inf  # of the last record written
    self._pending: Pending | None = None
    self._size, self.hash = 0, ''

  def check_path(self) -> None:
    """Fails early, before a run has trained for its first record."""
    if self._path.exists():
      next(iter(format.Lines(self._path)), None)
    elif not self._path.parent.is_dir():
      raise FileNotFoundError(errno.ENOENT, 'AuditLog: no such directory', str(self._path.parent))

  def check_owner(self) -> None:
    """Raises a RuntimeError in a forked process, in which JAX may not compute either."""
    if self._file >= 0 and self._owner != os.getpid():
      raise RuntimeError(
        f'{self._path}: this process was forked from the one that writes the audit log; only that '
        'one can'
      )

  def put(self, header: Header, record: Pending) -> None:
    """Writes the record before, and takes this one; opens the file first.

    Raises:
      OSError: if the file cannot be opened or written. The record before then stays until it is
        written, and this one is not taken.
      ValueError: if it is the log of another run, or no whole audit log.
    """
    if self._file < 0:
      self._open(header)
    self.write()
    self._pending = record

  def write(self) -> None:
    """Writes the pending record, and says what is to be said about it."""
    self.check_owner()
    if self._file < 0 or self._pending is None:
      return
    now, size = self._pending, os.fstat(self._file).st_size
    record = now()
    record = record._replace(resumed=self._resumed or record.step <= self._step)
    self._pending = None
    try:
      self._append(_line(record, self._header))
    except BaseException:  # a full disk, or an interrupt, perhaps behind the write
      self._pending = now if os.fstat(self._file).st_size == size else None
      raise
    self._resumed, self._step = False, record.step
    for advice in self._watcher.see(record):
      checks.warn(f'step {advice.step}: {advice.message}', AuditWarning)

  def close(self) -> None:
    """Writes the pending record and closes the file; the next record would open it again."""
    atexit.unregister(self.close)
    file = self._file
    if file < 0:
      return
    try:
      if self._owner == os.getpid():
        self.write()
    finally:
      self._file = -1
      if self._owner == os.getpid() and fcntl:  # a forked child may still have the file open
        with contextlib.suppress(OSError):
          fcntl.flock(file, fcntl.LOCK_UN)
      os.close(file)

  def _open(self, header: Header) -> None:
    """Opens a new log, or one that goes on."""
    flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | getattr(os, 'O_BINARY', 0)
    self._file, self._owner = os.open(self._path, flags, 0o666), os.getpid()
    self._header, self._watcher = header, Watcher(header, self._patience)
    self._size, self.hash, self._resumed = 0, '', False
    try:
      self._lock()
      lines = format.Lines(self._path)
      next(iter(lines), None)
      if lines.header is not None:
        self._continue()
      else:
        os.ftruncate(self._file, 0)  # of a header whose writer was killed
        self._append(header)
        self._sync_directory()
    except BaseException:
      os.close(self._file)
      self._file = -1
      raise
    atexit.register(self.close)

  def _lock(self) -> None:
    """Keeps a second writer out, where the system can."""
    try:
      if fcntl:
        fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
      raise BlockingIOError(
        errno.EWOULDBLOCK,
        'an AuditLog, of this process or another, has this file open: call its close(), or use it '
        'in a `with` block, which closes it; or pass another path',
        str(self._path),
      ) from error
    except OSError:  # a file system without locks
      return

  def _continue(self) -> None:
    """Goes on after the last whole line of the file; no record is parsed."""
    lines = format.Lines(self._path)
    for _ in lines:
      pass
    _compare(self._path, lines.checked(), self._header)
    if lines.torn:
      checks.warn(
        f'{self._path}: the last {lines.torn} bytes are of a record whose writer was killed; they '
        'are removed, and the log goes on after the last whole record',
        AuditWarning,
      )
      os.ftruncate(self._file, lines.whole)
    self._size, self.hash, self._resumed = lines.whole, lines.hash, True

  def _sync_directory(self) -> None:
    """Saves the name of a new file, too, from a power failure."""
    if self._fsync and os.name == 'posix':  # elsewhere a directory cannot be opened
      directory = os.open(self._path.parent, os.O_RDONLY)
      try:
        os.fsync(directory)
      finally:
        os.close(directory)

  def _append(self, fields: msgspec.Struct) -> None:
    """One write of a whole line; if it fails, the file ends as before."""
    found = os.fstat(self._file)
    if not found.st_nlink:
      raise FileNotFoundError(errno.ENOENT, 'the audit log was deleted', str(self._path))
    if found.st_size != self._size:  # after an interrupted write, or a change from outside
      self._continue()
    line, digest = format.seal(fields, self.hash)
    try:
      if os.write(self._file, line) < len(line):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
      if self._fsync:
        os.fsync(self._file)
    except OSError as error:
      with contextlib.suppress(OSError):  # a reader recognizes a torn line as well
        os.ftruncate(self._file, self._size)
      raise OSError(
        error.errno,
        f'{error.strerror}: the audit log cannot be written; it ends with its last whole record. '
        'Free space, or log fewer steps',
        str(self._path),
      ) from error
    self._size, self.hash = self._size + len(line), digest


def _line(record: Record, header: Header) -> Line:
  first = np.cumsum(header.states, dtype=int) - header.states  # of the layers of each state
  return Line(
    step=record.step,
    time=record.time,
    updates=record.updates[first].tolist(),
    condition=record.condition.astype(int).tolist(),
    ratio=format.numbers(record.ratio),
    distance=format.numbers(record.distance),
    constrained=record.constrained.tolist(),
    rule_state={name: format.numbers(values) for name, values in record.rule_state.items()},
    metrics={name: format.number(value) for name, value in record.metrics.items()},
    resumed=header.versions if record.resumed else None,
  )


def _compare(path: Path, in_file: Header, now: Header) -> None:
  """Raises a ValueError that lists all facts of the headers that differ."""
  old, new = (_facts(header, moving=now.anchor.moving) for header in (in_file, now))
  trees.raise_all(
    [
      f'{name}: {old.get(name, "nothing")!r} in the file, {new.get(name, "nothing")!r} now'
      for name in old | new
      if old.get(name) != new.get(name)
    ],
    f'{path} is the log of another run; pass another path, or what the run was begun with '
    '(an anchor that is meant to change: moving_anchor=True):',
  )


def _facts(header: Header, moving: bool) -> dict[str, Any]:
  """What must not differ, by name."""
  anchor = {f'anchor {x}': getattr(header.anchor, x) for x in ('source', 'captured', 'moving')}
  if not moving:
    anchor['anchor fingerprint'] = header.anchor.fingerprint
  layers = {f'layer {name}': f'layer {i}' for i, name in enumerate(header.layers)}
  own = {name: getattr(header, name) for name in ('transform', 'hyperparameters', 'states')}
  return own | anchor | layers
