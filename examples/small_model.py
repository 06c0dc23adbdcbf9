"""A small network that knows digits in eight styles; the notebooks of docs/ start from it.

It is pre-trained here in some seconds. You would load a checkpoint.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import digits

Params = Any


class Network(nn.Module):
  """Images float[n, 16, 16] to logits float[n, 10]."""

  @nn.compact
  def __call__(self, images: jax.Array) -> jax.Array:
    x = images.reshape(len(images), -1)
    for width in (128, 64):
      x = nn.relu(nn.Dense(width)(x))
    return nn.Dense(digits.CLASSES)(x)


network = Network()


def logits(params: Params, images: jax.Array) -> jax.Array:
  """What the network says."""
  return network.apply({'params': params}, images)


def loss(params: Params, images: jax.Array, labels: jax.Array) -> jax.Array:
  """Mean cross-entropy."""
  entropy = optax.softmax_cross_entropy_with_integer_labels
  return entropy(logits(params, images), labels).mean()


@jax.jit
def _right(params: Params, images: jax.Array, labels: jax.Array) -> jax.Array:
  return 100 * jnp.mean(jnp.argmax(logits(params, images), -1) == labels)


def accuracy(params: Params, style: str) -> float:
  """Accuracy in % on test digits in a style; 'old' is the mean over the eight of pre-training."""
  styles = digits.OLD if style == 'old' else [style]
  return float(np.mean([_right(params, *_test(style)) for style in styles]))


def few(style: str, count: int = 200) -> digits.Split:
  """A few digits in a new style, to fine-tune on."""
  split = digits.in_style(_parts()[1], style)
  return digits.Split(split.images[:count], split.labels[:count])


@functools.cache
def _test(style: str) -> digits.Split:
  return digits.in_style(_parts()[2], style)


@functools.cache
def _parts() -> tuple[digits.Split, digits.Split, digits.Split]:
  return digits.load()


def pretrained(steps: int = 300) -> Params:
  """The params after training on the eight old styles."""
  known = [digits.in_style(_parts()[0], style) for style in digits.OLD]
  images, labels = (jnp.concatenate(x) for x in zip(*known, strict=True))
  tx = optax.adam(3e-3)
  order = np.random.default_rng(0).integers(0, len(labels), (steps, 128))

  @jax.jit
  def train(params: Params, order: jax.Array) -> Params:
    def step(carry: Any, at: jax.Array) -> tuple[Any, None]:
      params, state = carry
      gradients = jax.grad(loss)(params, images[at], labels[at])
      updates, state = tx.update(gradients, state, params)
      return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(step, (params, tx.init(params)), order)[0][0]

  return train(network.init(jax.random.key(0), images[:2])['params'], order)
