"""Writing an audit log: one sealed line per logged step, never half a line."""

import atexit
import contextlib
import datetime
import errno
import importlib
import json
import math
import operator
import os
import platform
import time
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

import jax
import msgspec
import numpy as np
import optax

from spd_optax import checks, exchange, reports
from spd_optax.audit import format
from spd_optax.audit.advice import PATIENCE, AuditWarning, Watcher
from spd_optax.audit.format import Header, Record
from spd_optax.layers import Group, StackAxis

try:
  import fcntl
except ImportError:  # on Windows: two writers of one file are not kept apart
  fcntl = None  # type: ignore[assignment]

VERSIONS_OF = ('jax', 'jaxlib', 'optax', 'numpy', 'spd_optax')  # and of Python


class AuditLog:
  """A record of what SPD did in a run, in a file of JSON Lines that survives the run.

  The training step stays as it is. Call `record` with the state that it returned:

      with spd.AuditLog('run.jsonl', transform='adam_spd', source='google/vit-base-patch16') as log:
        for step, batch in enumerate(batches):
          params, state, loss = train_step(params, state, batch)
          log.record(step, state, {'loss': loss})

  `python -m spd_optax.audit report run.jsonl` shows the file, `audit.format` describes it.

  A record is written at the next `record`, `flush` or `close`, so `record` does not wait for a step
  that the device still computes. A killed process loses at most the last record. A full disk loses
  no record that was written. An earlier log at `path` is continued, if header and anchor agree.
  Call `flush` before each checkpoint: then no record is missing if a run resumes from it. Call
  `close` after the run went back to a checkpoint: then the next record may have an earlier step.

  The log warns, once each, if SPD never holds a layer or always holds all layers, if the anchor is
  not where training started, if a held layer moves away from its anchor, or if values are not
  finite. A layer whose ratio is always 1, as with `l2_sp`, is meant to be held.

  The log closes at the end of its `with` block, of its last reference, or of the process. A forked
  process does not write. With several processes, make the log in all of them, after
  `jax.distributed.initialize`, and call `record` and `close` in all. Only process 0 uses the path
  and raises errors about it, so you may catch them.

  Args:
    path: the file, either new or written by an earlier AuditLog.
    transform: the function that made the optimizer, such as 'adam_spd'; free text.
    hyperparameters: its arguments and the optimizer's, as JSON can hold them: numbers,
      strings, None, lists and dicts of them.
    source: where the anchor comes from, such as 'google/vit-base-patch16'; free text or a path.
    captured: True says that the anchor is the params at the first update (`anchor=None`). False
      says that it was passed. None says neither: the log then warns that training does not start at
      the anchor only if `source` is None, too.
    baseline: whether the run is without SPD. Its records then come from `baseline_state`.
    moving_anchor: whether the anchor is meant to change (`anchor_ema`, `reanchor`). A log may then
      continue with another anchor, and has no relative distances.
    stack_axis, group: the transformation's own; only for relative distances, see `layer_report`.
    patience: number of updates before a warning that no layer is ever held, or that all layers
      always are.
    fsync: whether `record` waits for its step and for the disk. Then even a power failure loses no
      record.

  Attributes:
    hash: the hash of the last line written; '' before the first record, and on processes other than
      0.

  Raises:
    TypeError: if an argument has another type, or if JSON cannot hold it; names every such
      argument.
    AuditFileError: a ValueError, if `path` is no audit log, or one of a newer schema.
    OSError: if the directory of `path` does not exist.
  """

  _file = -1  # closed

  def __init__(
    self,
    path: str | os.PathLike[str],
    *,
    transform: str = 'SPD',
    hyperparameters: Mapping[str, Any] | None = None,
    source: str | os.PathLike[str] | None = None,
    captured: bool | None = None,
    baseline: bool = False,
    moving_anchor: bool = False,
    stack_axis: StackAxis = None,
    group: Group = None,
    patience: int = PATIENCE,
    fsync: bool = False,
  ):
    self._pending: Callable[[], Record] | None = None  # waits for a step that may be computed
    self.path, self.hash = Path(path).absolute(), ''  # whatever becomes the working directory
    source = os.fspath(source) if isinstance(source, os.PathLike) else source
    plain, problems = _plain_items({} if hyperparameters is None else hyperparameters)
    expected = (
      ('transform', transform, 'a string', isinstance(transform, str)),
      ('source', source, 'a string, a path or None', isinstance(source, str | None)),
      ('captured', captured, 'True, False or None', isinstance(captured, bool | None)),
      ('baseline', baseline, 'True or False', isinstance(baseline, bool)),
      ('patience', patience, 'an integer of 1 or more', isinstance(patience, int) and patience > 0),
    )
    problems += [
      f'{name}: expected {what}, found {checks.kind_of(value)}'
      for name, value, what, is_right in expected
      if not is_right
    ]
    checks.raise_all(problems, 'AuditLog:', TypeError)
    self._run: dict[str, Any] = {'transform': transform, 'hyperparameters': plain}
    self._run['baseline'] = baseline
    moving = bool(moving_anchor)
    self._anchor: dict[str, Any] = {'source': source, 'captured': captured, 'moving': moving}
    self._stack_axis, self._group = stack_axis, group
    self._patience, self._fsync = patience, fsync
    self._header: Header | None = None
    self._waited = False  # for the first update
    self._last_step: int | None = None  # of a record that was taken
    self._written, self._resumed = -math.inf, False  # step of the last record written
    self._writes = jax.process_index() == 0
    if self._writes and self.path.exists():  # fails early, before a run has trained
      next(iter(format.Lines(self.path)), None)
    elif self._writes and not self.path.parent.is_dir():
      raise FileNotFoundError(errno.ENOENT, 'AuditLog: no such directory', str(self.path.parent))

  def record(
    self, step: int, opt_state: optax.OptState, metrics: Mapping[str, Any] | None = None
  ) -> None:
    """Appends one record.

    Before the first update there is nothing to record: the log warns of that once.

    Args:
      step: larger than the step before. After `close`, or in a new log of the same path, it may go
        back to the step of a checkpoint. The new records then supersede the old records of the
        repeated steps.
      opt_state: the optimizer state after the step, with SPD in it at any depth.
      metrics: your own numbers by name: loss, accuracy on the new data and on the old, ... With a
        budget the log adds spd/budget, spd/drift, spd/strength and spd/measured.

    Raises:
      TypeError: if there is no state of SPD; if a metric is not a number (names every such metric).
      ValueError: if the step does not increase; if the layers have changed; if the file is the log
        of another run (names all differences); if SPD has held layers in a run with
        `baseline=True`.
      OSError: if the disk is full, or another process writes the file.
      RuntimeError: in a process that was forked from the one that opened the file.
    """
    self._check_owner()
    states = reports.states_in(opt_state, 'AuditLog.record(step, opt_state)')
    own = {f'spd/{name}': value for name, value in reports.budgets_of(states).items()}
    metrics = _checked_metrics({} if metrics is None else metrics, own)
    step = operator.index(step)
    if self._last_step is not None and step <= self._last_step:
      order = f'step {step} after step {self._last_step}'
      raise ValueError(f'AuditLog.record: {order}; call close() where a run goes back')
    if self._header is None and not any(int(state.count) for state in states):
      self._warn_of_no_update(step)
      return
    layout = [(reports.shapes(state), list(state.rule_state)) for state in states]
    if self._header is None:
      self._header, self._layout = self._new_header(states), layout
    elif layout != self._layout:
      raise ValueError('AuditLog.record: the layers are not those of the first record')
    values, now = reports.begin(states), round(time.time(), 3)

    def pending() -> Record:
      numbers = {name: float(np.asarray(value)) for name, value in metrics.items()}
      return Record(step, now, **values(), metrics=numbers, resumed=False)

    # All communication is done: what fails below may do so on process 0 alone.
    if self._writes:
      if self._file < 0:
        self._open(self._header)
      self.flush()  # if that raises, the record before stays pending, and this one is not taken
      self._pending = pending
    self._last_step = step
    if self._fsync:
      self.flush()

  def flush(self) -> None:
    """Writes the last record now; raises the same errors as `record`."""
    self._check_owner()
    if self._file < 0 or self._header is None or self._pending is None:
      return
    now, size = self._pending, os.fstat(self._file).st_size
    try:
      record = now()
    except Exception:  # the step itself failed, and has no record
      self._pending = None
      raise
    if self._header.baseline and record.constrained.any():
      self._pending = None
      raise ValueError('AuditLog: the run has SPD, which held layers; leave out baseline=True')
    record = record._replace(resumed=self._resumed or record.step <= self._written)
    self._pending = None
    try:
      self._append(format.as_line(record, self._header))
    except BaseException:  # a full disk, or an interrupt, perhaps behind the write
      self._pending = now if os.fstat(self._file).st_size == size else None
      raise
    begins_again = self._resumed and record.step <= self._first
    self._resumed, self._written = False, record.step
    if begins_again:
      checks.warn(
        f'{self.path}: begins again at step {record.step}, as another run would. Reports show the '
        'records from here on alone. To keep both runs apart, pass another path.',
        AuditWarning,
      )
    for advice in self._watcher.see(record):
      checks.warn(f'step {advice.step}: {advice.message}', AuditWarning)

  def close(self) -> None:
    """Writes the last record and closes the file; the next record opens it again."""
    file, own = self._file, self._file >= 0 and self._owner == os.getpid()
    try:
      if own:
        self.flush()
    finally:
      self._file, self._header, self._last_step = -1, None, None
      if own and fcntl:  # a forked child may still have the file open
        with contextlib.suppress(OSError):
          fcntl.flock(file, fcntl.LOCK_UN)
      if file >= 0:
        os.close(file)

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *error: object) -> None:
    self.close()

  def __del__(self) -> None:
    self.close()

  def _check_owner(self) -> None:
    """Raises a RuntimeError in a forked process, in which JAX may not compute either."""
    if self._file >= 0 and self._owner != os.getpid():
      raise RuntimeError(f'{self.path}: this process was forked from the one that writes the log')

  def _warn_of_no_update(self, step: int) -> None:
    """The first update may set the anchor; optax may withhold it, as MultiSteps does."""
    if self._writes and not self._waited:
      self._waited = True
      checks.warn(
        f'AuditLog: no record of step {step}: SPD has made no update yet. The log begins after the '
        'first one.',
        AuditWarning,
      )

  def _new_header(self, states: reports.States) -> Header:
    words = [exchange.words_of(state.anchor) for state in states]
    norms = format.numbers(reports.anchor_norms(states, self._stack_axis, self._group))
    known = [None if self._anchor['moving'] or not isinstance(x, float) else x for x in norms]
    fingerprint = exchange.as_text(np.add.reduce(words))
    return Header(
      format=format.FORMAT,
      schema=format.SCHEMA,
      started=datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds'),
      versions={'python': platform.python_version()}
      | {name: str(importlib.import_module(name).__version__) for name in VERSIONS_OF},
      anchor=format.Anchor(fingerprint=fingerprint, norms=known, **self._anchor),
      layers=[slot.name for slot in reports.slots(states)],
      states=[count for count in reports.sizes(states) if count],
      **self._run,
    )

  def _open(self, header: Header) -> None:
    """Opens a new log, or one that goes on."""
    flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | getattr(os, 'O_BINARY', 0)
    self._file, self._owner = os.open(self.path, flags, 0o666), os.getpid()
    self._watcher = Watcher(header, self._patience)
    try:
      self._lock()
      if not self._continue(header):
        self._begin(header)
        if self._fsync and os.name == 'posix':  # elsewhere a directory cannot be opened
          directory = os.open(self.path.parent, os.O_RDONLY)
          os.fsync(directory)  # the name of the new file
          os.close(directory)
    except BaseException:
      os.close(self._file)
      self._file = -1
      raise
    atexit.register(_close, weakref.ref(self))

  def _begin(self, header: Header) -> None:
    """Writes the first line of a file that has no whole one."""
    os.ftruncate(self._file, 0)  # of a header whose writer was killed
    self._size, self.hash, self._resumed = 0, '', False
    self._append(header)

  def _lock(self) -> None:
    """Keeps a second writer out, where the system can."""
    try:
      if fcntl:
        fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
      message = 'another AuditLog has this file open: call its close(), or use it in a `with` block'
      raise BlockingIOError(error.errno, message, str(self.path)) from error
    except OSError:  # a file system without locks
      return

  def _continue(self, header: Header) -> bool:
    """Goes on after the last whole line of the file, if it has any."""
    lines = format.Lines(self.path)
    self._first = -math.inf
    for line in lines:
      if lines.count == 2:  # the first record
        self._first = msgspec.json.decode(line)['step']
    if lines.header is None:
      return False
    _compare(self.path, lines.header, header)
    if lines.torn:
      checks.warn(
        f'{self.path}: the last {lines.torn} bytes are of a record whose writer was killed; they '
        'are removed, and the log goes on after the last whole record',
        AuditWarning,
      )
      os.ftruncate(self._file, lines.whole)
    self._size, self.hash, self._resumed = lines.whole, lines.hash, True
    return True

  def _append(self, fields: msgspec.Struct) -> None:
    """One write of a whole line; if it fails, the file ends as before."""
    found = os.fstat(self._file)
    if not found.st_nlink:
      raise FileNotFoundError(errno.ENOENT, 'the audit log was deleted', str(self.path))
    is_other = found.st_size != self._size  # an interrupted write, or another program
    if is_other and self._header and not self._continue(self._header):
      self._begin(self._header)
    line, digest = format.seal(fields, self.hash)
    try:
      if os.write(self._file, line) < len(line):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
      if self._fsync:
        os.fsync(self._file)
    except OSError as error:
      with contextlib.suppress(OSError):  # readers recognize a torn line
        os.ftruncate(self._file, self._size)
      error.filename = str(self.path)
      raise
    self._size, self.hash = self._size + len(line), digest


def _close(log: weakref.ref[AuditLog]) -> None:
  """Closes a log at the end of the process, if it is still there."""
  if (found := log()) is not None:
    found.close()


def _plain_items(items: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
  """The items as JSON holds them, and what it cannot hold."""

  def plain(value: Any) -> Any:
    return os.fspath(value) if isinstance(value, os.PathLike) else value.tolist()

  found, problems = {}, []
  for name, value in items.items():
    try:
      line = json.dumps({name: value}, default=plain, allow_nan=False)
      found[name] = msgspec.json.decode(line)[name]  # a KeyError if the name is no string
    except (TypeError, ValueError, KeyError, AttributeError, msgspec.DecodeError):
      problems.append(
        f'hyperparameters {name!r}: expected a finite number, a string, None, or a list or dict of '
        f'them, by a name; found {checks.kind_of(value)}'
      )
  return found, problems


def _checked_metrics(metrics: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
  """A copy of the metrics, and the log's own, which win; raises a TypeError that names bad ones."""
  problems = [
    f'{name!r}: {checks.kind_of(value)}'
    for name, value in metrics.items()
    if not (isinstance(name, str) and checks.is_array(value) and _is_real_number(value))
  ]
  checks.raise_all(problems, 'AuditLog.record: metrics must be numbers by name:', TypeError)
  # Arrays of NumPy may change, and those of JAX be donated, before the record is written.
  return {
    name: jax.device_put(x, x.sharding, may_alias=False) if isinstance(x, jax.Array) else float(x)
    for name, x in {**metrics, **own}.items()
  }


def _is_real_number(value: Any) -> bool:
  """Whether an array, or what has its dtype, is one number, and not complex or without a value."""
  complex_too = jax.numpy.issubdtype(checks.dtype_of(value), np.complexfloating)
  return not (np.ndim(value) or complex_too or checks.without_values(value))


def _compare(path: Path, in_file: Header, now: Header) -> None:
  """Raises a ValueError that lists all facts of the headers that differ."""
  old, new = _facts(in_file), _facts(now)
  checks.raise_all(
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
  found = {
    name: getattr(header, name) for name in ('transform', 'hyperparameters', 'baseline', 'states')
  }
  for name in ('source', 'captured', 'moving', 'fingerprint'):
    found[f'anchor {name}'] = getattr(header.anchor, name)
  return found | {f'layer {name}': f'layer {i}' for i, name in enumerate(header.layers)}
