"""Optimizers with Selective Projection Decay inside, ready to use."""

import chex
import jax
import optax

from spd_optax import checks
from spd_optax.layers import AxisName, Group, StackAxis
from spd_optax.rules import Rule
from spd_optax.with_projection_decay import ProjectionDecayOptimizer, with_projection_decay


def adam_spd(
  learning_rate: optax.ScalarOrSchedule,
  anchor: optax.Params | None = None,
  strength: optax.ScalarOrSchedule = 1.0,
  *,
  b1: chex.Numeric = 0.9,
  b2: chex.Numeric = 0.999,
  eps: chex.Numeric = 1e-8,
  eps_root: chex.Numeric = 0.0,
  mu_dtype: jax.typing.DTypeLike | None = None,
  nesterov: bool = False,
  margin: chex.Numeric = 0.0,
  rule: Rule | None = None,
  stack_axis: StackAxis = None,
  group: Group = None,
  axis_name: AxisName = None,
  anchor_dtype: jax.typing.DTypeLike | None = None,
  anchor_memory_kind: str | None = None,
  anchor_ema: chex.Numeric | None = None,
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
    rule: see `with_projection_decay`.
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
  if not isinstance(nesterov, bool):
    raise TypeError(f'nesterov: expected True or False, found {checks.kind_of(nesterov)}')
  adam = optax.adam(learning_rate, b1, b2, eps, eps_root, mu_dtype, nesterov=nesterov)
  return with_projection_decay(
    adam,
    anchor,
    strength,
    margin=margin,
    rule=rule,
    stack_axis=stack_axis,
    group=group,
    axis_name=axis_name,
    anchor_dtype=anchor_dtype,
    anchor_memory_kind=anchor_memory_kind,
    anchor_ema=anchor_ema,
  )
