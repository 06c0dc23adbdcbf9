"""Writing an audit log: one sealed line per logged step, never half a line."""

import datetime
import operator
import os
import time
import types
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import jax

from spd_optax import norms, readout
from spd_optax.audit import facts, lines
from spd_optax.audit.advice import PATIENCE
from spd_optax.audit.lines import FORMAT, SCHEMA, Fields
from spd_optax.audit.writer import Pending, Writer
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

  The file is closed by `close`, by the end of a `with` block, or when nothing refers to the log
  any more, as where a cell of a notebook makes a new one. A forked process does not write.

  With several processes make the log in all of them, after `jax.distributed.initialize`, and call
  `record` and `close` in all. Only process 0 touches the path; what goes wrong with it, such as a
  full disk, is raised there alone, after all communication of the call: a process 0 that catches
  it stays in step with the others, and one that does not ends like after any other error.

  Args:
    path: the file; a new one, or one that an AuditLog has written.
    transform: what SPD was built with, as 'adam_spd'; free text.
    hyperparameters: its arguments and the optimizer's, as JSON can hold them: numbers,
      strings, None, lists and dicts of them.
    source: where the anchor comes from, as 'google/vit-base-patch16': free text or a path. None:
      not named.
    captured: True says that the anchor is the params at the first update (`anchor=None`), False
      that it was passed. None: not said; the state cannot tell, and a warning that training
      does not start at the anchor is then given only where no `source` is named.
    moving_anchor: whether the anchor is meant to change (`anchor_ema`, `reanchor`). Then
      its fingerprint is not compared on reopening, and there are no relative distances.
    stack_axis: the transformation's own, and
    group: likewise; only for relative distances, see `layer_report`.
    patience: updates after which to warn that no layer is ever held, or all always are.
    fsync: whether `record` writes at once and waits until the disk has it: even a power failure
      then loses nothing. It waits for the step, too.

  Raises:
    TypeError: naming every argument of another type, and what JSON cannot hold.
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
    source: str | os.PathLike[str] | None = None,
    captured: bool | None = None,
    moving_anchor: bool = False,
    stack_axis: StackAxis = None,
    group: Group = None,
    patience: int = PATIENCE,
    fsync: bool = False,
  ):
    self.path = Path(path).absolute()  # whatever becomes the working directory later
    self._facts, self._anchor = facts.described(
      transform, hyperparameters, source, captured, moving_anchor, patience=patience, fsync=fsync
    )
    self._stack_axis, self._group = stack_axis, group
    self._header: Fields | None = None
    self._layout: readout.Layout = ()
    self._last_step: int | None = None
    self._fsync = fsync
    self._writer = Writer(self.path, operator.index(patience), fsync)
    weakref.finalize(self, self._writer.close).atexit = False  # the writer sees to that itself
    self._writes = jax.process_index() == 0
    if self._writes:
      facts.check_path(self.path)

  @property
  def hash(self) -> str:
    """The hash of the last line written; '' before the first record and off process 0."""
    return self._writer.hash

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
      RuntimeError: in a process that was forked from the one that opened the file.
    """
    self._writer.check_owner()
    states = readout.states_in(opt_state, 'AuditLog.record(step, opt_state)')
    metrics = facts.checked_metrics({} if metrics is None else metrics)
    step = operator.index(step)
    if self._last_step is not None and step <= self._last_step:
      raise ValueError(f'AuditLog.record: step {step} after step {self._last_step}')
    header = self._header_of(states)
    now = readout.begin(states, list(metrics.values()))
    # All communication is done: what fails below may do so on process 0 alone.
    if self._writes:
      when = round(time.time(), 3)
      self._writer.put(header, Pending(step, when, tuple(metrics), self._layout, now))
    self._last_step = step
    if self._fsync:
      self._writer.write()

  def flush(self) -> None:
    """Writes the last record now.

    Raises:
      OSError: see `record`.
    """
    self._writer.write()

  def close(self) -> None:
    """Writes the last record and closes the file; the next record would open it again.

    Raises:
      OSError: see `record`.
    """
    self._header = None
    self._writer.close()

  def __enter__(self) -> Self:
    return self

  def __exit__(
    self,
    kind: type[BaseException] | None,
    error: BaseException | None,
    trace: types.TracebackType | None,
  ) -> None:
    self.close()

  def _header_of(self, states: States) -> Fields:
    """Before a record: the header, or a check that it still holds."""
    layout = readout.layout(states)
    if self._header is None:
      if readout.updates(states) == 0:
        raise ValueError(
          'AuditLog.record: record after the first update; before it the anchor may not be the '
          'one that is captured, and there is nothing to log'
        )
      self._header, self._layout = self._header_now(states), layout
    elif layout != self._layout:
      raise ValueError('AuditLog.record: the layers are not those of the first record')
    return self._header

  def _header_now(self, states: States) -> Fields:
    moving = self._anchor['moving']
    slots = readout.slots(states)
    sizes = norms.anchor_norms(states, self._stack_axis, self._group)
    known = [None if moving or not isinstance(x, float) else x for x in lines.numbers(sizes)]
    return {
      'format': FORMAT,
      'schema': SCHEMA,
      'started': datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds'),
      'versions': facts.versions(),
      **self._facts,
      'anchor': {'fingerprint': norms.fingerprint(states), **self._anchor, 'norms': known},
      'layers': [slot.name for slot in slots],
      'states': [n for n in readout.sizes(readout.layout(states)) if n],
    }
