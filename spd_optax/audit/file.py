"""The file of an audit log, opened for writing: whole lines, or none."""

import contextlib
import errno
import os
import warnings
from pathlib import Path

from spd_optax.audit import facts, reading
from spd_optax.audit.advice import AuditWarning
from spd_optax.audit.reading import Fields


class AuditFile:
  """A new log, or one that goes on; no other process can open it.

  Args:
    path: of a regular file, or of none.
    header: what the first line says, or should.
    fsync: whether to wait after each line until the disk has it.
    depth: how far up the stack of a warning the user's line is.

  Attributes:
    hash: of the last line.
    resumed: whether the next record is the first after the file was opened again.

  Raises:
    AuditFileError: if the file is no whole audit log.
    ValueError: if it is the log of another run.
    OSError: if it cannot be opened or written.
  """

  def __init__(self, path: Path, header: Fields, fsync: bool, depth: int):
    facts.check_path(path)
    self.path, self._header, self._fsync = path, header, fsync
    self._size, self.hash, self.resumed = 0, '', False
    binary = getattr(os, 'O_BINARY', 0)  # Windows would write two bytes for a new line
    self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | binary, 0o666)
    try:
      facts.lock(self._file, path)
      if reading.read_header(path) is None:
        os.ftruncate(self._file, 0)  # of a header whose writer was killed
        self.append(header)
      else:
        self._continue(depth)
    except BaseException:
      self.close()
      raise

  def size_now(self) -> int:
    """Bytes on the disk."""
    return os.fstat(self._file).st_size

  def close(self) -> None:
    facts.unlock(self._file)
    os.close(self._file)

  def _continue(self, depth: int) -> None:
    """Goes on after the last whole line of the file."""
    run = reading.read(self.path)
    facts.compare(self.path, run.header, self._header)
    if run.torn:
      warnings.warn(
        f'{self.path}: the last {run.torn} bytes are of a record whose writer was killed; they '
        'are removed, and the log goes on after the last whole record',
        AuditWarning,
        stacklevel=depth,
      )
      os.ftruncate(self._file, run.whole)
    self._size, self.hash, self.resumed = run.whole, run.hash, True

  def _synchronize(self) -> None:
    """Reads again after a write that was interrupted (Ctrl-C), or a change from outside."""
    found = os.fstat(self._file)
    if not found.st_nlink:
      raise FileNotFoundError(errno.ENOENT, 'the audit log was deleted', str(self.path))
    if found.st_size != self._size:
      self._continue(6)

  def append(self, fields: Fields) -> None:
    """One write of a whole line; where it fails the file ends as before.

    Raises:
      OSError: if the disk is full, or the file was deleted.
    """
    self._synchronize()
    line, digest = reading.seal(fields, self.hash)
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
        str(self.path),
      ) from error
    self._size, self.hash = self._size + len(line), digest
    self.resumed = self.resumed and 'resumed' not in fields
