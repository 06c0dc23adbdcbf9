"""Small models of several kinds, as Flax modules.

They are trained by the hundred in one compiled program, a seed or setting each, so that a
convolution is written as a matrix product of shifted images: XLA has no fast convolution
whose kernel differs from example to example.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

HEADS = 2


class MLP(nn.Module):
  """Features float32[n, …] -> logits float32[n, outputs]."""

  widths: tuple[int, ...]
  outputs: int

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    x = x.reshape(len(x), -1)
    for i, width in enumerate(self.widths):
      x = nn.relu(nn.Dense(width, name=f'hidden_{i}')(x))
    return nn.Dense(self.outputs, name='head')(x)


def neighbours(x: jax.Array) -> jax.Array:
  """Every second pixel's 3×3 neighbourhood as channels: [n, h, w, c] -> [n, h/2, w/2, 9 c]."""
  _, height, width, _ = x.shape
  padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
  shifts = [padded[:, i : i + height : 2, j : j + width : 2] for i in range(3) for j in range(3)]
  return jnp.concatenate(shifts, axis=-1)


class CNN(nn.Module):
  """Images float32[n, 16, 16] -> logits float32[n, outputs]: 3×3 convolutions of stride 2."""

  widths: tuple[int, ...]
  outputs: int

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    x = x[..., None]
    for i, width in enumerate(self.widths):
      x = nn.relu(nn.Dense(width, name=f'conv_{i}')(neighbours(x)))
    return nn.Dense(self.outputs, name='head')(x.reshape(len(x), -1))


class Block(nn.Module):
  """A transformer block, norms first; `mask` bool[t, t] says which tokens see which."""

  @nn.compact
  def __call__(self, x: jax.Array, mask: jax.Array | None) -> jax.Array:
    width = x.shape[-1]
    y = nn.LayerNorm(name='norm_1')(x)
    x = x + nn.MultiHeadDotProductAttention(HEADS, name='attention')(y, mask=mask)
    y = nn.LayerNorm(name='norm_2')(x)
    y = nn.gelu(nn.Dense(2 * width, name='up')(y))
    return x + nn.Dense(width, name='down')(y)


class ViT(nn.Module):
  """Images float32[n, 16, 16] -> logits float32[n, outputs]: 4×4 patches, mean of tokens."""

  width: int
  depth: int
  outputs: int

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    n, size, _ = x.shape
    patches = x.reshape(n, size // 4, 4, size // 4, 4).swapaxes(2, 3).reshape(n, -1, 16)
    x = nn.Dense(self.width, name='embedding')(patches)
    x = x + self.param('position', nn.initializers.normal(0.02), x.shape[1:])
    for i in range(self.depth):
      x = Block(name=f'block_{i}')(x, None)
    return nn.Dense(self.outputs, name='head')(nn.LayerNorm(name='norm')(x.mean(1)))


class Decoder(nn.Module):
  """Bytes int32[n, t] -> logits float32[n, t, vocabulary] of the byte after each."""

  width: int
  depth: int
  vocabulary: int = 128

  @nn.compact
  def __call__(self, tokens: jax.Array) -> jax.Array:
    length = tokens.shape[1]
    x = nn.Embed(self.vocabulary, self.width, name='embedding')(tokens)
    x = x + self.param('position', nn.initializers.normal(0.02), x.shape[1:])
    mask = jnp.tril(jnp.ones((length, length), bool))
    for i in range(self.depth):
      x = Block(name=f'block_{i}')(x, mask)
    return nn.Dense(self.vocabulary, name='head')(nn.LayerNorm(name='norm')(x))
