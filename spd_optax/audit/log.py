"""Writing an audit log: one sealed line per logged step, never half a line."""

import datetime
import errno
import importlib
import json
import operator
import os
import platform
import time
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import jax
import msgspec
import numpy as np

from spd_optax import checks, fingerprints, reports
from spd_optax.audit import format
from spd_optax.audit.advice import PATIENCE
from spd_optax.audit.format import Header, Record
from spd_optax.audit.writer import Writer
from spd_optax.layers import Group, StackAxis

VERSIONS_OF = ('jax', 'jaxlib', 'optax', 'numpy', 'spd_optax')  # and of Python


class AuditLog:
  """A record of what SPD did in a run, in a file of JSON Lines that survives the run.

  The training step stays as it is. Call `record` with the state that it returned:

      with spd.AuditLog('run.jsonl', transform='adam_spd', source='google/vit-base-patch16') as log:
        for step, batch in enumerate(batches):
          params, state, loss = train_step(params, state, batch)
          log.record(step, state, {'loss': loss})

  `python -m spd_optax.audit report run.jsonl` shows the file, `audit.format` describes it.

  A record is written when the next one comes, or at `flush` or `close`. So nothing waits for
  the step that the device still computes. Each record is one write of a whole line, with the hash
  of the line before it. A killed process loses at most the last one. A full disk raises an error,
  and the file keeps all earlier records. `verify` finds an edited or missing line.

  The path of an earlier log continues it, if header and anchor agree. Call `flush` before each
  checkpoint; then no record is missing if a run goes on from it. Call `close` after the run went
  back to a checkpoint; then the next record may have an earlier step.

  Warnings say, once each, that SPD never holds a layer, that it always does, that the anchor
  is not where training started, that a layer grows away from it while constrained, or that values
  are not finite. A layer whose ratio is always 1, as of `l2_sp`, is meant to be held.

  `close` closes the file. So does the end of a `with` block, or of the last reference to the log.
  A forked process does not write.

  With several processes, make the log in all of them, after `jax.distributed.initialize`, and call
  `record` and `close` in all. Only process 0 touches the path. An error of the file is raised
  there alone, after all communication of the call, so it may be caught.

  Args:
    path: the file; a new one, or one that an AuditLog has written.
    transform: what SPD was built with, as 'adam_spd'; free text.
    hyperparameters: its arguments and the optimizer's, as JSON can hold them: numbers,
      strings, None, lists and dicts of them.
    source: where the anchor comes from, as 'google/vit-base-patch16': free text or a path.
    captured: True says that the anchor is the params at the first update (`anchor=None`). False
      says that it was passed. None says neither. A warning that training does not start at the
      anchor is then given only if `source` is None, too.
    moving_anchor: whether the anchor is meant to change (`anchor_ema`, `reanchor`). A log is then
      continued with another, and there are no relative distances.
    stack_axis, group: the transformation's own; only for relative distances, see `layer_report`.
    patience: updates after which to warn that no layer is ever held, or that all always are.
    fsync: whether `record` waits for its step, and until the disk has it. Even a power failure
      then loses nothing.

  Raises:
    TypeError: naming every argument of another type, and what JSON cannot hold.
    AuditFileError: a ValueError, if `path` is no audit log (a directory, a device, any other file),
      or one of a newer schema.
    OSError: if the directory of `path` does not exist.

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
    >>> len(audit.verify(path, log.hash).records)
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
    source = os.fspath(source) if isinstance(source, os.PathLike) else source
    plain, problems = _plain_items({} if hyperparameters is None else hyperparameters)
    expected = (
      ('transform', transform, 'a string', isinstance(transform, str)),
      ('source', source, 'a string, a path or None', isinstance(source, str | None)),
      ('captured', captured, 'True, False or None', isinstance(captured, bool | None)),
      ('moving_anchor', moving_anchor, 'True or False', isinstance(moving_anchor, bool)),
      ('patience', patience, 'an integer of 1 or more', checks.is_count(patience)),
      ('fsync', fsync, 'True or False', isinstance(fsync, bool)),
    )
    problems += [
      f'{name}: expected {what}, found {checks.kind_of(value)}'
      for name, value, what, is_right in expected
      if not is_right
    ]
    if problems:
      raise TypeError('AuditLog:\n  ' + '\n  '.join(problems))
    self._run: dict[str, Any] = {'transform': format.text(transform), 'hyperparameters': plain}
    source = None if source is None else format.text(source)
    self._anchor: dict[str, Any] = {'source': source, 'captured': captured, 'moving': moving_anchor}
    self._stack_axis, self._group, self._fsync = stack_axis, group, fsync
    self._header: Header | None = None
    self._last_step: int | None = None
    self._writer = Writer(self.path, operator.index(patience), fsync)
    weakref.finalize(self, self._writer.close).atexit = False  # the writer sees to that itself
    self._writes = jax.process_index() == 0
    if self._writes and self.path.exists():  # fails early, before a run has trained
      next(iter(format.Lines(self.path)), None)
    elif self._writes and not self.path.parent.is_dir():
      raise FileNotFoundError(errno.ENOENT, 'AuditLog: no such directory', str(self.path.parent))

  @property
  def hash(self) -> str:
    """The hash of the last line written; '' before the first record and off process 0."""
    return self._writer.hash

  def record(self, step: int, opt_state: Any, metrics: Mapping[str, Any] | None = None) -> None:
    """Appends one record.

    Args:
      step: larger than the step before. After `close`, or in a new log of the same path, it may
        go back to where a checkpoint was, and supersedes the records that it goes through again.
      opt_state: the optimizer state after the step, with SPD in it at any depth.
      metrics: the user's own numbers by name: loss, accuracy on the new data and on the old, ...

    Raises:
      TypeError: if there is no state of SPD; naming every metric that is no number.
      ValueError: before the first update; if the step does not increase; if the layers have
        changed; if the file is the log of another run, naming all that differs.
      OSError: if the disk is full, or another process writes the file. The file then ends with
        the last whole record.
      RuntimeError: in a process that was forked from the one that opened the file.
    """
    self._writer.check_owner()
    states = reports.states_in(opt_state, 'AuditLog.record(step, opt_state)')
    metrics = _checked_metrics({} if metrics is None else metrics)
    step = operator.index(step)
    if self._last_step is not None and step <= self._last_step:
      raise ValueError(
        f'AuditLog.record: step {step} after step {self._last_step}; call close() after the run '
        'went back to a checkpoint'
      )
    header = self._header_of(states)
    values, now = reports.begin(states), round(time.time(), 3)

    def pending() -> Record:
      numbers = {name: float(np.asarray(value)) for name, value in metrics.items()}
      return Record(step, now, **values(), metrics=numbers, resumed=False)

    # All communication is done: what fails below may do so on process 0 alone.
    if self._writes:
      self._writer.put(header, pending)
    self._last_step = step
    if self._fsync:
      self._writer.write()

  def flush(self) -> None:
    """Writes the last record now; raises what `record` does."""
    self._writer.write()

  def close(self) -> None:
    """Writes the last record and closes the file; the next record would open it again."""
    self._header = self._last_step = None
    self._writer.close()

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *error: object) -> None:
    self.close()

  def _header_of(self, states: reports.States) -> Header:
    """The header before a record; checks that it still holds."""
    layout = [(reports.shapes(state), list(state.rule_state)) for state in states.values()]
    if self._header is None:
      if not any(int(state.count) for state in states.values()):
        raise ValueError(
          'AuditLog.record: record after the first update; before it the anchor may not be the '
          'one that is captured, and there is nothing to log'
        )
      self._header, self._layout = self._new_header(states), layout
    elif layout != self._layout:
      raise ValueError('AuditLog.record: the layers are not those of the first record')
    return self._header

  def _new_header(self, states: reports.States) -> Header:
    words = [fingerprints.words_of(state.anchor) for state in states.values()]
    norms = format.numbers(reports.anchor_norms(states, self._stack_axis, self._group))
    known = [None if self._anchor['moving'] or not isinstance(x, float) else x for x in norms]
    fingerprint = fingerprints.as_text(np.add.reduce(words))
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


def _plain_items(items: Any) -> tuple[dict[str, Any], list[str]]:
  """The items as JSON holds them, and what it cannot hold."""
  if not isinstance(items, Mapping):
    return {}, [f'hyperparameters: expected a dict, found {checks.kind_of(items)}']
  found, problems = {}, []
  for name, value in items.items():
    try:
      line = json.dumps({name: value}, default=_plain, allow_nan=False)
      found[name] = msgspec.json.decode(line)[name]  # a KeyError if the name is no string
    except (TypeError, ValueError, KeyError, AttributeError, msgspec.DecodeError):
      problems.append(
        f'hyperparameters {name!r}: expected a finite number, a string, None, or a list or dict of '
        f'them, by a name; found {checks.kind_of(value)} (describe a function in words)'
      )
  return found, problems


def _plain(value: Any) -> Any:
  return os.fspath(value) if isinstance(value, os.PathLike) else value.tolist()


def _checked_metrics(metrics: Mapping[str, Any]) -> dict[str, Any]:
  """A copy of the metrics; raises a TypeError that names all that are no numbers."""
  if not isinstance(metrics, Mapping):
    raise TypeError(f'AuditLog.record: metrics: expected a dict, found {checks.kind_of(metrics)}')
  numeric = bool | int | float | np.number | np.bool_ | np.ndarray | jax.Array
  problems = [
    f'{name!r}: {checks.kind_of(value)}'
    for name, value in metrics.items()
    if not isinstance(name, str) or not isinstance(value, numeric) or np.ndim(value)
  ]
  if problems:
    raise TypeError('AuditLog.record: metrics must be numbers by name:\n  ' + '\n  '.join(problems))
  # Arrays of NumPy may change, and those of JAX be donated, before the record is written.
  return {
    format.text(name): jax.numpy.copy(x) if isinstance(x, jax.Array) else float(x)
    for name, x in metrics.items()
  }
