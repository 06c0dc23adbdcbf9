"""A ViT as a Flax nnx module, its parts named as those of PyTorch's ViT in transformers."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx


class Block(nnx.Module):
  """A transformer block, norms first."""

  def __init__(self, config: Mapping[str, Any], rngs: nnx.Rngs):
    width, hidden = config['hidden_size'], config['intermediate_size']
    linear = functools.partial(nnx.Linear, kernel_init=initial(config), rngs=rngs)
    parts = {name: linear(width, width) for name in ('query', 'key', 'value')}
    self.heads = config['num_attention_heads']
    self.attention = nnx.Dict(
      attention=nnx.Dict(parts), output=nnx.Dict(dense=linear(width, width))
    )
    self.intermediate = nnx.Dict(dense=linear(width, hidden))
    self.output = nnx.Dict(dense=linear(hidden, width))
    self.layernorm_before = norm(config, rngs)
    self.layernorm_after = norm(config, rngs)

  def __call__(self, x: jax.Array) -> jax.Array:
    y, parts = self.layernorm_before(x), self.attention.attention
    heads = (
      part(y).reshape(*y.shape[:2], self.heads, -1)
      for part in (parts.query, parts.key, parts.value)
    )
    y = jax.nn.dot_product_attention(*heads)
    x = x + self.attention.output.dense(y.reshape(x.shape))
    y = self.intermediate.dense(self.layernorm_after(x))
    return x + self.output.dense(nnx.gelu(y, approximate=False))


def initial(config: Mapping[str, Any]) -> nnx.Initializer:
  """The weights of a model that is not loaded."""
  return nnx.initializers.truncated_normal(config.get('initializer_range', 0.02))


def norm(config: Mapping[str, Any], rngs: nnx.Rngs) -> nnx.LayerNorm:
  """A layer norm of the model's width."""
  return nnx.LayerNorm(
    config['hidden_size'], epsilon=config.get('layer_norm_eps', 1e-12), rngs=rngs
  )


class ViT(nnx.Module):
  """Images float32[n, size, size, channels] in [−1, 1] -> logits float32[n, classes]."""

  def __init__(self, config: Mapping[str, Any], classes: int, rngs: nnx.Rngs):
    if (act := config.get('hidden_act', 'gelu')) != 'gelu':
      raise ValueError(f'hidden_act: {act} is not gelu')
    width, self.patch = config['hidden_size'], config['patch_size']
    tokens = 1 + (config['image_size'] // self.patch) ** 2
    # A matrix product: XLA has no fast convolution whose kernel differs from seed to seed.
    projection = nnx.LinearGeneral(
      (self.patch, self.patch, config['num_channels']),
      width,
      axis=(-3, -2, -1),
      kernel_init=initial(config),
      rngs=rngs,
    )
    self.vit = nnx.Dict(
      embeddings=nnx.Dict(
        cls_token=nnx.Param(initial(config)(rngs.params(), (1, 1, width))),
        position_embeddings=nnx.Param(initial(config)(rngs.params(), (1, tokens, width))),
        patch_embeddings=nnx.Dict(projection=projection),
      ),
      encoder=nnx.Dict(
        layer=nnx.Dict({str(i): Block(config, rngs) for i in range(config['num_hidden_layers'])})
      ),
      layernorm=norm(config, rngs),
    )
    self.classifier = nnx.Linear(width, classes, kernel_init=initial(config), rngs=rngs)

  def __call__(self, images: jax.Array) -> jax.Array:
    n, size, _, channels = images.shape
    rows, embeddings = size // self.patch, self.vit.embeddings
    patches = images.reshape(n, rows, self.patch, rows, self.patch, channels).swapaxes(2, 3)
    patches = patches.reshape(n, rows**2, self.patch, self.patch, channels)
    x = embeddings.patch_embeddings.projection(patches)
    first = jnp.broadcast_to(embeddings.cls_token[...], (n, 1, x.shape[-1]))
    x = jnp.concatenate([first, x], axis=1) + embeddings.position_embeddings[...]
    for block in self.vit.encoder.layer.values():
      x = block(x)
    return self.classifier(self.vit.layernorm(x[:, 0]))
