"""Low-rank adapters: W + A B for every matrix. A and B alone are trained.

The weights stand in the params, under 'base', beside the 'adapters' by the path of their matrix.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax

from suite.tasks import Params


def _name(path: Any) -> str:
  return jax.tree_util.keystr(path, simple=True, separator='/')


def _matrix(shape: tuple[int, ...]) -> tuple[int, int]:
  """The leaf as a matrix, as square as can be: (32, 4, 8) -> (32, 32)."""
  splits = [(math.prod(shape[:i]), math.prod(shape[i:])) for i in range(1, len(shape))]
  return min(splits, key=sum)


def wrap(base: Params, rank: int, key: jax.Array) -> Params:
  """The weights with adapters that change nothing yet: A is random, B is 0."""
  adapters = {}
  for i, (path, weight) in enumerate(jax.tree.leaves_with_path(base)):
    if weight.ndim >= 2:
      rows, columns = _matrix(weight.shape)
      a = jax.random.normal(jax.random.fold_in(key, i), (rows, rank)) / math.sqrt(rows)
      adapters[_name(path)] = {'a': a, 'b': jnp.zeros((rank, columns))}
  return {'base': base, 'adapters': adapters}


def merge(params: Params) -> Params:
  """The weights that the model computes with."""

  def merged(path: Any, weight: jax.Array) -> jax.Array:
    adapter = params['adapters'].get(_name(path))
    return (
      weight if adapter is None else weight + (adapter['a'] @ adapter['b']).reshape(weight.shape)
    )

  return jax.tree.map_with_path(merged, params['base'])


def alone(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
  """The optimizer, for the adapters alone."""
  transforms = {'adapters': optimizer, 'base': optax.set_to_zero()}
  return optax.partition(transforms, lambda params: {name: name for name in params})
