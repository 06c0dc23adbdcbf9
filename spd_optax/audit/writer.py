"""The file of an audit log, opened for writing: whole lines, or none."""

import atexit
import contextlib
import errno
import math
import os
from collections.abc import Callable
from pathlib import Path

import msgspec

from spd_optax import checks, trees
from spd_optax.audit import format
from spd_optax.audit.advice import AuditWarning, Watcher
from spd_optax.audit.format import Header, Record

Pending = Callable[[], Record]  # waits for a step that may still be computed

try:
  import fcntl
except ImportError:  # on Windows: two writers of one file are not kept apart
  fcntl = None  # type: ignore[assignment]


class Writer:
  """Writes records; nothing here refers to the `AuditLog`, whose end is to close it."""

  def __init__(self, path: Path, patience: int, fsync: bool):
    self._path, self._patience, self._fsync = path, patience, fsync
    self._file = -1  # closed
    self._step = -math.inf  # of the last record written
    self._pending: Pending | None = None
    self.hash, self._resumed = '', False

  def check_owner(self) -> None:
    """Raises a RuntimeError in a forked process, in which JAX may not compute either."""
    if self._file >= 0 and self._owner != os.getpid():
      raise RuntimeError(
        f'{self._path}: this process was forked from the one that writes the audit log; only that '
        'one can'
      )

  def put(self, header: Header, record: Pending) -> None:
    """Opens the file, writes the record before, and takes this one.

    If that raises, the record before stays until it is written, and this one is not taken.
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
      self._append(format.as_line(record, self._header))
    except BaseException:  # a full disk, or an interrupt, perhaps behind the write
      self._pending = now if os.fstat(self._file).st_size == size else None
      raise
    self._resumed, self._step = False, record.step
    for advice in self._watcher.see(record):
      checks.warn(f'step {advice.step}: {advice.message}', AuditWarning)

  def close(self) -> None:
    """Writes the pending record and closes the file; the next record would open it again."""
    atexit.unregister(self.close)
    file, own = self._file, self._file >= 0 and self._owner == os.getpid()
    try:
      if own:
        self.write()
    finally:
      self._file = -1
      if own and fcntl:  # a forked child may still have the file open
        with contextlib.suppress(OSError):
          fcntl.flock(file, fcntl.LOCK_UN)
      if file >= 0:
        os.close(file)

  def _open(self, header: Header) -> None:
    """Opens a new log, or one that goes on."""
    flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | getattr(os, 'O_BINARY', 0)
    self._file, self._owner = os.open(self._path, flags, 0o666), os.getpid()
    self._header, self._watcher = header, Watcher(header, self._patience)
    try:
      self._lock()
      lines = format.Lines(self._path).through()
      if lines.header is not None:
        self._continue(lines)
      else:
        os.ftruncate(self._file, 0)  # of a header whose writer was killed
        self._size, self.hash, self._resumed = 0, '', False
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
        error.errno,
        'an AuditLog, of this process or another, has this file open: call its close(), or use it '
        'in a `with` block, which closes it; or pass another path',
        str(self._path),
      ) from error
    except OSError:  # a file system without locks
      return

  def _continue(self, lines: format.Lines) -> None:
    """Goes on after the last whole line of the file."""
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
      os.fsync(directory)
      os.close(directory)

  def _append(self, fields: msgspec.Struct) -> None:
    """One write of a whole line; if it fails, the file ends as before."""
    found = os.fstat(self._file)
    if not found.st_nlink:
      raise FileNotFoundError(errno.ENOENT, 'the audit log was deleted', str(self._path))
    if found.st_size != self._size:  # after an interrupted write, or a change from outside
      self._continue(format.Lines(self._path).through())
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


def _compare(path: Path, in_file: Header, now: Header) -> None:
  """Raises a ValueError that lists all facts of the headers that differ."""
  old, new = _facts(in_file), _facts(now)
  trees.raise_all(
    [
      f'{name}: {old.get(name, "nothing")!r} in the file, {new.get(name, "nothing")!r} now'
      for name in old | new
      if old.get(name) != new.get(name) and not (name == 'anchor fingerprint' and now.anchor.moving)
    ],
    f'{path} is the log of another run; pass another path, or what the run was begun with '
    '(an anchor that is meant to change: moving_anchor=True):',
  )


def _facts(header: Header) -> dict[str, object]:
  """What must not differ, by name."""
  of_anchor = ('source', 'captured', 'moving', 'fingerprint')
  return {
    **{name: getattr(header, name) for name in ('transform', 'hyperparameters', 'states')},
    **{f'anchor {name}': getattr(header.anchor, name) for name in of_anchor},
    **{f'layer {name}': f'layer {i}' for i, name in enumerate(header.layers)},
  }
