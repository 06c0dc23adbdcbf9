"""Results of jobs on disk: what is done is not done again, unless what it depends on changed."""

import functools
import hashlib
import importlib
import inspect
import json
import pkgutil
import platform
import textwrap
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from flax import serialization

import comparison
import digits
import finetune_t5
import prose
import spd_optax
import training
from suite import adapters, classifiers, jobs, models, tasks, text

SHARED = (
  *(adapters, classifiers, comparison, digits, finetune_t5),
  *(jobs, models, prose, tasks, text, training),
)
VERSIONS = ('flax', 'jax', 'optax', 'scikit-learn', 'transformers')


def digest(*functions: Callable[..., Any], **settings: Any) -> str:
  """A hash of settings, of these functions' code, and of all that every job depends on.

  With a function counts what it calls in its own module, or has in its closure. Comments and
  docstrings do not count. The texts to learn come with Python, so that its version does.
  """
  sources = [*shared(), *(bare(each) for function in functions for each in calls(function))]
  text = json.dumps([sources, settings], sort_keys=True, default=str)
  return hashlib.sha256(text.encode()).hexdigest()[:16]


@functools.cache
def shared() -> tuple[str, ...]:
  """The modules and versions that every job depends on."""
  names = [module.name for module in pkgutil.iter_modules(spd_optax.__path__)]
  library = [importlib.import_module(f'spd_optax.{name}') for name in names if name != 'audit']
  versions = [platform.python_version(), *map(metadata.version, VERSIONS)]
  return (*(bare(module) for module in (*SHARED, *library)), *versions)


def bare(code: Any) -> str:
  """The source of a module or function, without comments and docstrings."""
  return prose.bare(textwrap.dedent(inspect.getsource(code)))


def calls(function: Callable[..., Any]) -> list[Callable[..., Any]]:
  """The function, and those of its module that it names, and those that these name."""
  found = [function]
  for each in found:
    named = inspect.getclosurevars(each)
    for other in (*named.nonlocals.values(), *named.globals.values()):
      if inspect.isfunction(other) and other.__module__ == function.__module__:
        found += [] if other in found else [other]
  return found


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
