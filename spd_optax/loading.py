"""Anchors from checkpoints."""

import importlib
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax

from spd_optax import anchors, checks, formats, trees
from spd_optax.formats import Struct

SAME = "cannot be told apart, as '.' and '/' are one separator"


def load_anchor(
  path: str | os.PathLike[str], like: optax.Params, *, key: str = '', strict: bool = False
) -> optax.Params:
  """The anchor from a checkpoint: pre-trained weights, placed like the params.

  An entry of the checkpoint belongs to the leaf with the same path. '.' and '/' count as
  the same separator, and a last '/value' of nnx is left out. What is read has the shape,
  dtype and sharding of that leaf. Of Orbax and safetensors each process reads what it needs.
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
      under `key`. It names every leaf with another shape, with complex numbers for real
      ones, or with NaN or infinite values, and paths that differ in '.' and '/' alone. With
      `strict` it names every leaf that only one side has.
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
  where = _located(path)
  flat = trees.flatten(like)
  wanted = _wanted(flat)
  paths = trees.told_apart({at: _canonical(at) for at in wanted}, f'like: leaves that {SAME}:')
  checkpoint = formats.open_checkpoint(where)
  names = trees.told_apart(_under(key, checkpoint.entries, paths), f'{where}: entries that {SAME}:')
  found = {path: names[at] for at, path in paths.items() if at in names}
  missing = [at for at in paths if at not in names]
  unasked = {*map(_canonical, [*flat.paths, *map(trees.join, flat.holes)])} - paths.keys()
  below = tuple(f'{at}/' for at in unasked)  # None in `like`, and integers
  extra = [at for at in names if at not in paths and not f'{at}/'.startswith(below)]
  _check_origin(where, missing, extra)
  if not found:
    raise ValueError(
      f'{where}: none of the params is in this checkpoint under {key!r}; pass their path as key.\n'
      f'  params: {", ".join(paths):.500}\n'
      f'  checkpoint: {", ".join(checkpoint.entries) or "no arrays":.500}'
    )
  problems = {at: _mismatch(wanted[at], checkpoint.entries[name]) for at, name in found.items()}
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
  asked = {name: wanted[at] for at, name in found.items()}
  arrays = formats.reading(where, checkpoint.read, asked)
  leaves = {at: arrays[name] for at, name in found.items()}
  finite = jax.jit(lambda x: jnp.isfinite(x).all())  # of each leaf alone: it has its own devices
  all_finite = jax.device_get([finite(x) for x in leaves.values()])
  checks.raise_all(
    [
      f'{at}, as {x.dtype}'
      for (at, x), ok in zip(leaves.items(), all_finite, strict=True)
      if not ok
    ],
    f'{where}: an anchor must be finite; NaN or infinity in',
  )
  return jax.tree.unflatten(flat.treedef, map(leaves.get, flat.paths))


def _located(path: str | os.PathLike[str]) -> Any:
  """The path; of a bucket (gs://…), which Orbax reads too, as `etils.epath` has it."""
  if '://' not in str(path):
    return Path(path).absolute()
  return formats.reading(path, lambda: importlib.import_module('etils.epath').Path(path))


def _canonical(name: str) -> str:
  return name.replace('.', '/')


def _wanted(flat: trees.Flat) -> dict[str, Struct]:
  """What the params need, by path."""
  if any(isinstance(leaf, jax.core.Tracer) for leaf in flat.leaves):
    raise TypeError('load_anchor(path, like): call it outside jit; it reads files')
  if not flat.leaves:
    raise ValueError('like: expected the params, found a tree without leaves')
  leaves = flat.by_path
  values = {at: x for at, x in leaves.items() if not isinstance(x, Struct)}
  checks.arrays('load_anchor(path, like): like', values)
  return {
    at: Struct(jnp.shape(x), jnp.result_type(x), sharding=_sharding_of(x))
    for at, x in leaves.items()
    if not anchors.never_held(x)
  }


def _sharding_of(leaf: Any) -> Any:
  """Where a leaf was put on purpose; None where it lies on the default device by itself."""
  committed = getattr(leaf, 'committed', not isinstance(leaf, jax.Array))
  return getattr(leaf, 'sharding', None) if committed else None


def _under(key: str, names: Iterable[str], wanted: Mapping[str, str]) -> dict[str, str]:
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
      "the params' kernel, scale or embedding). Load it by the model's from_pretrained, and pass "
      'the params that this gives as the anchor.'
    )


def _mismatch(wanted: Struct, found: Struct) -> str | None:
  floating = jnp.issubdtype(found.dtype, jnp.floating)
  both_complex = jnp.issubdtype(found.dtype, jnp.inexact) and jnp.iscomplexobj(wanted)
  if wanted.shape != found.shape or not (floating or both_complex):
    kind = 'an unknown kind of number, ' if found.dtype == formats.UNKNOWN else found.dtype
    return f'params {wanted.dtype}{list(wanted.shape)}, checkpoint {kind}{list(found.shape)}'
  try:
    if wanted.sharding is not None:
      wanted.sharding.devices_indices_map(wanted.shape)
  except ValueError as error:  # it does not divide the shape, or has no devices
    return str(error).partition('\n')[0]
  return None
