"""Flax nnx models from directories with config.json and safetensors, as PyTorch's models are saved.

A model whose parts have the names of PyTorch's needs no table of names: `kernel`, `scale` and
`embedding` are PyTorch's `weight`, and a kernel has its outputs last instead of first.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from safetensors.flax import load_file
from safetensors.numpy import save_file

WEIGHTS = ('kernel', 'scale', 'embedding')


@dataclasses.dataclass(frozen=True)
class Model:
  """A model apart from its params, a nested dict. Models of one shape are equal."""

  graph: nnx.GraphDef
  config: Mapping[str, Any] = dataclasses.field(compare=False)
  params: Any = dataclasses.field(compare=False)

  def __call__(self, *inputs: Any, params: Any) -> jax.Array:
    """The logits with these params."""
    return nnx.merge(self.graph, params)(*inputs)


def split(module: nnx.Module, config: Mapping[str, Any]) -> Model:
  """The model of a module whose state are params."""
  graph, params = nnx.split(module)
  return Model(graph, config, nnx.to_pure_dict(params))


def read(checkpoint: str) -> tuple[dict[str, Any], dict[str, jax.Array], Path]:
  """The config, the tensors, and where they are, of a directory or a hub id."""
  folder = Path(checkpoint)
  if not folder.is_dir():
    from huggingface_hub import snapshot_download  # tokenizers needs it, and so brings it

    files = ['config.json', '*.safetensors', 'tokenizer.json', 'spiece.model']
    folder = Path(snapshot_download(checkpoint, allow_patterns=files))
  tensors: dict[str, jax.Array] = {}
  for file in sorted(folder.glob('*.safetensors')):
    tensors |= load_file(file)
  return json.loads((folder / 'config.json').read_text()), tensors, folder


def filled(model: Model, tensors: Mapping[str, jax.Array], new: str = '') -> Model:
  """The model with the tensors in float32; what is below the name `new` stays as it is."""

  def value(path: Any, leaf: jax.Array) -> jax.Array:
    if new and path[0].key == new:
      return leaf
    name, (inverse, _) = _torch(path, leaf)
    if name not in tensors:
      has = ', '.join(tensors) or 'none'
      raise ValueError(f'The checkpoint has no safetensors with "{name}". It has {has:.300}')
    found = tensors[name].astype(np.float32).transpose(inverse)
    if found.shape != leaf.shape:
      raise ValueError(f'{name}: the shape {found.shape} is not {leaf.shape} of the config.')
    return found

  # bfloat16 would round small steps away.
  params = jax.tree_util.tree_map_with_path(value, model.params)
  return dataclasses.replace(model, params=params)


def write(folder: Path, model: Model) -> None:
  """Writes what `read` reads."""
  leaves = jax.tree_util.tree_leaves_with_path(model.params)
  named = [(*_torch(path, leaf), leaf) for path, leaf in leaves]
  tensors = {
    name: np.ascontiguousarray(np.transpose(leaf, axes)) for name, (_, axes), leaf in named
  }
  folder.mkdir(parents=True, exist_ok=True)
  save_file(tensors, folder / 'model.safetensors', metadata={'format': 'pt'})
  (folder / 'config.json').write_text(json.dumps(model.config, indent=1) + '\n')


def _torch(path: Any, leaf: Any) -> tuple[str, tuple[Any, Any]]:
  """PyTorch's name of a leaf, and the axes that make Flax's array of PyTorch's, and back."""
  *parents, last = (str(each.key) for each in path)
  same = tuple(range(leaf.ndim))
  kernels = {2: ((1, 0), (1, 0)), 4: ((2, 3, 1, 0), (3, 2, 0, 1))}
  name = '.'.join([*parents, 'weight' if last in WEIGHTS else last])
  return name, kernels[leaf.ndim] if last == 'kernel' else (same, same)
