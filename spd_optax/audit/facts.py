"""What an audit log is told from outside, and the checks of it."""

import contextlib
import errno
import importlib
import json
import os
import platform
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from spd_optax import checks, trees
from spd_optax.audit import reading
from spd_optax.audit.lines import Fields

VERSIONS_OF = ('jax', 'jaxlib', 'optax', 'numpy', 'spd_optax')


def described(
  transform: Any, hyperparameters: Any, source: Any, captured: Any, moving: Any, **others: Any
) -> tuple[Fields, Fields]:
  """What the header says of the transformation, and of its anchor, in the user's words.

  `others` are `patience` and `fsync`, which the header does not have.

  Raises:
    TypeError: naming everything that is not of the right type, or that JSON cannot hold.
  """
  source = os.fspath(source) if isinstance(source, os.PathLike) else source
  expected = (
    ('transform', transform, 'a string', isinstance(transform, str)),
    ('source', source, 'a string, a path or None', isinstance(source, str | None)),
    ('captured', captured, 'True, False or None', isinstance(captured, bool | None)),
    ('moving_anchor', moving, 'True or False', isinstance(moving, bool)),
    ('hyperparameters', hyperparameters, 'a dict', isinstance(hyperparameters, Mapping | None)),
    (
      'patience',
      others['patience'],
      'an integer of 1 or more',
      checks.is_count(others['patience']),
    ),
    ('fsync', others['fsync'], 'True or False', isinstance(others['fsync'], bool)),
  )
  problems = [
    f'{name}: expected {what}, found {checks.kind_of(value)}'
    for name, value, what, is_right in expected
    if not is_right
  ]
  found: Fields = {}
  items = hyperparameters.items() if isinstance(hyperparameters, Mapping) else ()
  for name, value in items:
    try:
      found[name] = json.loads(json.dumps({name: value}, default=_plain, allow_nan=False))[name]
    except (TypeError, ValueError, KeyError):  # of a name that is no string
      problems.append(
        f'hyperparameters {name!r}: expected a finite number, a string, None, or a list or dict of '
        f'them, by a name; found {checks.kind_of(value)} (describe a function in words)'
      )
  if problems:
    raise TypeError('AuditLog:\n  ' + '\n  '.join(problems))
  facts = {'transform': transform, 'hyperparameters': found}
  return facts, {'source': source, 'captured': captured, 'moving': moving}


def _plain(value: Any) -> Any:
  if isinstance(value, os.PathLike):
    return os.fspath(value)
  if hasattr(value, 'tolist'):
    return value.tolist()
  raise TypeError


def checked_metrics(metrics: Mapping[str, Any]) -> Mapping[str, Any]:
  """The metrics, after a check that each is a number by a name.

  Raises:
    TypeError: naming all that are none.
  """
  if not isinstance(metrics, Mapping):
    raise TypeError(
      f'AuditLog.record: metrics: expected numbers by name, found {checks.kind_of(metrics)}'
    )
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
    name: jax.numpy.copy(x) if isinstance(x, jax.Array) else float(x) for name, x in metrics.items()
  }


def compare(path: Path, in_file: Fields, now: Fields) -> None:
  """Raises a ValueError that lists all facts of the headers that differ."""
  pairs = {name: (in_file[name], now[name]) for name in ('transform', 'hyperparameters', 'states')}
  names = ['source', 'captured', 'moving', *([] if now['anchor']['moving'] else ['fingerprint'])]
  pairs |= {f'anchor {x}': (in_file['anchor'][x], now['anchor'][x]) for x in names}
  problems = [f'{name}: {a!r} in the file, {b!r} now' for name, (a, b) in pairs.items() if a != b]
  before, after = set(in_file['layers']), set(now['layers'])
  problems += [f'layer {name}: only in the file' for name in sorted(before - after)]
  problems += [f'layer {name}: only now' for name in sorted(after - before)]
  if before == after and in_file['layers'] != now['layers']:
    problems.append('the layers come in another order')
  trees.raise_all(
    problems,
    f'{path} is the log of another run; pass another path, or what the run was begun with '
    '(an anchor that is meant to change: moving_anchor=True):',
  )


def versions() -> dict[str, str]:
  """Of Python and the libraries that decide what a run does."""
  found = {name: str(importlib.import_module(name).__version__) for name in VERSIONS_OF}
  return {'python': platform.python_version(), **found}


def check_path(path: Path) -> None:
  """Fails early, before a run has trained for its first record."""
  if path.is_dir():
    raise IsADirectoryError(errno.EISDIR, 'AuditLog: a directory; pass a file', str(path))
  if not path.parent.is_dir():
    raise FileNotFoundError(errno.ENOENT, 'AuditLog: no such directory', str(path.parent))
  if path.exists():
    if not stat.S_ISREG(path.stat().st_mode):
      raise OSError(errno.EINVAL, 'AuditLog: not a regular file', str(path))
    reading.read_header(path)


def lock(file: int, path: Path) -> None:
  """Keeps a second writer out, where the system can."""
  try:
    import fcntl  # not on Windows

    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError as error:
    raise BlockingIOError(
      errno.EWOULDBLOCK,
      'an AuditLog, of this process or another, has this file open: call its close(), or use it '
      'in a `with` block, which closes it; or pass another path',
      str(path),
    ) from error
  except (ImportError, OSError):
    return


def unlock(file: int) -> None:
  """Lets the next writer in, though a forked child may still have the file open."""
  with contextlib.suppress(ImportError, OSError):
    import fcntl

    fcntl.flock(file, fcntl.LOCK_UN)
