"""Optimizers with Selective Projection Decay inside, ready to use."""

from typing import Any

import jax
import optax

from spd_optax import checks
from spd_optax.checks import Number, NumberOrSchedule
from spd_optax.layers import AxisName, Group, StackAxis
from spd_optax.projection_decay import ProjectionDecayOptimizer, with_projection_decay


def adam_spd(
  learning_rate: optax.ScalarOrSchedule,
  anchor: Any = None,
  strength: NumberOrSchedule = 1.0,
  *,
  b1: Number = 0.9,
  b2: Number = 0.999,
  eps: Number = 1e-8,
  eps_root: Number = 0.0,
  mu_dtype: Any = None,
  nesterov: bool = False,
  margin: Number = 0.0,
  stack_axis: StackAxis = None,
  group: Group = None,
  axis_name: AxisName = None,
  anchor_dtype: Any = None,
  anchor_memory_kind: str | None = None,
  anchor_ema: Number | None = None,
) -> ProjectionDecayOptimizer:
  r"""The paper's Adam-SPD: `with_projection_decay` around `optax.adam`.

  Change ``optax.adam(lr)`` or ``optax.adamw(lr)`` to ``spd.adam_spd(lr)``.

  Args:
    learning_rate: a number or a schedule, for `optax.adam`.
    anchor: θ_0; see `projection_decay`.
    strength: λ; see `with_projection_decay`.
    b1: decay of Adam's first moment.
    b2: decay of Adam's second moment.
    eps: added outside Adam's square root.
    eps_root: added inside Adam's square root.
    mu_dtype: dtype of the first moment; None keeps the params'.
    nesterov: whether to use Nesterov momentum.
    margin: see `with_projection_decay`.
    stack_axis: see `projection_decay`.
    group: see `projection_decay`.
    axis_name: see `projection_decay`.
    anchor_dtype: see `projection_decay`.
    anchor_memory_kind: see `projection_decay`.
    anchor_ema: see `projection_decay`.

  Returns:
    A `ProjectionDecayOptimizer` whose state is a `WithProjectionDecayState`.

  Raises:
    ValueError, TypeError: as `projection_decay`.

  References:
    Tian et al., `Rethinking Weight Decay for Robust Fine-Tuning of Foundation
    Models <https://arxiv.org/abs/2411.01713>`_, 2024, Algorithm 1.

  Example:
    >>> import jax.numpy as jnp
    >>> import spd_optax as spd
    >>> optimizer = spd.adam_spd(1e-3)
    >>> state = optimizer.init({'kernel': jnp.ones((2, 3))})
  """
  name = 'adam_spd(learning_rate, anchor): learning_rate'
  checks.number_or_schedule(name, learning_rate)
  for key, value in {'b1': b1, 'b2': b2}.items():
    checks.fraction(key, value)
  for key, value in {'eps': eps, 'eps_root': eps_root}.items():
    checks.non_negative(key, value)
  checks.floating_dtype('mu_dtype', mu_dtype)
  checks.flag('nesterov', nesterov)

  def schedule(count: jax.Array) -> Any:
    return checks.at_step(name, learning_rate, count)

  rate = schedule if callable(learning_rate) else learning_rate
  adam = optax.adam(rate, b1, b2, eps, eps_root, mu_dtype, nesterov=nesterov)
  return with_projection_decay(
    adam,
    anchor,
    strength,
    margin=margin,
    stack_axis=stack_axis,
    group=group,
    axis_name=axis_name,
    anchor_dtype=anchor_dtype,
    anchor_memory_kind=anchor_memory_kind,
    anchor_ema=anchor_ema,
  )
