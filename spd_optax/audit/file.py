"""The file of an audit log, opened for writing: whole lines, or none."""

import contextlib
import errno
import os
from pathlib import Path

from spd_optax.audit import facts, lines, reading
from spd_optax.audit.advice import warn
from spd_optax.audit.lines import Fields


class AuditFile:
  """A new log, or one that goes on; no other process can open it.

  Args:
    path: of a regular file, or of none.
    header: what the first line says, or should.
    fsync: whether to wait after each line until the disk has it.

  Attributes:
    hash: of the last line.
    resumed: whether the next record is the first after the file was opened again.
    inherited: whether this process was forked from the one that opened the file.

  Raises:
    AuditFileError: if the file is no whole audit log.
    ValueError: if it is the log of another run.
    OSError: if it cannot be opened or written.
  """

  def __init__(self, path: Path, header: Fields, fsync: bool):
    facts.check_path(path)
    self.path, self._header, self._fsync = path, header, fsync
    self._size, self.hash, self.resumed = 0, '', False
    self._owner = os.getpid()
    binary = getattr(os, 'O_BINARY', 0)  # Windows would write two bytes for a new line
    self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | binary, 0o666)
    try:
      facts.lock(self._file, path)
      if reading.read_header(path) is None:
        os.ftruncate(self._file, 0)  # of a header whose writer was killed
        self.append(header)
        self._sync_directory()
      else:
        self._continue()
    except BaseException:
      self.close()
      raise

  def size_now(self) -> int:
    """Bytes on the disk."""
    return os.fstat(self._file).st_size

  @property
  def inherited(self) -> bool:
    return os.getpid() != self._owner

  def close(self) -> None:
    if not self.inherited:  # the lock is one for all processes that were forked
      facts.unlock(self._file)
    os.close(self._file)

  def _continue(self) -> None:
    """Goes on after the last whole line of the file."""
    header, found = reading.check_lines(self.path)
    facts.compare(self.path, header, self._header)
    if found.torn:
      warn(
        f'{self.path}: the last {found.torn} bytes are of a record whose writer was killed; they '
        'are removed, and the log goes on after the last whole record'
      )
      os.ftruncate(self._file, found.whole)
    self._size, self.hash, self.resumed = found.whole, found.hash, True

  def _sync_directory(self) -> None:
    """Without it a power failure may lose the name of a new file whose lines the disk has."""
    if self._fsync and os.name == 'posix':  # elsewhere a directory cannot be opened
      directory = os.open(self.path.parent, os.O_RDONLY)
      try:
        os.fsync(directory)
      finally:
        os.close(directory)

  def _synchronize(self) -> None:
    """Reads again after a write that was interrupted (Ctrl-C), or a change from outside."""
    found = os.fstat(self._file)
    if not found.st_nlink:
      raise FileNotFoundError(errno.ENOENT, 'the audit log was deleted', str(self.path))
    if found.st_size != self._size:
      self._continue()

  def append(self, fields: Fields) -> None:
    """One write of a whole line; where it fails the file ends as before.

    Raises:
      OSError: if the disk is full, or the file was deleted.
    """
    self._synchronize()
    line, digest = lines.seal(fields, self.hash)
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
