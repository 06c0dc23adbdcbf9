"""Anchors from checkpoints.

Nothing is unpickled. Nothing is read that was not asked for: a file may claim any size, so memory
is taken only for its names and for arrays whose shapes the params have. A library is imported
only where its format is met.
"""

import importlib
import io
import os
import re
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax

from spd_optax import anchors, checks, trees

Struct = jax.ShapeDtypeStruct
T = TypeVar('T')

NPY_HEADER = 12_000  # bytes; NumPy refuses a longer one, too
UNKNOWN = np.dtype('V1')  # kinds of numbers that NumPy does not hold
SAFETENSORS = {'BF16': np.dtype(jnp.bfloat16)} | {
  name: np.dtype(f'{name[0].lower()}{int(name[1:]) // 8}')
  for name in ('F16', 'F32', 'F64', 'I8', 'I16', 'I32', 'I64', 'U8', 'U16', 'U32', 'U64')
}
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
    ValueError: if the checkpoint is damaged, a PyTorch model's, or has none of the leaves under
      `key`. It names every leaf with another shape, with complex numbers for real ones, or with
      NaN or infinite values, and with `strict` every leaf that only one side has.
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
  entries, read = _opened(where)
  names = trees.told_apart(_under(key, entries, paths), f'{where}: entries that {SAME}:')
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
      f'  checkpoint: {", ".join(entries) or "no arrays":.500}'
    )
  problems = {at: _mismatch(wanted[at], entries[name]) for at, name in found.items()}
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
  arrays = _reading(where, read, asked)
  leaves = {at: arrays[name] for at, name in found.items()}
  finite = jax.jit(lambda x: jnp.isfinite(x).all())  # of each leaf alone: it has its own devices
  is_finite = jax.device_get({at: finite(x) for at, x in leaves.items()})
  checks.raise_all(
    [f'{at}, as {x.dtype}' for at, x in leaves.items() if not is_finite[at]],
    f'{where}: an anchor must be finite; NaN or infinity in',
  )
  return jax.tree.unflatten(flat.treedef, map(leaves.get, flat.paths))


def _located(path: str | os.PathLike[str]) -> Any:
  """The path; of a bucket (gs://…), which Orbax reads too, as `etils.epath` has it."""
  if '://' not in str(path):
    return Path(path).absolute()
  return _reading(path, lambda: importlib.import_module('etils.epath').Path(path))


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
  if wanted.shape != found.shape or not checks.can_replace(found.dtype, wanted.dtype):
    kind = 'an unknown kind of number, ' if found.dtype == UNKNOWN else found.dtype
    return f'params {wanted.dtype}{list(wanted.shape)}, checkpoint {kind}{list(found.shape)}'
  try:
    if wanted.sharding is not None:
      wanted.sharding.devices_indices_map(wanted.shape)
  except ValueError as error:  # it does not divide the shape, or has no devices
    return str(error).partition('\n')[0]
  return None


# The formats.


# The shapes and dtypes of the arrays by name, and how to read some. Each gets the dtype and the
# sharding of the struct given for it; without a sharding it goes to the default device.
Checkpoint = tuple[dict[str, Struct], Callable[[Mapping[str, Struct]], dict[str, jax.Array]]]


def _opened(path: Any) -> Checkpoint:
  """Opens an Orbax directory, safetensors (a file or a directory of shards), msgpack or npz."""
  if not path.exists():
    raise FileNotFoundError(f'{path}: no such file or directory')
  _check_regular(path)
  if path.is_dir():
    return _reading(path, _safetensors if any(path.glob('*.safetensors')) else _orbax, path)
  # flax.training.checkpoints writes `checkpoint_100`
  of_files = {'.safetensors': _safetensors, '.npz': _npz, '.msgpack': _msgpack, '': _msgpack}
  if path.suffix not in of_files:
    raise ValueError(
      f'{path}: unknown kind of checkpoint {path.suffix!r}; expected an Orbax directory, '
      '.safetensors (a file, or a directory of them), .msgpack (flax) or .npz'
    )
  return _reading(path, of_files[path.suffix], path)


def _reading(path: Any, function: Callable[..., T], *arguments: Any) -> T:
  """Calls a function that reads the checkpoint; whatever a library raises then names the path."""
  try:
    return function(*arguments)
  except ImportError as error:
    raise ImportError(
      f"{path}: {error.name} is needed to read it: pip install 'spd_optax[checkpoints]'"
    ) from error
  except Exception as error:
    reason = str(error).strip().partition('\n')[0] or type(error).__name__
    raise ValueError(
      f'{path}: cannot be read (truncated, corrupt, or another kind of file?): {reason}'
    ) from error


def _check_regular(path: Any) -> None:
  """Raises for pipes, devices and broken links, here or in the directory: a read may never end."""
  inside = path.rglob('*') if path.is_dir() and isinstance(path, Path) else ()
  odd = [str(at) for at in (path, *inside) if not (at.is_file() or at.is_dir())]
  if odd:
    raise ValueError(f'{path}: neither a file nor a directory: {", ".join(odd[:5])}')


def _orbax(path: Any) -> Checkpoint:
  ocp = importlib.import_module('orbax.checkpoint').v1
  root, name = _orbax_tree(path)
  tree = ocp.metadata(root, checkpointable_name=name).metadata
  if tree is None:  # Orbax logs why
    raise ValueError('its metadata cannot be read')
  flat = trees.flatten(tree)
  entries = {at: Struct(x.shape, x.dtype) for at, x in flat.by_path.items() if hasattr(x, 'dtype')}
  here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

  def read(wanted: Mapping[str, Struct]) -> dict[str, jax.Array]:
    structs = {at: x.update(sharding=x.sharding or here) for at, x in wanted.items()}
    asked = jax.tree.unflatten(
      flat.treedef, [structs.get(at, ocp.PLACEHOLDER) for at in flat.paths]
    )
    found = trees.flatten(ocp.load(root, asked, checkpointable_name=name)).by_path
    return {at: found[at] for at in wanted}

  return entries, read


def _orbax_tree(path: Any) -> tuple[Any, str | None]:
  """The directory that Orbax reads, and the name of the one tree in it."""
  if (path / '_METADATA').exists():
    inside = (path.parent / '_CHECKPOINT_METADATA').exists()
    return (path.parent, path.name) if inside else (path, None)
  found = sorted({at.parent.name for at in path.glob('*/_*METADATA')})
  if len(found) == 1 and (path / '_CHECKPOINT_METADATA').exists():
    return path, found[0]
  if not found:
    raise ValueError('no Orbax checkpoint and no .safetensors file in this directory')
  raise ValueError(f'pass the path of one step and one tree, of which are here: {", ".join(found)}')


def _safetensors(at: Any) -> Checkpoint:
  safe_open = importlib.import_module('safetensors').safe_open
  paths = sorted(at.glob('*.safetensors')) if at.is_dir() else [at]
  sizes = [int(size) for path in paths for size in re.findall(r'-\d+-of-(\d+)$', path.stem)]
  if sizes and len(sizes) < max(sizes):  # half an anchor would leave half the model unheld
    raise ValueError(f'only {len(sizes)} of {max(sizes)} .safetensors shards are here')
  slices: dict[str, Any] = {}
  for path in paths:
    file = safe_open(path, framework='numpy')
    for name in file.keys():  # noqa: SIM118  # it is no dict
      if name in slices:
        raise ValueError(f'{path.name} and another file both have {name}; pass one file')
      slices[name] = file.get_slice(name)
  entries = {
    name: Struct(tuple(array.get_shape()), SAFETENSORS.get(array.get_dtype(), UNKNOWN))
    for name, array in slices.items()
  }
  return entries, lambda wanted: {at: _place(slices[at], x) for at, x in wanted.items()}


def _msgpack(path: Any) -> Checkpoint:
  restore = importlib.import_module('flax.serialization').msgpack_restore
  leaves = trees.flatten(restore(path.read_bytes())).by_path
  arrays = {at: np.asarray(x) for at, x in leaves.items() if isinstance(x, np.ndarray | np.generic)}
  entries = {at: Struct(array.shape, array.dtype) for at, array in arrays.items()}
  return entries, lambda wanted: {at: _place(arrays[at], x) for at, x in wanted.items()}


def _npz(path: Any) -> Checkpoint:
  with zipfile.ZipFile(path) as file:
    entries = {name.removesuffix('.npy'): _npy_header(file, name) for name in file.namelist()}

  def read(wanted: Mapping[str, Struct]) -> dict[str, jax.Array]:
    with np.load(path, allow_pickle=False) as file:
      return {at: _place(file[at].view(entries[at].dtype), x) for at, x in wanted.items()}

  return entries, read


def _npy_header(file: zipfile.ZipFile, name: str) -> Struct:
  """Shape and dtype of an array, without reading it; version 2 is for headers beyond the limit."""
  with file.open(name) as member:
    start = io.BytesIO(member.read(NPY_HEADER))
  np.lib.format.read_magic(start)
  shape, _, dtype = np.lib.format.read_array_header_1_0(start)
  # NumPy saves bfloat16 as two bytes without a meaning.
  return Struct(shape, np.dtype(jnp.bfloat16) if dtype == np.dtype('V2') else dtype)


def _place(source: Any, struct: Struct) -> jax.Array:
  """Reads what each device of this process needs, and no more."""

  def part(index: tuple[slice, ...] | None) -> np.ndarray:
    with np.errstate(over='ignore'):  # `load_anchor` refuses what is infinite in the new dtype
      return np.asarray(source[index or ...]).astype(struct.dtype, copy=False)

  if struct.sharding is None:
    return jnp.array(part((slice(None),) * len(struct.shape)))
  return jax.make_array_from_callback(struct.shape, struct.sharding, part)
