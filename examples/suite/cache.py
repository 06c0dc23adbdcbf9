"""Results of jobs on disk: what is done is not done again, unless what it depends on changed."""

import hashlib
import importlib
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from flax import serialization

import digits
import prose
import training
from suite import adapters, classifiers, jobs, models, tasks, text

SHARED = (adapters, classifiers, digits, jobs, models, prose, tasks, text, training)
LIBRARY = ('anchors', 'baselines', 'formulas', 'layers', 'projection_decay', 'step', 'trees')


def digest(*functions: Callable[..., Any], **settings: Any) -> str:
  """A hash of settings, of these functions' code, and of the code that all jobs share.

  Comments and docstrings do not count.
  """
  library = [importlib.import_module(f'spd_optax.{name}') for name in LIBRARY]
  sources = [prose.bare(inspect.getsource(module)) for module in (*SHARED, *library)]
  sources += [inspect.getsource(function) for function in functions]
  text = json.dumps([sources, settings], sort_keys=True, default=str)
  return hashlib.sha256(text.encode()).hexdigest()[:16]


def records(path: Path, key: str, make: Callable[[], Sequence[Mapping[str, Any]]]) -> list[Any]:
  """The records in the file if they were made under the key; else they are made, and kept."""
  if path.exists() and (kept := json.loads(path.read_text()))['digest'] == key:
    return kept['records']
  made = list(make())
  _replace(path, json.dumps({'digest': key, 'records': made}).encode())
  return made


def params(path: Path, key: str, make: Callable[[], Any]) -> Any:
  """The same for nested dicts of arrays."""
  where = path.with_suffix(f'.{key}.msgpack')
  if not where.exists():
    _replace(where, serialization.to_bytes(make()))
  return serialization.msgpack_restore(where.read_bytes())


def _replace(path: Path, content: bytes) -> None:
  """Writes the whole file or nothing."""
  path.parent.mkdir(parents=True, exist_ok=True)
  part = path.with_name(path.name + '.part')
  part.write_bytes(content)
  part.replace(path)
