"""Selective Projection Decay around an optimizer."""

import dataclasses
import functools
from typing import Any, NamedTuple

import chex
import jax
import optax

from spd_optax import checks, misuse, rules, trees
from spd_optax.anchors import Anchoring
from spd_optax.budgets import Budget
from spd_optax.engine import Engine, ProjectionDecayState, Step, check_state, replaced
from spd_optax.layers import Arrangement, AxisName, Group, StackAxis
from spd_optax.leafwise import at_least_float32, deviation, fusion_barrier, like_param, taken_back
from spd_optax.patterns import Patterns
from spd_optax.rules import GradientTurn, Projection, Rule

_jit = functools.partial(jax.jit, static_argnames='axis')


class WithProjectionDecayState(NamedTuple):
  """State of `with_projection_decay`.

  Attributes:
    projection_decay: the state of SPD.
    inner_state: the state of the inner optimizer.
  """

  projection_decay: ProjectionDecayState
  inner_state: optax.OptState


class ProjectionDecayOptimizer(optax.GradientTransformationExtraArgs):  # type: ignore[misc]  # no py.typed
  """An optax optimizer that can also apply its own updates to the params."""

  def apply(
    self,
    gradients: optax.Updates,
    state: WithProjectionDecayState,
    params: optax.Params,
    **extra_args: Any,
  ) -> tuple[optax.Params, WithProjectionDecayState]:
    """`update` and `optax.apply_updates` in one.

    It computes θ̃ − λ r (θ̃ − θ_0) instead of θ + (u − λ r (θ̃ − θ_0)). The two differ only by
    rounding. `apply` stores no intermediate copy of the params. It returns the next params and the
    next state.
    """
    around = getattr(self.update, '__self__', None)
    if isinstance(around, _Around):
      return around.apply(gradients, state, params, **extra_args)
    updates, state = self.update(gradients, state, params, **extra_args)
    return optax.apply_updates(params, updates), state


def with_projection_decay(
  optimizer: optax.GradientTransformation,
  anchor: optax.Params | None = None,
  strength: optax.ScalarOrSchedule | Budget = 1.0,
  *,
  margin: chex.Numeric = 0.0,
  rule: Rule | None = None,
  free: Patterns | None = None,
  stack_axis: StackAxis = None,
  group: Group = None,
  axis_name: AxisName = None,
  anchor_dtype: jax.typing.DTypeLike | None = None,
  anchor_memory_kind: str | None = None,
  anchor_ema: chex.Numeric | None = None,
) -> ProjectionDecayOptimizer:
  r"""The paper's Selective Projection Decay, exactly, around any complete optimizer.

  Per layer, with raw gradient g, the inner optimizer's whole update u (learning
  rate included), anchor θ_0 and strength λ:

      θ̃ = θ + u
      c = −⟨g, θ − θ_0⟩
      r = max(0, ‖θ̃ − θ_0‖ − ‖θ − θ_0‖) / ‖θ̃ − θ_0‖
      θ ← θ̃ − λ r (θ̃ − θ_0)     where c < 0
      θ ← θ̃                      otherwise

  c < 0 means that −g points back toward the anchor. r > 0 means that the optimizer's momentum still
  carries the layer away from the anchor. Such a layer is held. λ = 1 projects it onto the sphere
  around θ_0 that passes through θ. λ is not multiplied by the learning rate. On a smooth problem
  without noise or a change of direction the rule never acts.

  Change ``optimizer`` to ``spd.with_projection_decay(optimizer)``. SPD replaces weight decay.

  Args:
    optimizer: the inner optimizer, complete with its learning rate: `optax.adam`,
      `optax.lion`, a chain with clipping, … `update` passes extra arguments on to it. Put
      `optax.MultiSteps` around the result: inside, c would come from one micro-batch.
    strength: λ ≥ 0, a number, a schedule of the step, or a budget that sets it (`within_budget`,
      `within_distance`). 0 is the inner optimizer, bit for bit. Up to 1 the distance never exceeds
      the distance of θ̃. If λ r is above 1, the layer goes past its anchor. If a schedule gives a
      negative number, infinity or NaN, no layer is held in that step.
    margin: m in [0, 1): a layer is held where c < m ‖g‖ ‖θ − θ_0‖. 0 is the paper's
      condition. It belongs to the default rule: with `rule` give it to that.
    rule: a `Rule` in place of `Projection`, the equations above; or `Projection` itself with
      `near`, which leaves a layer free until it is that many steps away.
    anchor, free, stack_axis, group, axis_name, anchor_dtype, anchor_memory_kind, anchor_ema: see
      `projection_decay`.

  Returns:
    A `ProjectionDecayOptimizer` whose state is a `WithProjectionDecayState`.

  Raises:
    ValueError, TypeError: as `projection_decay`.

  References:
    Tian et al., `Rethinking Weight Decay for Robust Fine-Tuning of Foundation
    Models <https://arxiv.org/abs/2411.01713>`_, 2024, equations 3, 4 and 9.

  Example:
    A gradient that turns while momentum carries on:

    >>> import jax.numpy as jnp, optax
    >>> import spd_optax as spd
    >>> params = jnp.array([1.0, -1.0])
    >>> optimizer = spd.with_projection_decay(optax.sgd(0.1, momentum=0.9))
    >>> state = optimizer.init(params)
    >>> for gradient in [-1.0, -1.0, 0.2]:
    ...   updates, state = optimizer.update(jnp.full(2, gradient), state, params)
    ...   params = optax.apply_updates(params, updates)
    ...   print(params, *optax.tree.get(state, 'condition').values())
    [ 1.1 -0.9] False
    [ 1.29 -0.71] False
    [ 1.29 -0.71] True
  """
  if not all(callable(getattr(optimizer, name, None)) for name in ('init', 'update')):
    raise TypeError(
      'with_projection_decay(optimizer, anchor): expected an optax optimizer first, such as '
      f'optax.adam(1e-3), found {checks.kind_of(optimizer)}'
    )
  if isinstance(optimizer, optax.MultiSteps):
    optimizer = optax.GradientTransformationExtraArgs(optimizer.init, optimizer.update)
  if isinstance(rule, GradientTurn):
    raise ValueError('rule: GradientTurn changes gradients; use projection_decay(rule=…)')
  engine = Engine(
    rules.chosen(rule, Projection, margin),
    strength,
    Anchoring(anchor, anchor_dtype, anchor_memory_kind, anchor_ema, free),
    Arrangement(stack_axis, group, axis_name),
  )
  around = _Around(engine, optax.with_extra_args_support(optimizer))
  return ProjectionDecayOptimizer(around.init, around.update)


def adam_spd(
  learning_rate: optax.ScalarOrSchedule,
  anchor: optax.Params | None = None,
  strength: optax.ScalarOrSchedule | Budget = 1.0,
  *,
  b1: chex.Numeric = 0.9,
  b2: chex.Numeric = 0.999,
  eps: chex.Numeric = 1e-8,
  eps_root: chex.Numeric = 0.0,
  mu_dtype: jax.typing.DTypeLike | None = None,
  nesterov: bool = False,
  margin: chex.Numeric = 0.0,
  rule: Rule | None = None,
  free: Patterns | None = None,
  stack_axis: StackAxis = None,
  group: Group = None,
  axis_name: AxisName = None,
  anchor_dtype: jax.typing.DTypeLike | None = None,
  anchor_memory_kind: str | None = None,
  anchor_ema: chex.Numeric | None = None,
) -> ProjectionDecayOptimizer:
  """The paper's Adam-SPD (Algorithm 1): `with_projection_decay` around `optax.adam`.

  Change ``optax.adam(lr)`` or ``optax.adamw(lr)`` to ``spd.adam_spd(lr)``.

  Args:
    learning_rate: a number or a schedule of the step.
    b1, b2, eps, eps_root, mu_dtype, nesterov: see `optax.adam`.
    anchor, strength, margin, rule, free: see `with_projection_decay`.
    stack_axis, group, axis_name, anchor_dtype, anchor_memory_kind, anchor_ema: see
      `projection_decay`.

  Returns:
    As `with_projection_decay`.

  Raises:
    ValueError, TypeError: as `with_projection_decay`.
  """
  checks.number_or_schedule('adam_spd(learning_rate, anchor): learning_rate', learning_rate)
  adam = optax.adam(learning_rate, b1, b2, eps, eps_root, mu_dtype, nesterov=nesterov)
  return with_projection_decay(
    adam,
    anchor,
    strength,
    margin=margin,
    rule=rule,
    free=free,
    stack_axis=stack_axis,
    group=group,
    axis_name=axis_name,
    anchor_dtype=anchor_dtype,
    anchor_memory_kind=anchor_memory_kind,
    anchor_ema=anchor_ema,
  )


@dataclasses.dataclass(frozen=True, eq=False)
class _Around:
  """An optimizer and SPD around it: shortens the steps of held layers."""

  engine: Engine
  inner: optax.GradientTransformationExtraArgs

  def init(self, params: optax.Params) -> WithProjectionDecayState:
    if not trees.is_placeholder(params):
      misuse.warn_of_optimizer(self.inner)
    return WithProjectionDecayState(self.engine.init(params), self.inner.init(params))

  def _decide(
    self, gradients: optax.Updates, state: optax.OptState, params: Any, extra_args: dict[str, Any]
  ) -> tuple[Step, optax.Updates, list[jax.Array], WithProjectionDecayState]:
    """The step, the inner optimizer's updates, θ̃ of the constrained leaves, the next state."""
    check_state(state, WithProjectionDecayState)
    view, layers = self.engine.view(gradients, state.projection_decay, params)
    updates, inner_state = self.inner.update(gradients, state.inner_state, params, **extra_args)
    leaves = trees.leaves_like(updates, view.flat, 'updates of the inner optimizer')
    moved = [_sum(p, leaves[i]) for i, p in zip(view.at, view.params, strict=True)]  # θ̃
    step, own = self.engine.decide(state.projection_decay, view, layers, extra_args, moved)
    return step, updates, moved, WithProjectionDecayState(own, inner_state)

  def update(
    self, updates: optax.Updates, state: optax.OptState, params: Any = None, **extra_args: Any
  ) -> tuple[optax.Updates, WithProjectionDecayState]:
    step, updates, _, state = self._decide(updates, state, params, extra_args)
    if not checks.is_zero(self.engine.strength):
      leaves = jax.tree.leaves(updates)
      own = [like_param(leaves[i], p) for i, p in zip(step.view.at, step.view.params, strict=True)]
      updates = replaced(updates, step, own, _shortened)
    return updates, state

  def apply(
    self, gradients: optax.Updates, state: optax.OptState, params: optax.Params, **extra_args: Any
  ) -> tuple[optax.Params, WithProjectionDecayState]:
    step, updates, moved, state = self._decide(gradients, state, params, extra_args)
    after = optax.apply_updates(params, updates)
    if not checks.is_zero(self.engine.strength):
      after = replaced(after, step, moved, _projected)
    return after, state


BARRIERS = ('cpu', 'tpu')


@jax.jit
def _sum(param: jax.Array, update: jax.Array) -> jax.Array:
  """θ̃ = θ + u, in float32 or wider."""
  param, update = fusion_barrier(param, update, platforms=('cpu',))
  return at_least_float32(param) + at_least_float32(update)


@_jit
def _shortened(update, param, anchor, active, scale, *, axis):  # type: ignore[no-untyped-def]
  """u − scale · (θ̃ − θ_0)."""
  update, active, scale = fusion_barrier(update, active, scale, platforms=BARRIERS)
  return taken_back(update, deviation(_sum(param, update), anchor), active, -scale, axis)


@_jit
def _projected(after, param, anchor, active, scale, *, axis):  # type: ignore[no-untyped-def]
  """θ̃ − scale · (θ̃ − θ_0), in the dtype of the param."""
  after, active, scale = fusion_barrier(after, active, scale, platforms=BARRIERS)
  shifted = taken_back(after, deviation(after, anchor), active, -scale, axis)
  return shifted.astype(param.dtype)
