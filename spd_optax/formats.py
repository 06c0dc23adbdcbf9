"""Checkpoint files as named arrays: what is inside, and reading a part of it.

Nothing is unpickled, and nothing is read that was not asked for: a file may claim any size, so
memory is taken only for its names and for arrays whose shapes the params have. Each library
is imported only where its format is met.
"""

import importlib
import io
import re
import zipfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np

from spd_optax import trees

Struct = jax.ShapeDtypeStruct
T = TypeVar('T')


NPY_HEADER = 12_000  # bytes; NumPy refuses a longer one, too

# The format's names of dtypes that NumPy can hold; others are reported where they are wanted.
SAFETENSORS = {
  'F64': np.dtype('float64'),
  'F32': np.dtype('float32'),
  'F16': np.dtype('float16'),
  'BF16': np.dtype(jax.numpy.bfloat16),
  **{
    f'{kind}{bits}': np.dtype(f'{kind.lower()}{bits // 8}')
    for kind in 'IU'
    for bits in (8, 16, 32, 64)
  },
}


class Checkpoint(NamedTuple):
  """An opened checkpoint.

  Attributes:
    entries: shape and dtype of each array, by its '/'-joined name.
    read: reads arrays by name, each with the dtype and the sharding of the struct given for it
      (no sharding: the default device).
  """

  entries: dict[str, Struct]
  read: Callable[[Mapping[str, Struct]], dict[str, jax.Array]]


def open_checkpoint(path: Any) -> Checkpoint:
  """Opens an Orbax directory, safetensors (a file or a directory of shards), msgpack or npz.

  Raises:
    FileNotFoundError: if nothing is there.
    ValueError: if it is none of these, more than one, or damaged.
    ImportError: naming what to install, if the library for the format is missing.
  """
  if not path.exists():
    raise FileNotFoundError(f'{path}: no such file or directory')
  _check_regular(path)
  if path.is_dir():
    shards = sorted(path.glob('*.safetensors'))
    if shards:
      _check_shards(path, shards)
      return reading(path, _safetensors, shards)
    return reading(path, _orbax, *_orbax_tree(path))
  match path.suffix:
    case '.safetensors':
      return reading(path, _safetensors, [path])
    case '.npz':
      return reading(path, _npz, path)
    case '.msgpack' | '':  # flax.training.checkpoints writes `checkpoint_100`
      return reading(path, _msgpack, path)
  raise ValueError(
    f'{path}: unknown kind of checkpoint {path.suffix!r}; expected an Orbax directory, '
    '.safetensors (a file, or a directory of them), .msgpack (flax) or .npz'
  )


def reading(path: Any, function: Callable[..., T], *arguments: Any) -> T:
  """Calls a function that reads the checkpoint; whatever a library raises then names the path."""
  try:
    return function(*arguments)
  except ImportError:
    raise
  except Exception as error:
    reason = str(error).strip().partition('\n')[0] or type(error).__name__
    raise ValueError(
      f'{path}: cannot be read (truncated, corrupt, or another kind of file?): {reason}'
    ) from error


def library(module: str, package: str, needed_for: str) -> Any:
  """Imports an optional dependency.

  Raises:
    ImportError: naming the extra to install.
  """
  try:
    return importlib.import_module(module)
  except ImportError as error:
    raise ImportError(
      f"{needed_for} needs {package}: pip install 'spd_optax[checkpoints]'"
    ) from error


def _orbax(root: Any, name: str | None) -> Checkpoint:
  ocp = library('orbax.checkpoint', 'orbax-checkpoint', 'an Orbax checkpoint').v1
  tree = ocp.metadata(root, checkpointable_name=name).metadata
  if tree is None:  # Orbax logs why
    raise ValueError('its metadata cannot be read')
  flat = trees.flatten(tree)
  entries = {
    at: Struct(x.shape, x.dtype)
    for at, x in flat.by_path.items()
    if hasattr(x, 'shape') and hasattr(x, 'dtype')
  }
  here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

  def read(wanted: Mapping[str, Struct]) -> dict[str, jax.Array]:
    def abstract(at: str) -> Any:
      if at not in wanted:
        return ocp.PLACEHOLDER
      struct = wanted[at]
      return Struct(struct.shape, struct.dtype, sharding=struct.sharding or here)

    asked = jax.tree.unflatten(flat.treedef, [abstract(at) for at in flat.paths])
    found = trees.flatten(ocp.load(root, asked, checkpointable_name=name)).by_path
    return {at: found[at] for at in wanted}

  return Checkpoint(entries, read)


def _orbax_tree(path: Any) -> tuple[Any, str | None]:
  """The directory and the name in it that `orbax.checkpoint.v1` loads a tree from."""

  def has(directory: Any, name: str) -> bool:
    return bool((directory / name).exists())

  if has(path, '_METADATA'):
    inside = has(path.parent, '_CHECKPOINT_METADATA')
    return (path.parent, path.name) if inside else (path, None)
  children = sorted(child.name for child in path.iterdir() if child.is_dir())
  found = [name for name in children if has(path / name, '_METADATA')]
  whole = has(path, '_CHECKPOINT_METADATA')
  if whole and len(found) == 1:
    return path, found[0]
  found += [name for name in children if has(path / name, '_CHECKPOINT_METADATA')]
  if not found:
    raise ValueError(f'{path}: no Orbax checkpoint and no .safetensors file in this directory')
  raise ValueError(
    f'{path}: holds several {"trees" if whole else "checkpoints, one for each step, say"}; '
    f'pass the path of one of them: {", ".join(dict.fromkeys(found))}'
  )


def _check_regular(path: Any) -> None:
  """Raises for pipes, devices and broken links, here or in the directory: a read may never end."""
  inside = path.rglob('*') if path.is_dir() and isinstance(path, Path) else ()
  odd = [str(at) for at in (path, *inside) if not (at.is_file() or at.is_dir())]
  if odd:
    raise ValueError(f'{path}: neither a file nor a directory: {", ".join(odd[:5])}')


def _check_shards(path: Any, shards: Sequence[Any]) -> None:
  """Raises where shards of a set are missing: half an anchor leaves half the model unheld."""
  numbers = [re.search(r'-(\d+)-of-(\d+)$', shard.stem) for shard in shards]
  wanted = {int(number[2]) for number in numbers if number}
  here = {int(number[1]) for number in numbers if number}
  missing = sorted(set(range(1, max(wanted, default=0) + 1)) - here)
  if missing:
    raise ValueError(f'{path}: of {max(wanted)} .safetensors shards these are missing: {missing}')


def _safetensors(paths: Sequence[Any]) -> Checkpoint:
  safetensors = library('safetensors', 'safetensors', 'a .safetensors file')
  slices: dict[str, Any] = {}
  for path in paths:
    file = safetensors.safe_open(path, framework='numpy')
    twice = sorted(slices.keys() & set(file.keys()))
    if twice:
      raise ValueError(f'{path.name} and another file both have {twice[0]}; pass one file')
    slices |= {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
  entries = {
    name: Struct(tuple(array.get_shape()), SAFETENSORS.get(array.get_dtype(), np.dtype('V1')))
    for name, array in slices.items()
  }
  return Checkpoint(
    entries,
    lambda wanted: {name: _place(slices[name], struct) for name, struct in wanted.items()},
  )


def _msgpack(path: Any) -> Checkpoint:
  serialization = library('flax.serialization', 'flax', 'a flax msgpack file')
  content = path.read_bytes()
  _check_msgpack(content)
  tree = serialization.msgpack_restore(content)
  if not isinstance(tree, dict):
    raise ValueError(f'expected a dict of arrays, found {type(tree).__name__}')
  arrays = {
    at: np.asarray(leaf)
    for at, leaf in trees.flatten(tree).by_path.items()
    if isinstance(leaf, np.ndarray | np.generic)
  }
  return Checkpoint(
    {at: Struct(array.shape, array.dtype) for at, array in arrays.items()},
    lambda wanted: {at: _place(arrays[at], struct) for at, struct in wanted.items()},
  )


def _check_msgpack(content: bytes) -> None:
  """Raises where lists claim more than follows; an unpacker makes room for the claim at once."""
  msgpack = library('msgpack', 'flax', 'a flax msgpack file')

  def whole(code: int, packed: bytes) -> None:
    """An extension is an array (its shape, dtype and bytes) or a number, packed once more."""
    del code
    unpacker = msgpack.Unpacker(io.BytesIO(packed), max_buffer_size=len(packed) + 1)
    unpacker.skip()

  whole(0, content)
  msgpack.unpackb(content, ext_hook=whole)


def _npz(path: Any) -> Checkpoint:
  with zipfile.ZipFile(path) as file:
    members = file.namelist()
    twice = Counter(members)
    odd = [name for name in members if not name.endswith('.npy') or twice[name] > 1]
    if odd:
      raise ValueError(f'not an array, or twice in the file: {odd[0]!r:.200}')
    entries = {name.removesuffix('.npy'): _npy_header(file, name) for name in members}

  def read(wanted: Mapping[str, Struct]) -> dict[str, jax.Array]:
    with np.load(path, allow_pickle=False) as file:
      return {
        name: _place(file[name].view(entries[name].dtype), struct)
        for name, struct in wanted.items()
      }

  return Checkpoint(entries, read)


def _npy_header(file: zipfile.ZipFile, name: str) -> Struct:
  with file.open(name) as member:
    start = io.BytesIO(member.read(NPY_HEADER))
  version = np.lib.format.read_magic(start)
  reader = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
  }.get(version)
  if reader is None:
    raise ValueError(f'{name} has version {version} of the npy format')
  shape, _, dtype = reader(start)
  if dtype.hasobject:
    raise ValueError(f'{name} holds pickled objects, which are never read')
  # NumPy saves bfloat16 as two bytes without a meaning.
  return Struct(shape, np.dtype(jax.numpy.bfloat16) if dtype == np.dtype('V2') else dtype)


def _place(source: Any, struct: Struct) -> jax.Array:
  """Reads what each device of this process needs, and no more."""

  def part(index: tuple[slice, ...] | None) -> np.ndarray:
    return np.asarray(source[index or ...]).astype(struct.dtype, copy=False)

  if struct.sharding is None:
    return jax.numpy.array(part((slice(None),) * len(struct.shape)))
  placed: jax.Array = jax.make_array_from_callback(struct.shape, struct.sharding, part)
  return placed
