"""Patterns of paths: what a config can say of leaves, without a function.

A pattern matches whole names of a '/'-joined path, anywhere in it, and all that lies below: 'head'
matches 'head' and 'params/head/kernel', and does not match 'overhead/kernel'. Within a name '*',
'?' and '[ab]' are as in a shell; '**' stands for any number of names. A first '/' ties a pattern
to the root: '/head' does not match 'decoder/head'. Case counts.
"""

import difflib
import functools
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

from spd_optax import checks, trees

Patterns = str | Sequence[str]


def are_patterns(value: object) -> bool:
  """Whether it is a pattern, or a list or tuple of patterns."""
  found = value if isinstance(value, list | tuple) else [value]
  return all(isinstance(pattern, str) and pattern.strip('/') for pattern in found)


def listed(value: Patterns | None) -> tuple[str, ...]:
  """The patterns, of one, several or none."""
  return (value,) if isinstance(value, str) else tuple(value or ())


def stack_axes(rule: Mapping[object, Patterns], params: trees.Flat) -> list[int | None]:
  """For each leaf its axis, from {axis: patterns}; a config may have the axis as a string."""
  pairs = [(axis, pattern) for axis, some in rule.items() for pattern in listed(some)]
  checks.raise_all(
    [f'found {axis!r}' for axis in rule if not str(axis).removeprefix('-').isdigit()],
    "stack_axis: patterns belong to an axis, as in {0: 'encoder/layers'}:",
  )
  check('stack_axis', [pattern for _, pattern in pairs], params)
  axes = [
    sorted({int(str(axis)) for axis, pattern in pairs if place(pattern, path) is not None})
    for path in params.paths
  ]
  each = list(zip(params.paths, axes, strict=True))
  checks.raise_all(
    [f'{trees.shown(path)}: {", ".join(map(str, found))}' for path, found in each if found[1:]],
    'stack_axis: a leaf has one axis, and the patterns of several axes match',
  )
  return [found[0] if found else None for found in axes]


def places(name: str, value: Patterns | None, params: trees.Flat) -> list[str | None]:
  """For each leaf the `place` of the first pattern that matches; None where none does."""
  some = listed(value)
  check(name, some, params)
  found = ((place(pattern, path) for pattern in some) for path in params.paths)
  return [next((at for at in each if at is not None), None) for each in found]


def check(name: str, patterns: Sequence[str], params: trees.Flat) -> None:
  """Raises a ValueError that lists all patterns that match nothing, and paths near to them.

  They may match what `optax.masked` and the like have left out.
  """
  known = [*params.paths, *map(trees.join, params.holes)]
  checks.raise_all(
    [
      f'{pattern!r}: {_near(pattern, params.paths)}'
      for pattern in patterns
      if params.paths and all(place(pattern, path) is None for path in known)
    ],
    f"{name}: a pattern matches whole names of a path ('head' is in 'params/head/kernel', not in "
    f"'overhead'; * and ** as in a shell){checks.STATIC.format(name) if name == 'group' else ''}; "
    'these match no param:',
  )


@functools.lru_cache(maxsize=2**16)
def place(pattern: str, path: str) -> str | None:
  """The path down to where the pattern ends, as early as it can; None where it does not match."""
  names = path.split('/')
  ends = {0}
  for wanted in pattern[1:].split('/') if pattern[0] == '/' else ['**', *pattern.split('/')]:
    if wanted == '**':
      ends = set(range(min(ends), len(names) + 1))
    else:
      ends = {i + 1 for i in ends if i < len(names) and fnmatchcase(names[i], wanted)}
    if not ends:
      return None
  return '/'.join(names[: min(ends)])


def _near(pattern: str, paths: Sequence[str]) -> str:
  """Parts of paths, of as many names, that are spelled almost alike, each with a whole path."""
  wanted = pattern.strip('/')
  length = wanted.count('/') + 1
  parts: dict[str, str] = {}
  for path in paths:
    names = path.split('/')
    for i in range(len(names) - length + 1):
      parts.setdefault('/'.join(names[i : i + length]), path)
  near = [f'{part!r} in {parts[part]}' for part in difflib.get_close_matches(wanted, parts)]
  return f'near are {", ".join(near)}' if near else f'the params are {", ".join(paths):.300}'
