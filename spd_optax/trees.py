"""Trees as lists of paths and leaves, and values given for prefixes of a tree.

Paths decide what belongs together, not tree structures. So a plain dict from a checkpoint
fits FrozenDict, dataclass, Equinox or ``nnx.State`` params. Transformations that hide leaves
(``optax.masked``, ``optax.partition``) or box them (``flax.nnx``) need no special case.
"""

import dataclasses
import functools
from collections import Counter
from collections.abc import Callable, Container, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.tree_util import GetAttrKey, PyTreeDef, keystr

from spd_optax import checks

Keys = tuple[str, ...]
Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Flat:
  """A tree taken apart."""

  keys: tuple[Keys, ...]  # the path of each leaf
  leaves: list[Any]
  treedef: PyTreeDef
  holes: tuple[Keys, ...]  # paths of nodes without leaves, which stand for what is left out

  @functools.cached_property
  def paths(self) -> list[str]:
    """'/'-joined paths of the leaves."""
    return [join(keys) for keys in self.keys]

  @functools.cached_property
  def by_path(self) -> dict[str, Any]:
    """Leaves by their '/'-joined paths."""
    return dict(zip(self.paths, self.leaves, strict=True))

  def without(self, left_out: Sequence[bool]) -> 'Flat':
    """The tree with holes in place of some leaves."""
    if not any(left_out):
      return self
    each = list(zip(self.keys, self.leaves, left_out, strict=True))
    return dataclasses.replace(
      self,
      keys=tuple(keys for keys, _, out in each if not out),
      leaves=[leaf for _, leaf, out in each if not out],
      holes=(*self.holes, *(keys for keys, _, out in each if out)),
    )


def join(keys: Keys) -> str:
  """('block', '0', 'kernel') → 'block/0/kernel'."""
  return '/'.join(keys)


def shown(path: str | Keys) -> str:
  """A path for messages, where the root has a name."""
  return (path if isinstance(path, str) else join(path)) or '(root)'


def _entries(tree: Any, is_leaf: Callable[[Any], bool]) -> list[tuple[Keys, Any]]:
  """(path, leaf) pairs.

  A box around a single array (nnx.Variable, nn.Partitioned) adds a last entry
  `.value` to the path. It is left out: nnx.Optimizer passes boxes to init and bare
  arrays to update.
  """
  entries = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)[0]
  boxed = {path[:-1] for path, _ in entries if path and path[-1] == GetAttrKey('value')}
  if boxed:
    inside = Counter(path[:i] for path, _ in entries for i in range(len(path)))
    boxed = {path for path in boxed if inside[path] == 1}
  return [
    (tuple(keystr((key,), simple=True) for key in (path[:-1] if path[:-1] in boxed else path)), x)
    for path, x in entries
  ]


def _is_hole(node: object) -> bool:
  """None, optax.MaskedNode and the like; an empty dict, list or tuple is none."""
  container = hasattr(node, 'keys') or isinstance(node, list) or type(node) is tuple
  return not container and not jax.tree.leaves(node)


def is_placeholder(params: optax.Params) -> bool:
  """Whether `optax.tree.map_params` passed its placeholder, a node without leaves, as params."""
  treedef: Any = jax.tree.structure(params)
  lone = treedef.num_nodes == 1  # a module of holes is none
  return lone and _is_hole(params) and not isinstance(params, optax.MaskedNode | None)


def flatten(tree: Any, is_leaf: Callable[[Any], bool] = lambda node: False) -> Flat:
  """Takes a tree apart; leaves are what `jax.tree.leaves` gives."""
  found = _entries(tree, lambda node: _is_hole(node) or is_leaf(node))
  full = [(keys, leaf) for keys, leaf in found if not _is_hole(leaf)]
  flat = Flat(
    keys=tuple(keys for keys, _ in full),
    leaves=[leaf for _, leaf in full],
    treedef=jax.tree.structure(tree, is_leaf=is_leaf),
    holes=tuple(keys for keys, leaf in found if _is_hole(leaf)),
  )
  if len(flat.by_path) < len(flat.paths):  # as of {'a': {'b/c': 1}, 'a/b': {'c': 2}}
    twice = sorted(path for path, count in Counter(flat.paths).items() if count > 1)
    raise ValueError(f'several leaves have the same path, rename one of each: {", ".join(twice)}')
  return flat


def told_apart(keys: Mapping[str, str], summary: str) -> dict[str, str]:
  """Names by key, from keys by name; raises a ValueError that lists all names that share one."""
  found: dict[str, list[str]] = {}
  for name, key in keys.items():
    found.setdefault(key, []).append(name)
  checks.raise_all([', '.join(same) for same in found.values() if len(same) > 1], summary)
  return {key: same[0] for key, same in found.items()}


def match_shapes(found: Mapping[str, Shape], expected: Mapping[str, Shape], summary: str) -> None:
  """Raises a ValueError that lists, by path, where the state has other shapes than expected."""
  problems = [
    f'{shown(name)}: {found.get(name, "nothing")} in the state, '
    f'{expected.get(name, "nothing")} expected'
    for name in sorted(found.keys() | expected.keys())
    if found.get(name) != expected.get(name)
  ]
  checks.raise_all(problems, summary)


def prefix_values(
  prefix: Any, params: Flat, name: str, is_value: Callable[[Any], bool] = lambda node: False
) -> list[Any]:
  """One value per leaf of `params` from a tree that is a prefix of the params.

  None and `optax.MaskedNode` are values, and so are nodes for which `is_value` holds.
  Entries for parts that `params` leaves out (holes made by `optax.masked`, …) are passed over.
  """
  found = _entries(prefix, lambda node: _is_hole(node) or is_value(node))
  entries = dict(found)
  used = {keys: _covering(entries, keys) for keys in params.keys}
  missing = {keys for keys, at in used.items() if at is None}
  left_out = set(params.holes)
  unknown = {
    keys
    for keys in entries.keys() - set(used.values()) - {()}
    if _covering(left_out, keys) is None and not any(h[: len(keys)] == keys for h in left_out)
  }
  checks.raise_all(
    sorted(
      [f'{shown(keys)}: in the params, missing in {name}' for keys in missing]
      + [f'{shown(keys)}: in {name}, missing in the params' for keys in unknown]
    ),
    f'{name} must be a tree like the params, or a prefix of it '
    '(None at a leaf or subtree leaves it out):',
  )
  found_at = [entries[at] for at in used.values() if at is not None]
  # A module all of whose leaves are None says None.
  return [None if _is_hole(x) and not isinstance(x, optax.MaskedNode) else x for x in found_at]


def _covering(entries: Container[Keys], keys: Keys) -> Keys | None:
  """The entry at `keys` or above it."""
  return next((keys[:i] for i in range(len(keys) + 1) if keys[:i] in entries), None)


def values_for(rule: Any, params: Flat, name: str, is_value: Callable[[Any], bool]) -> list[Any]:
  """One value per leaf from a value for all, a prefix tree, or `(path, leaf) -> value`."""
  if rule is None or is_value(rule):
    return [rule] * len(params.leaves)
  if checks.is_function(rule):
    return [rule(path, leaf) for path, leaf in zip(params.paths, params.leaves, strict=True)]
  return prefix_values(rule, params, name, is_value)


def _fits(update: Any, param: Any) -> bool:
  """Whether the shapes agree, and for a floating param the kinds of numbers; not the widths."""
  if jnp.shape(update) != jnp.shape(param):
    return False
  found, wanted = checks.dtype_of(update), checks.dtype_of(param)
  # Of an integer jax.grad gives float0, other tools zeros.
  return not jnp.issubdtype(wanted, jnp.inexact) or checks.can_replace(found, wanted)


def leaves_like(updates: optax.Updates, params: Flat, name: str) -> list[Any]:
  """The leaves of the updates, in the order of the params, after a check that they fit."""
  flat = flatten(updates)
  checks.arrays(name, flat.by_path)
  ours, theirs = params.by_path, flat.by_path
  problems = [f'{shown(at)}: in the params, missing in the {name}' for at in ours.keys() - theirs]
  problems += [f'{shown(at)}: in the {name}, missing in the params' for at in theirs.keys() - ours]
  problems += [
    f'{shown(at)}: param {checks.kind_of(ours[at])}, {name} {checks.kind_of(leaf)}'
    for at, leaf in theirs.items()
    if at in ours and not _fits(leaf, ours[at])
  ]
  if not problems and flat.paths != params.paths:
    problems = ['the leaves come in another order: keys may be strings here, and numbers there']
  checks.raise_all(
    sorted(problems), f'the {name} must have the structure, shapes and kinds of the params:'
  )
  return flat.leaves
