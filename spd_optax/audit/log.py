"""Writing an audit log: one sealed line per logged step, never half a line."""

import atexit
import datetime
import operator
import os
import time
import types
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Self

import jax

from spd_optax import norms, readout
from spd_optax.audit import facts, reading
from spd_optax.audit.advice import PATIENCE, AuditWarning, Watcher
from spd_optax.audit.file import AuditFile
from spd_optax.audit.reading import FORMAT, SCHEMA, Fields, Record
from spd_optax.layers import Group, StackAxis
from spd_optax.readout import States


class AuditLog:
  """A record of what SPD did in a run, in a file of JSON Lines that survives the run.

  Change nothing in the training step; call `record` with the state that it returned:

      with spd.AuditLog('run.jsonl', transform='adam_spd', source='google/vit-base-patch16') as log:
        for step, batch in enumerate(batches):
          params, state, loss = train_step(params, state, batch)
          log.record(step, state, {'loss': loss})

  A record is written when the next one comes, or at `flush` or `close`, so that nothing waits for
  the step that the device is still computing. Each is one write of a whole line: a killed process
  loses at most the last one; a full disk raises an error, and the file keeps all earlier records.
  Opening the path of an earlier log continues it, if header and anchor agree; `flush` before each
  checkpoint, so that no record is missing where a run goes on from it. Each line carries
  the hash of the one before it, so that `verify` finds an edited or missing line. Warnings
  say, once each, where SPD never holds a layer, always does, has an anchor that is not where
  training started, grows away from it while constrained, or meets values that are not finite.

  ``python -m spd_optax.audit report run.jsonl`` shows the file. `spd_optax.audit.reading`
  describes the format.

  With several processes call `record` in all of them; only process 0 writes.

  Args:
    path: the file; a new one, or one that an AuditLog has written.
    transform: what SPD was built with, as 'adam_spd'; free text.
    hyperparameters: its arguments and the optimizer's, as JSON can hold them: numbers,
      strings, None, lists and dicts of them.
    source: where the anchor comes from, as 'google/vit-base-patch16'; free text. None says that it
      was captured: the params at the first update.
    moving_anchor: whether the anchor is meant to change (`anchor_ema`, `reanchor`). Then
      its fingerprint is not compared on reopening, and there are no relative distances.
    stack_axis: the transformation's own, and
    group: likewise; only for relative distances, see `layer_report`.
    patience: updates after which to warn that no layer is ever held, or all always are.
    fsync: whether `record` writes at once and waits until the disk has it: even a power failure
      then loses nothing. It waits for the step, too.

  Raises:
    TypeError: naming the hyperparameters that JSON cannot hold.
    AuditFileError: a ValueError, if the file there is no audit log, or of a newer schema.
    OSError: if `path` is a directory, or no regular file, or in a directory that does not exist.

  Example:
    >>> import jax.numpy as jnp, tempfile
    >>> import spd_optax as spd
    >>> params = {'kernel': jnp.ones((2, 2))}
    >>> tx = spd.adam_spd(1e-3)
    >>> state = tx.init(params)
    >>> path = tempfile.mkdtemp() + '/run.jsonl'
    >>> with spd.AuditLog(path, transform='adam_spd', hyperparameters={'lr': 1e-3}) as log:
    ...   for step in range(3):
    ...     updates, state = tx.update(params, state, params)
    ...     log.record(step, state, {'loss': 1.0})
    >>> from spd_optax import audit
    >>> len(audit.verify(path).records)
    3
  """

  def __init__(
    self,
    path: str | os.PathLike[str],
    *,
    transform: str,
    hyperparameters: Mapping[str, Any] | None = None,
    source: str | None = None,
    moving_anchor: bool = False,
    stack_axis: StackAxis = None,
    group: Group = None,
    patience: int = PATIENCE,
    fsync: bool = False,
  ):
    self.path = Path(path)
    self._facts = {'transform': transform, 'hyperparameters': facts.as_json(hyperparameters or {})}
    self._anchor = {'source': source, 'moving': moving_anchor}
    self._stack_axis, self._group = stack_axis, group
    self._patience, self._fsync = patience, fsync
    self._file: AuditFile | None = None
    self._header: Fields | None = None
    self._layout: readout.Layout = ()
    self._pending: _Pending | None = None
    self._last_step: int | None = None
    self.hash = ''
    facts.check_path(self.path)

  def record(self, step: int, opt_state: Any, metrics: Mapping[str, Any] | None = None) -> None:
    """Appends one record.

    Args:
      step: larger than the step before; after reopening it may go back, to where a
        checkpoint was. The records that it goes through again are then superseded.
      opt_state: the optimizer state after the step, with SPD in it at any depth.
      metrics: the user's own numbers by name: loss, accuracy on the new data and on the old, ...

    Raises:
      TypeError: if there is no state of SPD; naming every metric that is no number.
      ValueError: before the first update; if the step does not increase; naming all that
        differs, if the layers have changed or the file is the log of another run.
      OSError: if the disk is full, or another process writes the file. The file then ends with
        the last whole record.
    """
    states = readout.states_in(opt_state, 'AuditLog.record(step, opt_state)')
    metrics = facts.checked_metrics(metrics or {})
    step = operator.index(step)
    if self._last_step is not None and step <= self._last_step:
      raise ValueError(f'AuditLog.record: step {step} after step {self._last_step}')
    self._prepare(states)
    now = readout.begin(states, list(metrics.values()))
    self._write(3)  # may fail, or be interrupted: the record before stays until it is written
    self._pending = _Pending(step, round(time.time(), 3), tuple(metrics), now)
    self._last_step = step
    if self._fsync:
      self._write(3)

  def flush(self) -> None:
    """Writes the last record now.

    Raises:
      OSError: see `record`.
    """
    self._write(3)

  def close(self) -> None:
    """Writes the last record and closes the file; the next record would open it again.

    Raises:
      OSError: see `record`.
    """
    self._close(4)

  def _close(self, depth: int) -> None:
    try:
      self._write(depth)
    finally:
      atexit.unregister(self.close)
      if self._file is not None:
        self._file.close()
      self._file = self._header = None

  def __enter__(self) -> Self:
    return self

  def __exit__(
    self,
    kind: type[BaseException] | None,
    error: BaseException | None,
    trace: types.TracebackType | None,
  ) -> None:
    self._close(4)

  def _prepare(self, states: States) -> None:
    """Before a record: the header, or a check that it still holds."""
    layout = readout.layout(states)
    if self._header is None:
      if readout.updates(states) == 0:
        raise ValueError(
          'AuditLog.record: record after the first update; before it the anchor may not be the '
          'one that is captured, and there is nothing to log'
        )
      header = self._header_now(states)
      if jax.process_index() == 0:
        self._file = AuditFile(self.path, header, self._fsync, 5)
        atexit.register(self.close)
      self._header, self._layout = header, layout
      captured = self._anchor['source'] is None
      sizes = reading.norms_of(header)
      self._watcher = Watcher(header['layers'], sizes, captured, self._patience)
    elif layout != self._layout:
      raise ValueError('AuditLog.record: the layers are not those of the first record')

  def _header_now(self, states: States) -> Fields:
    moving = self._anchor['moving']
    layers = [slot.name for slot in readout.slots(states)]
    sizes = norms.anchor_norms(states, self._stack_axis, self._group)
    known = [None if moving or not isinstance(x, float) else x for x in reading.numbers(sizes)]
    return {
      'format': FORMAT,
      'schema': SCHEMA,
      'started': datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds'),
      'versions': facts.versions(),
      **self._facts,
      'anchor': {'fingerprint': norms.fingerprint(states), **self._anchor, 'norms': known},
      'layers': layers,
    }

  def _write(self, depth: int) -> None:
    """Writes the pending record, and says what is to be said about it."""
    if self._pending is None or self._file is None:
      return
    pending, size = self._pending, self._file.size_now()
    record = _record(pending, self._layout, self._file.resumed)
    self._pending = None
    try:
      self._file.append(_fields(record))
    except BaseException:  # a full disk, or an interrupt, perhaps behind the write
      self._pending = pending if self._file.size_now() == size else None
      raise
    self.hash = self._file.hash
    for advice in self._watcher.see(record):
      warnings.warn(f'step {advice.step}: {advice.message}', AuditWarning, stacklevel=depth)


class _Pending(NamedTuple):
  """A record whose step may still be computed."""

  step: int
  time: float
  metrics: tuple[str, ...]
  reading: readout.Reading


def _record(pending: _Pending, layout: readout.Layout, resumed: bool) -> Record:
  values = readout.values_of(layout, pending.reading)
  return Record(
    step=pending.step,
    time=pending.time,
    updates=int(values.updates.max(initial=0)),
    held=values.condition,
    ratio=values.ratio,
    distance=values.distance,
    steps=values.constrained,
    metrics={name: float(x) for name, x in zip(pending.metrics, values.extra, strict=True)},
    resumed=resumed,
  )


def _fields(record: Record) -> Fields:
  resumed = {'resumed': {'versions': facts.versions()}} if record.resumed else {}
  return {
    'step': record.step,
    'time': record.time,
    'updates': record.updates,
    'held': record.held.astype(int).tolist(),
    'ratio': reading.numbers(record.ratio),
    'distance': reading.numbers(record.distance),
    'steps': record.steps.tolist(),
    'metrics': {name: reading.number(value) for name, value in record.metrics.items()},
    **resumed,
  }
