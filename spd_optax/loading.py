"""Anchors from checkpoints: which entry belongs to which param, and what does not fit.

`checkpoint_formats` reads the files.
"""

import importlib
import itertools
import math
import operator
import os
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from spd_optax import anchors, checks, trees
from spd_optax.checkpoint_formats import UNKNOWN, opened, place, reading

Struct = jax.ShapeDtypeStruct
Renamed = str | tuple[str, Sequence[int]] | None  # an entry; and how to transpose it; none
Rename = Callable[[str], Renamed] | Mapping[str, Renamed] | None

SAME = "cannot be told apart, as '.' and '/' are one separator"


class Source(NamedTuple):
  """Where a leaf comes from: an entry under `key` ('.' as '/'), and the axes to transpose it by.

  The name is None where there is no such entry.
  """

  name: str | None
  axes: tuple[int, ...] | None = None


def load_anchor(
  path: str | os.PathLike[str],
  like: optax.Params,
  *,
  key: str = '',
  strict: bool = False,
  rename: Rename = None,
) -> optax.Params:
  """The anchor from a checkpoint: pre-trained weights, placed like the params.

  An entry of the checkpoint belongs to the leaf with the same path. '.' and '/' count as the same
  separator, and a trailing '/value' of nnx is ignored. The loaded array has the shape, dtype and
  sharding of that leaf. From Orbax and safetensors each process reads only what it needs. A leaf
  that the checkpoint lacks, such as a new head, is free (None), and a warning names it. Integer and
  empty leaves, which SPD never holds, are None without a warning.

  Args:
    path: an Orbax directory (from v1, or from the older StandardCheckpointer and CheckpointManager;
      one step, one tree), a `.safetensors` file or a directory of its shards, a flax `.msgpack`
      file, an `.npz` file as big_vision writes them, or a `.h5` file of Keras. Nothing is
      unpickled. An Orbax checkpoint may be in a bucket ('gs://…').
    like: the params that the anchor is for, as arrays or as `jax.ShapeDtypeStruct` with
      a sharding.
    key: path of the params inside the checkpoint, as in 'params' or 'state/params'.
    strict: if True, a leaf that only the params or only the checkpoint have is an error.
    rename: for a checkpoint with other names, such as from PyTorch and Keras: a function or a dict
      from the path of a param to the name of its entry under `key`. ``(name, axes)`` also applies
      ``numpy.transpose(entry, axes)``, then splits or joins axes to fit the shape of the param: the
      kernel of a Flax Dense is ``('dense.weight', (1, 0))`` in PyTorch. Each process reads such an
      entry whole. None says that there is no such entry. Paths that a dict lacks keep their name.
      One entry is one param, so layers that are stacked in the params alone cannot be read.

  Returns:
    A tree like `like` with None for free leaves, to be passed as `anchor`.

  Raises:
    ValueError: if the checkpoint is damaged, comes from PyTorch without a `rename`, or has none of
      the leaves under `key`; if a leaf has another shape, complex numbers for a real param, or NaN
      or infinite values; if an entry that `rename` names is missing; with `strict`, if only one
      side has a leaf. The message names every such leaf or entry.
    TypeError: if `rename` is not a function or a dict, or gives something else for a path; names
      every such path.
    FileNotFoundError, ImportError: if there is no such file, or no library for it.

  Example:
    >>> import jax.numpy as jnp, numpy as np, tempfile
    >>> import spd_optax as spd
    >>> params = {'dense': {'kernel': jnp.zeros((2, 3))}}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...   np.savez(f'{folder}/vit.npz', **{'params/dense/kernel': np.ones((2, 3), 'f4')})
    ...   anchor = spd.load_anchor(f'{folder}/vit.npz', params, key='params')
    >>> optimizer = spd.adam_spd(1e-3, anchor)
  """
  where = _located(path)
  flat = trees.flatten(like)
  wanted = _wanted(flat)
  paths = trees.told_apart({at: _canonical(at) for at in wanted}, f'like: leaves that {SAME}:')
  sources = _sources(rename, paths, flat)
  entries, read = opened(where)
  asked = {source.name for source in sources.values() if source.name is not None}
  names = trees.told_apart(_under(key, entries, asked), f'{where}: entries that {SAME}:')
  _check_renamed(where, rename, sources, names)
  found = {
    paths[at]: (names[source.name], source.axes)
    for at, source in sources.items()
    if source.name is not None and source.name in names
  }
  missing = [at for at in paths if paths[at] not in found]
  unasked = {*map(_canonical, [*flat.paths, *map(trees.join, flat.holes)])} - paths.keys()
  below = tuple(f'{at}/' for at in unasked)  # None in `like`, and integers
  extra = [at for at in names if at not in asked and not f'{at}/'.startswith(below)]
  _check_origin(where, [at for at in missing if sources[at].name is not None], extra)
  if not found:
    raise ValueError(
      f'{where}: none of the params is in this checkpoint under {key!r}; pass their path as key.\n'
      f'  params: {", ".join(paths):.500}\n'
      f'  checkpoint: {", ".join(entries) or "no arrays":.500}'
    )
  problems = {at: _mismatch(wanted[at], entries[name], axes) for at, (name, axes) in found.items()}
  checks.raise_all(
    [f'{at}: {problem}' for at, problem in problems.items() if problem],
    f'{where}: the checkpoint does not fit the params (None in `like` leaves one free):',
  )
  lines = [f'{trees.shown(at)}: in the params, not in the checkpoint' for at in missing]
  lines += [f'{trees.shown(at)}: in the checkpoint, not in the params' for at in extra]
  differ = f'{where}: the checkpoint and the params have not the same leaves'
  if strict:
    checks.raise_all(lines, f'{differ}:')
  if lines:
    free = 'params that the checkpoint lacks stay free (strict=True makes this an error)'
    checks.warn(f'{differ}; {free}:\n  ' + '\n  '.join(lines))
  leaves = reading(where, _leaves, read, entries, found, wanted)
  finite = jax.jit(lambda x: jnp.isfinite(x).all())  # of each leaf alone: it has its own devices
  is_finite = jax.device_get({at: finite(x) for at, x in leaves.items()})
  checks.raise_all(
    [f'{at}, as {x.dtype}' for at, x in leaves.items() if not is_finite[at]],
    f'{where}: an anchor must be finite; NaN or infinity in',
  )
  return jax.tree.unflatten(flat.treedef, map(leaves.get, flat.paths))


def _sources(rename: Rename, paths: Mapping[str, str], flat: trees.Flat) -> dict[str, Source]:
  """The source of each leaf, by its path; `paths` are those in `like` by those with '/' alone."""
  if not (rename is None or isinstance(rename, Mapping) or checks.is_function(rename)):
    kind = checks.kind_of(rename)
    raise TypeError(f'rename: expected a function, a dict or None, found {kind}')
  if isinstance(rename, Mapping):
    left_out = tuple(f'{trees.join(hole)}/' for hole in flat.holes)
    unknown = [at for at in rename if at not in flat.by_path and not f'{at}/'.startswith(left_out)]
    some = ', '.join(paths)
    checks.raise_all([*map(str, unknown)], f'rename: not the path of a param ({some:.500}):')
  found, problems = {}, []
  for at, path in paths.items():
    if isinstance(rename, Mapping):
      renamed = rename.get(path, at)
    else:
      renamed = at if rename is None else rename(path)
    if renamed is None:
      found[at] = Source(None)
    elif isinstance(renamed, str):
      found[at] = Source(_canonical(renamed))
    elif _is_name_with_axes(renamed):
      found[at] = Source(_canonical(renamed[0]), tuple(map(operator.index, renamed[1])))
    else:
      problems.append(f'{path}: {checks.kind_of(renamed)}')
  checks.raise_all(problems, 'rename: expected a name, (name, axes) or None, found', TypeError)
  return found


def _is_name_with_axes(renamed: object) -> bool:
  """Whether it is (name, axes)."""
  if not (isinstance(renamed, tuple) and len(renamed) == 2 and isinstance(renamed[0], str)):
    return False
  axes = renamed[1]
  return isinstance(axes, Sequence) and all(isinstance(x, int | np.integer) for x in axes)


def _check_renamed(
  where: Path, rename: Rename, sources: Mapping[str, Source], names: Mapping[str, str]
) -> None:
  """Raises a ValueError for every entry that is asked for by name, and is not there."""
  absent = [
    f'{at}: {source.name}'
    for at, source in sources.items()
    if source.name is not None and source.name not in names
    if callable(rename) or source.name != at
  ]
  some = ', '.join(names) or 'no arrays'
  checks.raise_all(
    absent, f'{where}: rename asks for entries that are not there (there are {some:.500}):'
  )


def _leaves(
  read: Callable[[Mapping[str, Struct]], dict[str, jax.Array]],
  entries: Mapping[str, Struct],
  found: Mapping[str, tuple[str, tuple[int, ...] | None]],
  wanted: Mapping[str, Struct],
) -> dict[str, jax.Array]:
  """Reads the leaves: all that lie as the params do at once, and each of the others by itself."""
  as_they_lie = {name: at for at, (name, axes) in found.items() if axes is None}
  arrays = read({name: wanted[at] for name, at in as_they_lie.items()})
  leaves = {at: arrays[name] for name, at in as_they_lie.items()}
  for at, (name, axes) in found.items():
    if at not in leaves:
      struct = wanted[at]
      whole = np.asarray(read({name: Struct(entries[name].shape, struct.dtype)})[name])
      leaves[at] = place(
        np.transpose(whole, axes or range(whole.ndim)).reshape(struct.shape), struct
      )
  return leaves


def _located(path: str | os.PathLike[str]) -> Any:
  """The path; of a bucket (gs://…), which Orbax reads too, as `etils.epath` has it."""
  if '://' not in str(path):
    return Path(path).absolute()
  return reading(path, lambda: importlib.import_module('etils.epath').Path(path))


def _canonical(name: str) -> str:
  return name.replace('.', '/')


def _wanted(flat: trees.Flat) -> dict[str, Struct]:
  """What the params need, by path."""
  if any(isinstance(leaf, jax.core.Tracer) for leaf in flat.leaves):
    raise TypeError('load_anchor(path, like): call it outside jit; it reads files')
  leaves = flat.by_path
  values = {at: x for at, x in leaves.items() if not isinstance(x, Struct)}
  checks.arrays('load_anchor(path, like): like', values)
  return {
    at: Struct(jnp.shape(x), jnp.result_type(x), sharding=_sharding_of(x))
    for at, x in leaves.items()
    if not anchors.never_held(x)
  }


def _sharding_of(leaf: Any) -> jax.sharding.Sharding | None:
  """Where a leaf was put on purpose; None where it lies on the default device by itself."""
  committed = getattr(leaf, 'committed', not isinstance(leaf, jax.Array))
  return getattr(leaf, 'sharding', None) if committed else None


def _under(key: str, names: Iterable[str], wanted: Container[str]) -> dict[str, str]:
  """Canonical paths under `key`, by the names in the checkpoint."""
  prefix = _canonical(key).strip('/') + '/'
  found: dict[str, str] = {}
  for name in names:
    at = ('' if key else '/') + _canonical(name)
    if f'{at}/'.startswith(prefix):
      at = at[len(prefix) :]
      bare = at.removesuffix('/value')  # of an nnx.Variable
      found[name] = bare if at not in wanted and bare in wanted else at
  return found


def _check_origin(path: Path, missing: Sequence[str], extra: Sequence[str]) -> None:
  foreign = {f'{at.rpartition("/")[0]}/weight'.lstrip('/') for at in missing} & set(extra)
  if foreign:
    raise ValueError(
      f"{path}: has a PyTorch model's names and layouts ({min(foreign)}, … for "
      "the params' kernel, scale or embedding). Say by rename what each param is called there, or "
      "load it by the model's from_pretrained: the params that this gives are the anchor."
    )


def _splits_or_joins(old: Sequence[int], new: Sequence[int]) -> bool:
  """Whether the axes of one shape are those of the other, some split in parts, or some joined."""
  if math.prod(old) != math.prod(new):
    return False
  # How many numbers the first axes span. Between two that both have, only one may have others.
  first, second = (set(itertools.accumulate(shape, operator.mul)) for shape in (old, new))
  ends = sorted({1} | (first & second))
  return not any(
    {x for x in first if low < x < high} and {x for x in second if low < x < high}
    for low, high in itertools.pairwise(ends)
  )


def _mismatch(wanted: Struct, found: Struct, axes: Sequence[int] | None) -> str | None:
  if axes is None:
    fits = wanted.shape == found.shape
  else:
    fits = sorted(axes) == list(range(len(found.shape)))
    fits = fits and _splits_or_joins([found.shape[axis] for axis in axes], wanted.shape)
  if not fits or not checks.can_replace(found.dtype, wanted.dtype):
    kind = 'an unknown kind of number, ' if found.dtype == UNKNOWN else found.dtype
    turned = '' if axes is None else f', transposed by {tuple(axes)}'
    shapes = f'params {wanted.dtype}{list(wanted.shape)}, checkpoint {kind}{list(found.shape)}'
    return shapes + turned
  try:
    if wanted.sharding is not None:
      wanted.sharding.devices_indices_map(wanted.shape)
  except ValueError as error:  # it does not divide the shape, or has no devices
    return str(error).partition('\n')[0]
  return None
