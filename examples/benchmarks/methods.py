"""The optimizers that the benchmarks compare, and the step that they time."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import spd_optax as spd

LEARNING_RATE = 1e-3

REFERENCE = 'optax.adam'


def _adam() -> optax.GradientTransformation:
  return optax.adam(LEARNING_RATE)


# By name, from an anchor; "captured" has the one that the optimizer takes at the first step.
OPTIMIZERS: dict[str, Callable[[Any], Any]] = {
  REFERENCE: lambda anchor: _adam(),
  'optax.adamw': lambda anchor: optax.adamw(LEARNING_RATE),
  'form 1': lambda anchor: optax.chain(spd.projection_decay(anchor), _adam()),
  'form 1, captured': lambda anchor: optax.chain(spd.projection_decay(), _adam()),
  'form 2': lambda anchor: spd.adam_spd(LEARNING_RATE, anchor),
  'form 2, captured': lambda anchor: spd.adam_spd(LEARNING_RATE),
  'form 2, zero anchor': lambda anchor: spd.adam_spd(LEARNING_RATE, 0),
  'form 2, apply': lambda anchor: WritesParams(spd.adam_spd(LEARNING_RATE, anchor)),
  'form 1, no reports': lambda anchor: WithoutReports(
    optax.chain(spd.projection_decay(anchor), _adam())
  ),
  'form 2, no reports': lambda anchor: WithoutReports(spd.adam_spd(LEARNING_RATE, anchor)),
}

REPORTS = set(spd.ProjectionDecayState._fields) - {'count', 'anchor'}


class WritesParams(NamedTuple):
  """An optimizer whose step is its `apply`."""

  optimizer: spd.ProjectionDecayOptimizer

  @property
  def init(self) -> Any:
    return self.optimizer.init


def _silent(state: Any) -> Any:
  return optax.tree.set(state, **{name: {} for name in REPORTS})


class WithoutReports(NamedTuple):
  """An optimizer whose state tells nothing of its layers: shows what the reports cost."""

  optimizer: optax.GradientTransformationExtraArgs

  def init(self, params: Any) -> Any:
    return _silent(self.optimizer.init(params))

  def update(self, gradients: Any, state: Any, params: Any) -> tuple[Any, Any]:
    whole = jax.eval_shape(self.optimizer.init, params)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), whole)
    state = optax.tree.set(state, **{name: optax.tree.get(zeros, name) for name in REPORTS})
    updates, state = self.optimizer.update(gradients, state, params)
    return updates, _silent(state)


Step = Callable[[Any, Any, Any], tuple[Any, Any]]


def make_step(tx: Any) -> Step:
  """(params, state, gradients) -> (params, state), as a training loop has it."""

  def step(params: Any, state: Any, gradients: Any) -> tuple[Any, Any]:
    if isinstance(tx, WritesParams):
      return tx.optimizer.apply(gradients, state, params)
    updates, state = tx.update(gradients, state, params)
    return optax.apply_updates(params, updates), state

  return step
