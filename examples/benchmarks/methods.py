"""The optimizers that the benchmarks compare, and the step that they time."""

from collections.abc import Callable
from typing import Any

import optax

import spd_optax as spd

LEARNING_RATE = 1e-3

REFERENCE = 'optax.adam'

OPTIMIZERS: dict[str, Callable[[], optax.GradientTransformation]] = {
  REFERENCE: lambda: optax.adam(LEARNING_RATE),
  'optax.adamw': lambda: optax.adamw(LEARNING_RATE),
  'form 1': lambda: optax.chain(spd.projection_decay(), optax.adam(LEARNING_RATE)),
  'form 2': lambda: spd.adam_spd(LEARNING_RATE),
  'form 2, zero anchor': lambda: spd.adam_spd(LEARNING_RATE, 0),
}

Step = Callable[[Any, Any, Any], tuple[Any, Any]]


def make_step(tx: optax.GradientTransformation) -> Step:
  """(params, state, gradients) -> (params, state), as a training loop has it."""

  def step(params: Any, state: Any, gradients: Any) -> tuple[Any, Any]:
    updates, state = tx.update(gradients, state, params)
    return optax.apply_updates(params, updates), state

  return step
