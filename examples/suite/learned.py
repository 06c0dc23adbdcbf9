"""A strength for each layer, learned from held-out examples while the model is trained.

A quarter of the examples that a method may train on is kept apart. Each step has two gradients
at the same weights: g of a batch of the others, and h of a batch of these, of the same size. So
there are twice as many gradients as in other methods, and fewer examples to fit. Adapters are not
supported. With d = θ − θ_0, u Adam's step, and a rate μ for the logarithm of the strength:

    log λ ← clip(log λ + Adam(cos(h, d); μ), log 0.001, log 100)            λ_1 = 1

Where the held-out loss would fall if the layer went back to its start, cos(h, d) > 0, and λ grows.
With μ = 0 all strengths are 1.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import training
from suite.methods import Method, Scalar, sweep
from suite.tasks import Data, Params, size, take

HELD_OUT = 0.25
LOGS = np.log(0.001), np.log(100)
MARGIN = 0.05


class Learned(NamedTuple):
  """State: θ_0, log λ of each layer, and the Adams of the weights and of log λ."""

  start: Params
  logs: Params
  adam: Any
  learner: Any


def cosine(g: jax.Array, d: jax.Array) -> jax.Array:
  """cos(g, d), and 0 where one is 0."""
  return optax.cosine_similarity(g.ravel(), d.ravel(), epsilon=1e-30)


def turned(g: jax.Array, d: jax.Array, log: jax.Array) -> jax.Array:
  """The gradient, as `projection_decay` turns it."""
  ratio = optax.tree.norm(g) / jnp.maximum(optax.tree.norm(d), 1e-30)
  return g + jnp.exp(log) * jnp.maximum(cosine(g, d) + MARGIN, 0) * ratio * d


def learning(turn: bool) -> Callable[..., optax.GradientTransformation]:
  """With `turn` the rule of `projection_decay`; else decay, θ ← θ − α (u + λ d)."""

  def optimizer(learning_rate: Scalar, blocks: Any, rate: Scalar) -> optax.GradientTransformation:
    adam, learner = optax.scale_by_adam(), optax.adam(rate)

    def init(params: Params) -> Learned:
      start = jax.tree.map(jnp.copy, params['model'])
      logs = jax.tree.map(lambda p: jnp.zeros([], p.dtype), start)
      return Learned(start, logs, adam.init(start), learner.init(logs))

    def update(gradients: Any, state: Learned, params: Any = None) -> tuple[Any, Learned]:
      distances = jax.tree.map(jnp.subtract, params['model'], state.start)
      slopes = jax.tree.map(lambda h, d: -cosine(h, d), gradients['twin'], distances)
      changes, outer = learner.update(slopes, state.learner)
      logs = jax.tree.map(lambda x, change: jnp.clip(x + change, *LOGS), state.logs, changes)
      steps = gradients['model']
      if turn:
        steps = jax.tree.map(turned, steps, distances, logs)
      steps, inner = adam.update(steps, state.adam)
      if not turn:
        steps = jax.tree.map(lambda u, d, x: u + jnp.exp(x) * d, steps, distances, logs)
      steps = jax.tree.map(lambda u: -learning_rate * u, steps)
      return {'model': steps, 'twin': steps}, Learned(state.start, logs, inner, outer)

    return optax.GradientTransformation(init, update)

  return optimizer


def twins(params: Params, cases: Sequence[Any]) -> Params:
  """The weights twice, so that there are two gradients; `learning` keeps them equal."""
  return {'model': params, 'twin': jax.tree.map(jnp.copy, params)}


def of_both(loss: Callable[[Params, Data], jax.Array]) -> Callable[[Params, Data], jax.Array]:
  """A loss over `twins`: of the one on the first half of a batch, of the other on the rest."""

  def total(params: Params, batch: Data) -> jax.Array:
    half = size(batch) // 2
    first, rest = take(batch, slice(half)), take(batch, slice(half, None))
    return loss(params['model'], first) + loss(params['twin'], rest)

  return total


def order(examples: np.ndarray, steps: int, batch: int) -> np.ndarray:
  """Batches for `of_both` from each seed's examples: int32[seeds, steps, 2 batch]."""
  cut = round(examples.shape[1] * (1 - HELD_OUT))
  found = []
  for part in np.split(examples, [cut], axis=1):
    at = training.batch_order(len(part), steps, batch, part.shape[1])
    found.append(np.take_along_axis(part[:, None], at, axis=2))
  return np.concatenate(found, axis=2).astype(np.int32)


METHODS: dict[str, Method] = {  # not compared by default
  f'{name}, λ {how}': Method(learning(turn), sweep(rate=rates), apart=True)
  for name, turn in (('turn', True), ('decay', False))
  for how, rates in (('= 1', (0.0,)), ('learned', (0.01, 0.05, 0.2)))
}
