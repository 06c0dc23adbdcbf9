"""The optimizers that the benchmarks compare, and the step that they time."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

import spd_optax as spd
from benchmarks import shapes

LEARNING_RATE = 1e-3

REFERENCE = 'optax.adam'


def _adam() -> optax.GradientTransformation:
  return optax.adam(LEARNING_RATE)


def _projection_decay(anchor: Any) -> Any:
  return optax.chain(spd.projection_decay(anchor, stack_axis=shapes.stack_axis), _adam())


def _adam_spd(anchor: Any) -> Any:
  return spd.adam_spd(LEARNING_RATE, anchor, stack_axis=shapes.stack_axis)


class WritesParams(NamedTuple):
  """An optimizer whose step is its `apply`."""

  optimizer: spd.ProjectionDecayOptimizer

  @property
  def init(self) -> Any:
    return self.optimizer.init


REPORTS = set(spd.ProjectionDecayState._fields) - {'count', 'anchor'}


class WithOtherReports(NamedTuple):
  """An optimizer whose state holds something else for each report: shows what they cost.

  `pack` makes it of a report, `unpack` makes a report of it and of zeros like the report.
  """

  optimizer: optax.GradientTransformationExtraArgs
  pack: Callable[[Any], Any]
  unpack: Callable[[Any, Any], Any]

  def init(self, params: Any) -> Any:
    return self._packed(self.optimizer.init(params))

  def update(self, gradients: Any, state: Any, params: Any) -> tuple[Any, Any]:
    whole = jax.eval_shape(self.optimizer.init, params)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), whole)
    reports = {
      name: self.unpack(optax.tree.get(state, name), optax.tree.get(zeros, name))
      for name in REPORTS
    }
    updates, state = self.optimizer.update(gradients, optax.tree.set(state, **reports), params)
    return updates, self._packed(state)

  def _packed(self, state: Any) -> Any:
    return optax.tree.set(
      state, **{name: self.pack(optax.tree.get(state, name)) for name in REPORTS}
    )


def without_reports(optimizer: optax.GradientTransformationExtraArgs) -> WithOtherReports:
  """No values of the layers at all."""
  return WithOtherReports(optimizer, lambda report: {}, lambda nothing, zeros: zeros)


def with_packed_reports(optimizer: optax.GradientTransformationExtraArgs) -> WithOtherReports:
  """All layers' values of a report in one vector, not in an array each."""
  return WithOtherReports(
    optimizer,
    lambda report: ravel_pytree(report)[0],
    lambda vector, zeros: ravel_pytree(zeros)[1](vector),
  )


# By name, from an anchor; "captured" has the one that the optimizer takes at the first step.
OPTIMIZERS: dict[str, Callable[[Any], Any]] = {
  REFERENCE: lambda anchor: _adam(),
  'optax.adamw': lambda anchor: optax.adamw(LEARNING_RATE),
  'projection_decay': _projection_decay,
  'projection_decay, captured': lambda anchor: _projection_decay(None),
  'adam_spd': _adam_spd,
  'adam_spd, captured': lambda anchor: _adam_spd(None),
  'adam_spd, zero anchor': lambda anchor: _adam_spd(0),
  'adam_spd, apply': lambda anchor: WritesParams(_adam_spd(anchor)),
  'projection_decay, no reports': lambda anchor: without_reports(_projection_decay(anchor)),
  'adam_spd, no reports': lambda anchor: without_reports(_adam_spd(anchor)),
  'projection_decay, captured, packed reports': lambda anchor: with_packed_reports(
    _projection_decay(None)
  ),
  'adam_spd, captured, packed reports': lambda anchor: with_packed_reports(_adam_spd(None)),
}


Step = Callable[[Any, Any, Any], tuple[Any, Any]]


def make_step(tx: Any) -> Step:
  """(params, state, gradients) -> (params, state), as a training loop has it."""

  def step(params: Any, state: Any, gradients: Any) -> tuple[Any, Any]:
    if isinstance(tx, WritesParams):
      return tx.optimizer.apply(gradients, state, params)
    updates, state = tx.update(gradients, state, params)
    return optax.apply_updates(params, updates), state

  return step
