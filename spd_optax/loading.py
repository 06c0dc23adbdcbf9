"""Anchors from checkpoints."""

import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from spd_optax import anchors, checks, formats, trees
from spd_optax.formats import Checkpoint, Struct


def load_anchor(
  path: str | os.PathLike[str], like: Any, *, key: str = '', strict: bool = False
) -> Any:
  """The anchor from a checkpoint: pre-trained weights, placed like the params.

  An entry of the checkpoint belongs to the leaf with the same path; '.' and '/' count as
  the same separator, and a last '/value' of nnx is left out. What is read has the shape,
  dtype and sharding of that leaf; of Orbax and safetensors each process reads what it needs.
  A leaf that the checkpoint lacks is free (None), a new head say, and a warning names it.
  Integer and empty leaves, which SPD never holds, are None without a word.

  Args:
    path: an Orbax directory (of v1, or by the older StandardCheckpointer and
      CheckpointManager; one step, one tree), a `.safetensors` file or a directory
      of its shards, a flax `.msgpack` file, or an `.npz` file as big_vision writes them.
      Nothing is unpickled. An Orbax checkpoint may lie in a bucket ('gs://…').
    like: the params that the anchor is for, as arrays or as `jax.ShapeDtypeStruct` with
      a sharding.
    key: path of the params inside the checkpoint, as in 'params' or 'state/params'.
    strict: whether a leaf that only the params or only the checkpoint have is an error.

  Returns:
    A tree like `like` with None for free leaves, to be passed as `anchor`.

  Raises:
    FileNotFoundError: if there is no such file.
    ValueError: if the checkpoint is damaged, a PyTorch model's, has none of the leaves, or none
      under `key`; naming every leaf with another shape, with complex numbers for real
      ones, or with NaN or infinite values; with `strict`, every leaf that only one side has.
    ImportError: naming the extra, if the library for the format is missing.

  Example:
    >>> import jax.numpy as jnp, numpy as np, tempfile
    >>> import spd_optax as spd
    >>> params = {'dense': {'kernel': jnp.zeros((2, 3))}}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...   np.savez(f'{folder}/vit.npz', **{'params/dense/kernel': np.ones((2, 3), 'f4')})
    ...   anchor = spd.load_anchor(f'{folder}/vit.npz', params, key='params')
    >>> optimizer = spd.adam_spd(1e-3, anchor)
  """
  checks.path('load_anchor(path, like): path', path)
  checks.text('key', key)
  checks.flag('strict', strict)
  where = _located(path)
  flat = trees.flatten(like)
  wanted = _wanted(flat)
  checkpoint = formats.open_checkpoint(where)
  names = _names(where, checkpoint, key, wanted)
  found = {at: names[at] for at in wanted if at in names}
  missing, over = [at for at in wanted if at not in names], _passed_over(flat)
  extra = [at for at in names if at not in wanted and not f'{at}/'.startswith(over)]
  _check_origin(where, missing, extra)
  if not found:
    raise ValueError(_nothing(where, key, wanted, list(map(_canonical, checkpoint.entries))))
  _check(where, wanted, {at: checkpoint.entries[name] for at, name in found.items()})
  _report(where, missing, extra, strict)
  asked = {name: wanted[at] for at, name in found.items()}
  arrays = formats.reading(where, checkpoint.read, asked)
  leaves = {at: arrays[name] for at, name in found.items()}
  _check_finite(where, leaves)
  return jax.tree.unflatten(flat.treedef, [leaves.get(_canonical(at)) for at in flat.paths])


def _located(path: Any) -> Any:
  """The path; of a bucket (gs://…), which Orbax reads too, as `etils.epath` has it."""
  if '://' not in os.fspath(path):
    return Path(path).absolute()
  epath = formats.library('etils.epath', 'etils[epath]', 'a path with ://')
  try:
    return epath.Path(path)
  except KeyError as error:
    raise ValueError(f'{path}: no kind of path that can be read: {error}') from None


def _canonical(name: str) -> str:
  return name.replace('.', '/')


def _wanted(flat: trees.Flat) -> dict[str, Struct]:
  """What the params need, by canonical path."""
  if any(isinstance(leaf, jax.core.Tracer) for leaf in flat.leaves):
    raise TypeError('load_anchor(path, like): call it outside jit; it reads files')
  if not flat.leaves:
    raise ValueError('like: expected the params, found a tree without leaves')
  values = {at: x for at, x in flat.by_path.items() if not isinstance(x, Struct)}
  checks.arrays('load_anchor(path, like): like', values)
  return {
    _canonical(path): Struct(jnp.shape(leaf), jnp.result_type(leaf), sharding=_sharding_of(leaf))
    for path, leaf in flat.by_path.items()
    if not anchors.never_held(leaf)
  }


def _passed_over(flat: trees.Flat) -> tuple[str, ...]:
  """Where the checkpoint may have what nobody asked for: None in `like`, and integers."""
  unheld = [path for path, leaf in flat.by_path.items() if anchors.never_held(leaf)]
  return tuple(_canonical(at) + '/' for at in [*unheld, *map(trees.join, flat.holes)])


def _sharding_of(leaf: Any) -> Any:
  """Where a leaf was put on purpose; None where it lies on the default device by itself."""
  committed = getattr(leaf, 'committed', not isinstance(leaf, jax.Array))
  return getattr(leaf, 'sharding', None) if committed else None


def _names(
  path: Path, checkpoint: Checkpoint, key: str, wanted: Mapping[str, Struct]
) -> dict[str, str]:
  """The checkpoint's names under `key`, by canonical path.

  Raises:
    ValueError: naming those that cannot be told apart.
  """
  prefix = _canonical(key).strip('/') + '/'
  found: dict[str, list[str]] = {}
  for name in checkpoint.entries:
    at = ('' if key else '/') + _canonical(name)
    if f'{at}/'.startswith(prefix):
      at = at[len(prefix) :]
      boxed = at not in wanted and at.removesuffix('/value') in wanted  # an nnx.Variable
      found.setdefault(at.removesuffix('/value') if boxed else at, []).append(name)
  trees.raise_all(
    [', '.join(names) for names in found.values() if len(names) > 1],
    f'{path}: entries that cannot be told apart:',
  )
  return {at: names[0] for at, names in found.items()}


def _nothing(path: Path, key: str, wanted: Mapping[str, Struct], names: Sequence[str]) -> str:
  """The message where no leaf was found, with the keys that would find some."""
  depths = {at.count('/') + 1 for at in wanted}
  split = [name.rsplit('/', depth) for name in names for depth in sorted(depths)]
  keys = {key: None for key, *rest in split if '/'.join(rest) in wanted}
  hint = f'; some are under key={" or ".join(f"{key!r:.200}" for key in keys)}' if keys else ''
  return (
    f'{path}: none of the params is in this checkpoint{f" under {key!r}" if key else ""}{hint}.\n'
    f'  params: {_some(list(wanted))}\n  checkpoint: {_some(names)}'
  )


def _some(names: Sequence[str]) -> str:
  more = f', … ({len(names)} in all)' if len(names) > 5 else ''
  return ', '.join(name[:200] for name in names[:5]) + more if names else 'no arrays'


def _check_origin(path: Path, missing: Sequence[str], extra: Sequence[str]) -> None:
  foreign = {f'{at.rpartition("/")[0]}/weight'.lstrip('/') for at in missing} & set(extra)
  if foreign:
    raise ValueError(
      f"{path}: has a PyTorch model's names and layouts ({min(foreign)}, … for "
      "the params' kernel, scale or embedding). Load it by the model's from_pretrained, and pass "
      'the params that this gives as the anchor.'
    )


def _check(path: Path, wanted: Mapping[str, Struct], found: Mapping[str, Struct]) -> None:
  trees.raise_all(
    [f'{at}: {problem}' for at in found if (problem := _mismatch(wanted[at], found[at]))],
    f'{path}: the checkpoint does not fit the params (None instead of a leaf of `like` leaves '
    'it free):',
  )


def _report(path: Path, missing: Sequence[str], extra: Sequence[str], strict: bool) -> None:
  """Warns of leaves that only one side has; with `strict` raises."""
  lines = [f'{at or "(root)"}: in the params, not in the checkpoint' for at in missing]
  lines += [f'{at or "(root)"}: in the checkpoint, not in the params' for at in extra]
  if strict:
    trees.raise_all(lines, f'{path}: the checkpoint and the params have not the same leaves:')
  if lines:
    free = 'params that the checkpoint lacks have no anchor and stay free'
    warnings.warn(
      f'{path}: {free if missing else "not all of the checkpoint is used"} '
      '(strict=True makes this an error):\n  ' + '\n  '.join(lines),
      stacklevel=3,
    )


def _mismatch(wanted: Struct, found: Struct) -> str | None:
  kind = 'a kind of number that cannot be read, ' if found.dtype.kind == 'V' else found.dtype
  both = f'params {wanted.dtype}{list(wanted.shape)}, checkpoint {kind}{list(found.shape)}'
  if wanted.shape != found.shape or not jnp.issubdtype(found.dtype, jnp.inexact):
    return both
  if jnp.issubdtype(found.dtype, jnp.complexfloating) and not jnp.issubdtype(
    wanted.dtype, jnp.complexfloating
  ):
    return both
  return None if wanted.sharding is None else _unshardable(wanted)


def _unshardable(wanted: Struct) -> str | None:
  """Why an array cannot be made with this shape and sharding."""
  if isinstance(getattr(wanted.sharding, 'mesh', None), jax.sharding.AbstractMesh):
    return 'its sharding is on an abstract mesh; pass params, or structs with devices'
  try:
    wanted.sharding.shard_shape(wanted.shape)
  except ValueError as error:
    return str(error).partition('\n')[0]
  return None


def _check_finite(path: Path, leaves: Mapping[str, jax.Array]) -> None:
  finite = jax.device_get(
    jax.jit(lambda arrays: [jnp.isfinite(x).all() for x in arrays])(list(leaves.values()))
  )
  trees.raise_all(
    [f'{at}, as {x.dtype}' for (at, x), ok in zip(leaves.items(), finite, strict=True) if not ok],
    f'{path}: an anchor must be finite; NaN or infinity in',
  )
