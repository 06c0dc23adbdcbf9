"""Results of jobs on disk: what is done is not done again, unless what it depends on changed."""

import functools
import hashlib
import importlib
import inspect
import json
import pkgutil
import platform
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

from flax import serialization

import prose
import spd_optax

EXAMPLES = Path(__file__).parents[1]
VERSIONS = ('flax', 'jax', 'optax', 'scikit-learn')


def digest(*functions: Callable[..., Any], **settings: Any) -> str:
  """A hash of settings, of these functions' code, and of all that every job depends on.

  With a function counts what it calls in its own module, or has in its closure, and the modules
  that are imported there. Comments and docstrings do not count. The texts to learn come with
  Python, so that its version does.
  """
  modules = dict.fromkeys(m for each in functions for m in imported(inspect.getmodule(each)))
  sources = [
    *library(),
    *(bare(module) for module in modules if module.__name__ != 'suite.methods'),
    *(bare(each) for function in functions for each in calls(function)),
  ]
  text = json.dumps([sources, settings], sort_keys=True, default=str)
  return hashlib.sha256(text.encode()).hexdigest()[:16]


@functools.cache
def library() -> tuple[str, ...]:
  """The library's code, and the versions of others."""
  names = [module.name for module in pkgutil.iter_modules(spd_optax.__path__)]
  modules = [importlib.import_module(f'spd_optax.{name}') for name in names if name != 'audit']
  return (*map(bare, modules), platform.python_version(), *map(metadata.version, VERSIONS))


def imported(module: ModuleType | None) -> list[ModuleType]:
  """The module, the examples' modules that it imports, and those that these import."""
  found = [module] if module else []
  for each in found:
    for value in vars(each).values():
      name = value.__name__ if inspect.ismodule(value) else getattr(value, '__module__', None)
      other = sys.modules.get(name) if isinstance(name, str) else None
      file = getattr(other, '__file__', None)
      if file and other not in found and EXAMPLES in Path(file).parents:
        found.append(other)
  return found


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
