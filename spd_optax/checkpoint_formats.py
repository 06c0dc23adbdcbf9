"""The formats of checkpoints: what each has, by name, and how to read some of it.

Nothing is unpickled. Nothing is read that was not asked for: a file may claim any size, so memory
is taken only for its names and for arrays whose shapes the params have. A library is imported
only where its format is met.
"""

import importlib
import io
import re
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from spd_optax import trees

Struct = jax.ShapeDtypeStruct
T = TypeVar('T')

NPY_HEADER = 12_000  # bytes; NumPy refuses a longer one, too
UNKNOWN = np.dtype('V1')  # kinds of numbers that NumPy does not hold
SAFETENSORS = {'BF16': np.dtype(jnp.bfloat16)} | {
  name: np.dtype(f'{name[0].lower()}{int(name[1:]) // 8}')
  for name in ('F16', 'F32', 'F64', 'I8', 'I16', 'I32', 'I64', 'U8', 'U16', 'U32', 'U64')
}

# The shapes and dtypes of the arrays by name, and how to read some. Each gets the dtype and the
# sharding of the struct given for it; without a sharding it goes to the default device.
Checkpoint = tuple[dict[str, Struct], Callable[[Mapping[str, Struct]], dict[str, jax.Array]]]


def opened(path: Any) -> Checkpoint:
  """Opens an Orbax directory, safetensors (a file or a directory of shards), msgpack, npz or h5."""
  if not path.exists():
    raise FileNotFoundError(f'{path}: no such file or directory')
  _check_regular(path)
  if path.is_dir():
    return reading(path, _safetensors if any(path.glob('*.safetensors')) else _orbax, path)
  # flax.training.checkpoints writes `checkpoint_100`
  of_files = {
    '.safetensors': _safetensors, '.npz': _npz, '.h5': _h5, '.msgpack': _msgpack, '': _msgpack,
  }  # fmt: skip
  if path.suffix not in of_files:
    raise ValueError(
      f'{path}: unknown kind of checkpoint {path.suffix!r}; expected an Orbax directory, '
      '.safetensors (a file, or a directory of them), .msgpack (flax), .npz or .h5 (Keras)'
    )
  return reading(path, of_files[path.suffix], path)


def reading(path: Any, function: Callable[..., T], *arguments: Any) -> T:
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

  def read(wanted: Mapping[str, Struct]) -> dict[str, jax.Array]:
    # Without a sharding Orbax reads NumPy arrays: its JAX arrays stay where it put them.
    structs = {
      at: x if x.sharding else np.broadcast_to(np.zeros([], x.dtype), x.shape)
      for at, x in wanted.items()
    }
    asked = jax.tree.unflatten(
      flat.treedef, [structs.get(at, ocp.PLACEHOLDER) for at in flat.paths]
    )
    found = trees.flatten(ocp.load(root, asked, checkpointable_name=name)).by_path
    return {
      at: found.pop(at) if x.sharding else place(found.pop(at), x) for at, x in wanted.items()
    }

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
  raise ValueError(f'pass the path of one step and one tree; found here: {", ".join(found)}')


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
  return entries, lambda wanted: {at: place(slices[at], x) for at, x in wanted.items()}


def _msgpack(path: Any) -> Checkpoint:
  restore = importlib.import_module('flax.serialization').msgpack_restore
  leaves = trees.flatten(restore(path.read_bytes())).by_path
  arrays = {at: np.asarray(x) for at, x in leaves.items() if isinstance(x, np.ndarray | np.generic)}
  entries = {at: Struct(array.shape, array.dtype) for at, array in arrays.items()}
  return entries, lambda wanted: {at: place(arrays[at], x) for at, x in wanted.items()}


def _npz(path: Any) -> Checkpoint:
  with zipfile.ZipFile(path) as file:
    entries = {name.removesuffix('.npy'): _npy_header(file, name) for name in file.namelist()}

  def read(wanted: Mapping[str, Struct]) -> dict[str, jax.Array]:
    with np.load(path, allow_pickle=False) as file:
      return {at: place(file[at], x, entries[at].dtype) for at, x in wanted.items()}

  return entries, read


def _h5(path: Any) -> Checkpoint:
  h5py = importlib.import_module('h5py')
  file, arrays = h5py.File(path), {}

  def visit(name: str, item: Any) -> None:  # links are not followed
    if isinstance(item, h5py.Dataset) and item.shape is not None:
      if item.external or item.is_virtual:
        raise ValueError(f'{name}: its values are in another file')
      arrays[name] = item

  file.visititems(visit)
  entries = {at: Struct(x.shape, _named(x.dtype)) for at, x in arrays.items()}
  return entries, lambda wanted: {
    at: place(arrays[at], x, entries[at].dtype) for at, x in wanted.items()
  }


def _npy_header(file: zipfile.ZipFile, name: str) -> Struct:
  """Shape and dtype of an array, without reading it; version 2 is for headers beyond the limit."""
  with file.open(name) as member:
    start = io.BytesIO(member.read(NPY_HEADER))
  np.lib.format.read_magic(start)
  shape, _, dtype = np.lib.format.read_array_header_1_0(start)
  return Struct(shape, _named(dtype))


def _named(dtype: np.dtype) -> np.dtype:
  """The dtype with its name: NumPy and h5py save bfloat16 as two bytes without a meaning."""
  return np.dtype(jnp.bfloat16) if dtype == np.dtype('V2') else dtype


def place(source: Any, struct: Struct, stored: np.dtype | None = None) -> jax.Array:
  """Reads what each device of this process needs, and no more; `stored` is its dtype by name."""

  def part(index: tuple[slice, ...] | None) -> np.ndarray:
    with np.errstate(over='ignore'):  # `load_anchor` refuses what is infinite in the new dtype
      found = np.asarray(source[index or ...])
      return (found if stored is None else found.view(stored)).astype(struct.dtype, copy=False)

  if struct.sharding is None:
    return jnp.array(part((slice(None),) * len(struct.shape)))
  return jax.make_array_from_callback(struct.shape, struct.sharding, part)
