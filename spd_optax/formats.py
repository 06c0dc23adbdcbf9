"""Checkpoint files as named arrays: what is inside, and reading a part of it.

Nothing is unpickled. Each library is imported only where its format is met.
"""

import importlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from spd_optax import trees

Struct = jax.ShapeDtypeStruct


class Checkpoint(NamedTuple):
  """An opened checkpoint.

  Attributes:
    format: its name, for messages.
    entries: shape and dtype of each array, by its '/'-joined name.
    read: reads arrays by name, each with the dtype and the sharding of the struct given for it
      (no sharding: the default device).
  """

  format: str
  entries: dict[str, Struct]
  read: Callable[[Mapping[str, Struct]], dict[str, jax.Array]]


def open_checkpoint(path: Path) -> Checkpoint:
  """Opens an Orbax directory, safetensors (a file or a directory of shards), msgpack or npz.

  Raises:
    FileNotFoundError: if nothing is there.
    ValueError: if it is none of these, or damaged.
    ImportError: naming what to install, if the library for the format is missing.
  """
  if not path.exists():
    raise FileNotFoundError(f'{path}: no such file or directory')
  name, opened = _format_of(path)
  try:
    return opened()
  except (ImportError, AmbiguousDirectoryError):
    raise
  except Exception as error:
    raise ValueError(damaged(path, name, error)) from error


def damaged(path: Path, name: str, error: Exception) -> str:
  """The message for a checkpoint that its library cannot read."""
  reason = str(error).strip().partition('\n')[0] or type(error).__name__
  return f'{path}: no readable {name} checkpoint (truncated, corrupt, or not one): {reason}'


class AmbiguousDirectoryError(ValueError):
  """A directory that holds no checkpoint, or more than one."""


def _format_of(path: Path) -> tuple[str, Callable[[], Checkpoint]]:
  if path.is_dir():
    shards = sorted(path.glob('*.safetensors'))
    if shards:
      return 'safetensors', lambda: _safetensors(shards)
    return 'Orbax', lambda: _orbax(path)
  match path.suffix:
    case '.safetensors':
      return 'safetensors', lambda: _safetensors([path])
    case '.npz':
      return 'npz', lambda: _npz(path)
    case '.msgpack' | '':  # flax.training.checkpoints writes `checkpoint_100`
      return 'flax msgpack', lambda: _msgpack(path)
  raise ValueError(
    f'{path}: unknown kind of checkpoint {path.suffix!r}; expected an Orbax directory, '
    '.safetensors (a file, or a directory of them), .msgpack (flax) or .npz'
  )


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


def _orbax(path: Path) -> Checkpoint:
  ocp = library('orbax.checkpoint', 'orbax-checkpoint', 'an Orbax checkpoint').v1
  root, name = _orbax_tree(path)
  tree = ocp.metadata(root, checkpointable_name=name).metadata
  if tree is None:  # Orbax logs why
    raise ValueError('its metadata cannot be read')
  flat = trees.flatten(tree)
  entries = {
    at: Struct(x.shape, x.dtype)
    for at, x in zip(flat.paths, flat.leaves, strict=True)
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
    loaded = trees.flatten(ocp.load(root, asked, checkpointable_name=name))
    found = dict(zip(loaded.paths, loaded.leaves, strict=True))
    return {at: found[at] for at in wanted}

  return Checkpoint('Orbax', entries, read)


def _orbax_tree(path: Path) -> tuple[Path, str | None]:
  """The directory and the name in it that `orbax.checkpoint.v1` loads a tree from."""
  if (path / '_METADATA').exists():
    inside = (path.parent / '_CHECKPOINT_METADATA').exists()
    return (path.parent, path.name) if inside else (path, None)
  children = sorted(child.name for child in path.iterdir() if child.is_dir())
  trees_here = [name for name in children if (path / name / '_METADATA').exists()]
  if len(trees_here) == 1:
    return path, trees_here[0]
  if trees_here:
    raise AmbiguousDirectoryError(
      f'{path}: holds several trees; pass the path of one of them: {", ".join(trees_here)}'
    )
  steps = [name for name in children if (path / name / '_CHECKPOINT_METADATA').exists()]
  if steps:
    raise AmbiguousDirectoryError(
      f'{path}: holds a checkpoint for each step; pass the path of one of them: {", ".join(steps)}'
    )
  raise AmbiguousDirectoryError(
    f'{path}: no Orbax checkpoint and no .safetensors file in this directory'
  )


def _safetensors(paths: Sequence[Path]) -> Checkpoint:
  safetensors = library('safetensors', 'safetensors', 'a .safetensors file')
  files = [safetensors.safe_open(path, framework='numpy') for path in paths]
  slices = {name: file.get_slice(name) for file in files for name in file.keys()}  # noqa: SIM118

  def struct(array: Any) -> Struct:
    shape = tuple(array.get_shape())
    return Struct(shape, array[(slice(0, 1),) * len(shape) or ...].dtype)

  entries = {name: struct(array) for name, array in slices.items()}
  return Checkpoint(
    'safetensors',
    entries,
    lambda wanted: {name: _place(slices[name], struct) for name, struct in wanted.items()},
  )


def _msgpack(path: Path) -> Checkpoint:
  serialization = library('flax.serialization', 'flax', 'a flax msgpack file')
  tree = serialization.msgpack_restore(path.read_bytes())
  if not isinstance(tree, dict):
    raise ValueError(f'expected a dict of arrays, found {type(tree).__name__}')
  flat = trees.flatten(tree)
  return _in_memory('flax msgpack', dict(zip(flat.paths, flat.leaves, strict=True)))


def _npz(path: Path) -> Checkpoint:
  with np.load(path, allow_pickle=False) as file:
    return _in_memory('npz', {name: _known(file[name]) for name in file.files})


def _known(array: np.ndarray) -> np.ndarray:
  """NumPy saves bfloat16 as two bytes without a meaning."""
  return array.view(jax.numpy.bfloat16) if array.dtype == np.dtype('V2') else array


def _in_memory(name: str, leaves: Mapping[str, Any]) -> Checkpoint:
  arrays = {
    at: np.asarray(leaf) for at, leaf in leaves.items() if isinstance(leaf, np.ndarray | np.generic)
  }
  return Checkpoint(
    name,
    {at: Struct(array.shape, array.dtype) for at, array in arrays.items()},
    lambda wanted: {at: _place(arrays[at], struct) for at, struct in wanted.items()},
  )


def _place(source: Any, struct: Struct) -> jax.Array:
  """Reads what each device of this process needs, and no more."""

  def part(index: tuple[slice, ...] | None) -> np.ndarray:
    return np.asarray(source[index or ...]).astype(struct.dtype)

  if struct.sharding is None:
    return jax.numpy.array(part((slice(None),) * len(struct.shape)))
  placed: jax.Array = jax.make_array_from_callback(struct.shape, struct.sharding, part)
  return placed
