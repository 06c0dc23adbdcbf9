"""Scores of a loaded model, from its features alone."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from suite.tasks import Data, Params


class Pairs(NamedTuple):
  """Inputs that belong together: each query's answer is to be found among all answers.

  Attributes:
    queries, answers: inputs, or their features, [n, …].
  """

  queries: Any
  answers: Any


def unit(x: jax.Array) -> jax.Array:
  """The rows at length 1, so that their products are cosines."""
  return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-6)


def score(params: Params, data: Data, *, centred: bool = False) -> jax.Array:
  """Accuracy in % on (features, labels), or how often a query's answer is the nearest by cosine.

  `centred` takes the mean of all queries off them first, and that of all answers.
  """
  if isinstance(data, Pairs):
    queries, answers = (x - x.mean(0) if centred else x for x in data)
    nearest = jnp.argmax(unit(queries) @ unit(answers).T, -1)
    return 100 * jnp.mean(nearest == jnp.arange(len(nearest)))
  logits = data[0] @ params['head']['kernel'] + params['head']['bias']
  return 100 * jnp.mean(jnp.argmax(logits, -1) == data[1])
