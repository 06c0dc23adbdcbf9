"""Parameter trees of well-known models as nested dicts of shapes, without any weights.

    python examples/benchmarks/shapes.py

prints how many leaves and parameters each has.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Shapes = Any  # nested dict of tuples of ints


def vit_b16() -> Shapes:
  """Flax's ViT-B/16 for 224×224 images, with a head for 1000 classes."""
  return _vit(width=768, hidden=3072, depth=12, patch=16, tokens=197, classes=1000)


def vit_b16_heads() -> Shapes:
  """The same with attention as Flax's MultiHeadDotProductAttention stores it, head by head."""
  tree = vit_b16()
  projection = {'kernel': (768, 12, 64), 'bias': (12, 64)}
  output = {'kernel': (12, 64, 768), 'bias': (768,)}
  attention = dict.fromkeys(('query', 'key', 'value'), projection) | {'output': output}
  blocks = {i: block | {'attention': attention} for i, block in tree['encoder'].items()}
  return tree | {'encoder': blocks}


def vit_b16_scanned() -> Shapes:
  """The same with the blocks stacked on axis 0, as nn.scan stores them."""
  tree = vit_b16()
  stacked = _map(lambda shape: (12, *shape), tree['encoder']['0'])
  return tree | {'encoder': {SCANNED: stacked}}


SCANNED = 'scanned'  # the key above stacked blocks


def stack_axis(path: str, leaf: Any) -> int | None:
  """The axis that stacks layers in a leaf."""
  return 0 if SCANNED in path.split('/') else None


def t5_base() -> Shapes:
  """Flax's T5-base (v1.0): ReLU, one embedding for input and output."""
  return _t5(width=768, hidden=3072, depth=12, heads=12)


def t5_large() -> Shapes:
  """Flax's T5-large (v1.0)."""
  return _t5(width=1024, hidden=4096, depth=24, heads=16)


def tiny() -> Shapes:
  """A ViT of one block, for tests and a first look."""
  return _vit(width=32, hidden=64, depth=1, patch=4, tokens=17, classes=10)


MODELS: dict[str, Callable[[], Shapes]] = {
  'tiny': tiny,
  'vit_b16': vit_b16,
  'vit_b16_heads': vit_b16_heads,
  'vit_b16_scanned': vit_b16_scanned,
  't5_base': t5_base,
  't5_large': t5_large,
}


def _dense(inputs: int, outputs: int, bias: bool = True) -> Shapes:
  return {'kernel': (inputs, outputs)} | ({'bias': (outputs,)} if bias else {})


def _vit(width: int, hidden: int, depth: int, patch: int, tokens: int, classes: int) -> Shapes:
  norm = {'scale': (width,), 'bias': (width,)}
  attention = {name: _dense(width, width) for name in ('query', 'key', 'value', 'output')}
  block = {
    'layernorm_before': norm,
    'attention': attention,
    'layernorm_after': norm,
    'intermediate': _dense(width, hidden),
    'output': _dense(hidden, width),
  }
  embeddings = {
    'cls_token': (1, 1, width),
    'position_embeddings': (1, tokens, width),
    'projection': {'kernel': (patch, patch, 3, width), 'bias': (width,)},
  }
  return {
    'embeddings': embeddings,
    'encoder': deeper(block, depth),
    'layernorm': norm,
    'classifier': _dense(width, classes),
  }


def _t5(width: int, hidden: int, depth: int, heads: int) -> Shapes:
  norm = {'weight': (width,)}
  attention = {name: _dense(width, width, bias=False) for name in 'qkvo'}
  mlp = {'wi': _dense(width, hidden, bias=False), 'wo': _dense(hidden, width, bias=False)}

  def stack(**parts: Shapes) -> Shapes:
    block = {name: part | {'layer_norm': norm} for name, part in parts.items()}
    blocks = deeper(block, depth)
    first = block['self_attention'] | {'relative_attention_bias': {'embedding': (32, heads)}}
    return {'block': blocks | {'0': block | {'self_attention': first}}, 'final_layer_norm': norm}

  return {
    'shared': {'embedding': (32128, width)},
    'encoder': stack(self_attention=attention, mlp=mlp),
    'decoder': stack(self_attention=attention, cross_attention=attention, mlp=mlp),
  }


def wider(shapes: Shapes, k: int) -> Shapes:
  """As many leaves, each k times as long: k times the parameters."""
  return _map(lambda shape: (k * shape[0], *shape[1:]), shapes)


def deeper(shapes: Shapes, k: int) -> Shapes:
  """K copies under the keys '0', '1', …: k times the leaves and the parameters."""
  return {str(i): shapes for i in range(k)}


def random(shapes: Shapes, dtype: Any = jnp.float32, seed: int = 0, scale: float = 1.0) -> Any:
  """Arrays of independent normal numbers with standard deviation `scale`."""
  rng = np.random.default_rng(seed)
  return _map(
    lambda shape: jnp.asarray(scale * rng.standard_normal(shape, np.float32), dtype), shapes
  )


def structs(shapes: Shapes, dtype: Any = jnp.float32) -> Any:
  """The arrays' shapes and dtypes, to compile for them without having them."""
  return _map(lambda shape: jax.ShapeDtypeStruct(shape, dtype), shapes)


def leaves(shapes: Shapes) -> int:
  """How many leaves the tree has."""
  return len(_leaves(shapes))


def parameters(shapes: Shapes) -> int:
  """How many parameters the tree has."""
  return sum(map(math.prod, _leaves(shapes)))


def _map(function: Callable[[tuple[int, ...]], Any], shapes: Shapes) -> Any:
  return jax.tree.map(function, shapes, is_leaf=_is_shape)


def _leaves(shapes: Shapes) -> list[tuple[int, ...]]:
  return jax.tree.leaves(shapes, is_leaf=_is_shape)


def _is_shape(node: Any) -> bool:
  return isinstance(node, tuple)


if __name__ == '__main__':
  for name, model in MODELS.items():
    print(f'{name}: {leaves(model()):,} leaves, {parameters(model()):,} parameters')
