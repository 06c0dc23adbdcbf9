"""Anchors from checkpoints."""

import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from spd_optax import anchors, formats, trees
from spd_optax.formats import Checkpoint, Struct


def load_anchor(
  path: str | os.PathLike[str], like: Any, *, key: str = '', strict: bool = False
) -> Any:
  """The anchor from a checkpoint: pre-trained weights, placed like the params.

  An entry of the checkpoint belongs to the leaf with the same path; '.' and '/' count as
  the same separator, and a last '/value' of nnx is left out. What is read has the shape,
  dtype and sharding of that leaf, and of a sharded leaf each process reads its own part.
  A leaf that the checkpoint lacks is free (None), a new head say, and a warning names it.
  Integer and empty leaves, which SPD never holds, are None without a word.

  Args:
    path: an Orbax directory (of v1, or by the older StandardCheckpointer and
      CheckpointManager; one step, one tree), a `.safetensors` file or a directory
      of its shards, a flax `.msgpack` file, or an `.npz` file as big_vision writes them.
      Nothing is unpickled.
    like: the params that the anchor is for, as arrays or as `jax.ShapeDtypeStruct` with
      a sharding.
    key: path of the params inside the checkpoint, as in 'params' or 'state/params'.
    strict: whether a leaf that only the params or only the checkpoint have is an error.

  Returns:
    A tree like `like` with None for free leaves, to be passed as `anchor`.

  Raises:
    FileNotFoundError: if there is no such file.
    ValueError: if the checkpoint is damaged, has none of the leaves, or none under
      `key`; naming every leaf with another shape, with complex numbers for real
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
  path = Path(path).absolute()
  flat = trees.flatten(like)
  wanted = _wanted(flat)
  checkpoint = formats.open_checkpoint(path)
  names = _names(checkpoint, key, path)
  found = {at: names[at] for at in wanted if at in names}
  missing, over = [at for at in wanted if at not in names], _passed_over(flat)
  extra = [at for at in names if at not in wanted and not f'{at}/'.startswith(over)]
  _check_origin(path, missing, extra)
  if not found:
    raise ValueError(_nothing(path, key, list(wanted), list(_names(checkpoint, '', path))))
  _check(path, wanted, {at: checkpoint.entries[name] for at, name in found.items()})
  _report(path, missing, extra, strict)
  try:
    arrays = checkpoint.read({name: wanted[at] for at, name in found.items()})
  except Exception as error:
    raise ValueError(formats.damaged(path, checkpoint.format, error)) from error
  leaves = {at: arrays[name] for at, name in found.items()}
  _check_finite(path, leaves)
  return jax.tree.unflatten(flat.treedef, [leaves.get(_canonical(at)) for at in flat.paths])


def _canonical(name: str) -> str:
  return name.replace('.', '/')


def _wanted(flat: trees.Flat) -> dict[str, Struct]:
  """What the params need, by canonical path."""
  if not flat.leaves:
    raise ValueError('like: expected the params, found a tree without leaves')
  return {
    _canonical(path): Struct(jnp.shape(leaf), jnp.result_type(leaf), sharding=_sharding_of(leaf))
    for path, leaf in zip(flat.paths, flat.leaves, strict=True)
    if not anchors.never_held(leaf)
  }


def _passed_over(flat: trees.Flat) -> tuple[str, ...]:
  """Where the checkpoint may have what nobody asked for: None in `like`, and integers."""
  pairs = zip(flat.paths, flat.leaves, strict=True)
  unheld = [path for path, leaf in pairs if anchors.never_held(leaf)]
  return tuple(_canonical(at) + '/' for at in [*unheld, *map(trees.join, flat.holes)])


def _sharding_of(leaf: Any) -> Any:
  """Where a leaf was put on purpose; None where it lies on the default device by itself."""
  committed = getattr(leaf, 'committed', not isinstance(leaf, jax.Array))
  return getattr(leaf, 'sharding', None) if committed else None


def _names(checkpoint: Checkpoint, key: str, path: Path) -> dict[str, str]:
  """The checkpoint's names under `key`, by canonical path.

  Raises:
    ValueError: naming those that cannot be told apart.
  """
  prefix = _canonical(key).strip('/') + '/' if key else '/'
  found: dict[str, list[str]] = {}
  for name in checkpoint.entries:
    at = ('' if key else '/') + _canonical(name).removesuffix('/value')
    if f'{at}/'.startswith(prefix):
      found.setdefault(at[len(prefix) :], []).append(name)
  trees.raise_all(
    [', '.join(names) for names in found.values() if len(names) > 1],
    f'{path}: entries that differ only in their separators:',
  )
  return {at: names[0] for at, names in found.items()}


def _nothing(path: Path, key: str, wanted: Sequence[str], names: Sequence[str]) -> str:
  """The message where no leaf was found, with the key that would find some."""
  suffixes = {at: name for at in wanted for name in names if name.endswith('/' + at)}
  at = next(iter(suffixes), None)
  hint = f'; pass key={suffixes[at].removesuffix("/" + at)!r}' if at else ''
  return (
    f'{path}: none of the params is in this checkpoint{f" under {key!r}" if key else ""}{hint}.\n'
    f'  params: {_some(wanted)}\n  checkpoint: {_some(names)}'
  )


def _some(names: Sequence[str]) -> str:
  more = f', … ({len(names)} in all)' if len(names) > 5 else ''
  return ', '.join(names[:5]) + more if names else 'no arrays'


def _check_origin(path: Path, missing: Sequence[str], extra: Sequence[str]) -> None:
  foreign = {f'{at.rpartition("/")[0]}/weight' for at in missing} & set(extra)
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
    warnings.warn(
      f'{path}: params that the checkpoint lacks have no anchor and stay free '
      '(strict=True makes this an error):\n  ' + '\n  '.join(lines),
      stacklevel=3,
    )


def _mismatch(wanted: Struct, found: Struct) -> str | None:
  both = f'params {wanted.dtype}{list(wanted.shape)}, checkpoint {found.dtype}{list(found.shape)}'
  if wanted.shape != found.shape:
    return both
  narrower = jnp.issubdtype(found.dtype, jnp.complexfloating) and not jnp.issubdtype(
    wanted.dtype, jnp.complexfloating
  )
  return both if narrower or not jnp.issubdtype(found.dtype, jnp.inexact) else None


def _check_finite(path: Path, leaves: Mapping[str, jax.Array]) -> None:
  finite = jax.device_get({at: jnp.isfinite(leaf).all() for at, leaf in leaves.items()})
  trees.raise_all(
    [at for at, is_finite in finite.items() if not is_finite],
    f'{path}: an anchor must be finite; NaN or infinity in',
  )
