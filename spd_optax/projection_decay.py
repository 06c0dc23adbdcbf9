"""Selective Projection Decay in its two forms: in a chain, and around an optimizer."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from spd_optax import checks, formulas, step
from spd_optax.anchors import Anchoring, wide
from spd_optax.checks import Number, NumberOrSchedule
from spd_optax.layers import AxisName, Group, StackAxis
from spd_optax.step import Decay, Norms, ProjectionDecayState


class WithProjectionDecayState(NamedTuple):
  """State of `with_projection_decay`.

  Attributes:
    projection_decay: its own `ProjectionDecayState`.
    inner_state: the inner optimizer's.
  """

  projection_decay: ProjectionDecayState
  inner_state: Any


class ProjectionDecayOptimizer(optax.GradientTransformationExtraArgs):  # type: ignore[misc]  # no py.typed
  """An optax optimizer that can write the params itself.

  ``params, state = optimizer.apply(gradients, state, params, **extra_args)`` is `update`
  and `optax.apply_updates` in one, θ̃ − λ r (θ̃ − θ_0) instead of θ + (u − λ r (θ̃ − θ_0)):
  equal but for rounding, and it stores no copy of the params on the way. On CPU it
  takes some 60 % of the time where the anchor is passed; elsewhere there is little between them.
  """

  apply: Callable[..., tuple[Any, Any]]


def projection_decay(
  anchor: Any = None,
  strength: NumberOrSchedule = 1.0,
  *,
  margin: Number = 0.05,
  stack_axis: StackAxis = None,
  group: Group = None,
  axis_name: AxisName = None,
  anchor_dtype: Any = None,
  anchor_memory_kind: str | None = None,
  anchor_ema: Number | None = None,
) -> optax.GradientTransformationExtraArgs:
  r"""Selective Projection Decay in gradient space, the first link of a chain.

  Per layer, with gradient g, deviation d = θ − θ_0 from the anchor,
  cos = ⟨g, d⟩ / (‖g‖ ‖d‖), strength λ and margin m:

      g' = g + λ (cos + m) ‖g‖ d / ‖d‖     where cos > −m
      g' = g                               otherwise

  A layer whose gradient points clearly away from the anchor (−g outward) moves
  freely; the gradient of any other is turned toward the anchor before the
  optimizer sees it. The rule is scale-free: multiplying the loss changes nothing
  but the scale of g', and ‖g'‖ ≤ (1 + λ (1 + m)) ‖g‖.

  This is *not* the paper's rule, which projects the optimizer's output; that is
  `with_projection_decay`. Change ``optax.adam(lr)`` to
  ``optax.chain(spd.projection_decay(), optax.adam(lr))``.

  Args:
    anchor: θ_0, a tree like the params or a prefix of it. An array leaf is the
      anchor of that param, `0` the zero anchor (nothing is stored), `None` at a
      leaf or subtree leaves it free, and a `jax.ShapeDtypeStruct` captures that param
      at the first update. `None` as a whole captures all, so that pre-trained weights
      may be put in after `init`. Arrays are copied into the state with the sharding
      of the params.
    strength: λ, a number ≥ 0 or a schedule of the step. 0 changes no bit, 0.3 is gentle, 1
      counts the homeward part of a turned gradient twice, 10 holds firmly.
    margin: m in [0, 1). 0 asks whether the gradient points back at all; a small
      margin, 0.05 or 0.1, also holds layers that walk out sideways, the more so the
      larger they are and the noisier their gradients.
    stack_axis: the axis that stacks layers in a leaf (nn.scan): an int, a prefix
      tree of ints and None, or ``(path, leaf) -> int | None``. Each slice is a
      layer.
    group: ``path -> key | None``; leaves with one key are one layer. Paths are
      '/'-joined, as in 'encoder/block_0/kernel'.
    axis_name: inside `shard_map` or `pmap`, the mapped axes over which one layer is
      split: a name, a tuple of names, or a prefix tree or function like
      `stack_axis` where leaves differ. Leave out an axis over which a leaf is
      replicated, or over which the layers of `stack_axis` are dealt out. Not
      needed under `jit`, where sums over sharded arrays are global.
    anchor_dtype: dtype to store the anchor in, such as `jnp.bfloat16`.
    anchor_memory_kind: 'pinned_host' keeps the anchor in the host's memory and streams
      it to the device in each step; a warning says where a backend has no such memory, as a CPU,
      and the anchor then stays on the device. None: the memory of the params.
    anchor_ema: β in [0, 1): the stored anchor follows the params slowly, θ_0 ← β θ_0 + (1 − β) θ
      after each step, θ the params before it, for streams that drift. An anchor of zero stays
      there. `drop_anchor` is then of no use: nothing but the state has the anchor. `reanchor`
      moves it all at once.

  Returns:
    A transformation whose state is a `ProjectionDecayState`.

  Raises:
    ValueError, TypeError: at construction for a bad `strength`, `margin`,
      `anchor_dtype` or `anchor_memory_kind`; in `init` and `update`, at trace time, for an anchor,
      gradients, `stack_axis` or `group` that do not fit the params. The message
      names every such leaf.

  References:
    Tian et al., `Rethinking Weight Decay for Robust Fine-Tuning of Foundation
    Models <https://arxiv.org/abs/2411.01713>`_, 2024, for the condition.

  Example:
    >>> import jax, jax.numpy as jnp, optax
    >>> import spd_optax as spd
    >>> pretrained = {'kernel': jnp.ones((2, 3)), 'bias': jnp.zeros(3)}
    >>> optimizer = optax.chain(spd.projection_decay(), optax.adam(1e-3))
    >>> state = optimizer.init(pretrained)
    >>> gradients = jax.tree.map(jnp.ones_like, pretrained)
    >>> updates, state = optimizer.update(gradients, state, pretrained)
    >>> params = optax.apply_updates(pretrained, updates)
    >>> optax.tree.get(state, 'condition')
    {'bias': Array(False, dtype=bool), 'kernel': Array(False, dtype=bool)}
  """
  decay = Decay(
    Anchoring(anchor, anchor_dtype, anchor_memory_kind, anchor_ema),
    strength,
    margin,
    stack_axis,
    group,
    axis_name,
  )

  def update(
    updates: Any, state: ProjectionDecayState, params: Any = None, **extra_args: Any
  ) -> tuple[Any, ProjectionDecayState]:
    del extra_args
    view, layers = decay.view(updates, state, params)
    strength_now = checks.at_step('strength', strength, state.count)

    def rule(condition: jax.Array, norms: Norms) -> tuple[jax.Array, jax.Array]:
      inner, size, distance = norms['inner'], norms['gradient_norm'], norms['distance']
      pull = formulas.pull(formulas.cosine(inner, size, distance), margin)
      ratio = jnp.where(condition, pull, 0)
      return ratio, strength_now * ratio * formulas.divide(size, distance)

    sums = decay.sums(view, layers, gradient_norm=view.gradients)
    decisions = decay.decide(state, layers, sums, rule)
    if not checks.is_zero(strength):
      updates = step.shift(view, layers, updates, decisions, lambda g, p, a: p - a, ['cpu'])
    return updates, decay.next_state(state, view, layers, decisions)

  return optax.GradientTransformationExtraArgs(decay.init, update)


def with_projection_decay(
  optimizer: optax.GradientTransformation,
  anchor: Any = None,
  strength: NumberOrSchedule = 1.0,
  *,
  margin: Number = 0.0,
  stack_axis: StackAxis = None,
  group: Group = None,
  axis_name: AxisName = None,
  anchor_dtype: Any = None,
  anchor_memory_kind: str | None = None,
  anchor_ema: Number | None = None,
) -> ProjectionDecayOptimizer:
  r"""The paper's Selective Projection Decay, exactly, around any complete optimizer.

  Per layer, with raw gradient g, the inner optimizer's whole update u (learning
  rate included), anchor θ_0 and strength λ:

      θ̃ = θ + u
      c = −⟨g, θ − θ_0⟩
      r = max(0, ‖θ̃ − θ_0‖ − ‖θ − θ_0‖) / ‖θ̃ − θ_0‖
      θ ← θ̃ − λ r (θ̃ − θ_0)     where c < 0
      θ ← θ̃                      otherwise

  c < 0 says that the loss wants to go back toward the anchor, r > 0 that the
  optimizer's momentum still carries the layer away from it; such a layer is
  held. λ = 1 projects it onto the sphere that it stood on. λ is not multiplied
  by the learning rate. On a smooth problem without noise or a change of
  direction it never acts.

  Change ``optimizer`` to ``spd.with_projection_decay(optimizer)``; SPD replaces
  weight decay.

  Args:
    optimizer: the inner optimizer, complete with its learning rate: `optax.adam`,
      `optax.lion`, a chain with clipping, … Extra arguments of `update` reach it.
      `optax.MultiSteps` belongs around the result: within, c would be of one micro-batch.
    anchor: θ_0, a tree like the params or a prefix of it; see `projection_decay`.
    strength: λ, a number ≥ 0 or a schedule of the step. 0 is the inner optimizer,
      bit for bit. Up to 1 the distance never exceeds that of θ̃; where λ r is above 1 the
      layer goes past its anchor.
    margin: m in [0, 1): a layer is held where c < m ‖g‖ ‖θ − θ_0‖. 0 is the paper's
      condition.
    stack_axis: the axis that stacks layers in a leaf; see `projection_decay`.
    group: which leaves are one layer; see `projection_decay`.
    axis_name: mapped axes that the leaves are sharded over; see `projection_decay`.
    anchor_dtype: dtype to store the anchor in; see `projection_decay`.
    anchor_memory_kind: see `projection_decay`.
    anchor_ema: see `projection_decay`.

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
  checks.optimizer(optimizer)
  if isinstance(optimizer, optax.MultiSteps):
    optimizer = optax.GradientTransformationExtraArgs(optimizer.init, optimizer.update)
  inner = optax.with_extra_args_support(optimizer)
  decay = Decay(
    Anchoring(anchor, anchor_dtype, anchor_memory_kind, anchor_ema),
    strength,
    margin,
    stack_axis,
    group,
    axis_name,
  )

  def init(params: Any) -> WithProjectionDecayState:
    return WithProjectionDecayState(decay.init(params), inner.init(params))

  def decide(gradients: Any, state: Any, params: Any, extra_args: Any, *later: str) -> Any:
    checks.state(state, WithProjectionDecayState)
    own = state.projection_decay
    view, layers = decay.view(gradients, own, params)
    try:
      updates, inner_state = inner.update(gradients, state.inner_state, params, **extra_args)
    except Exception:
      checks.inner_state(state.inner_state, jax.eval_shape(inner.init, params))
      raise
    steps = jax.tree.leaves(updates)
    moved = [p + wide(steps[i]) for i, p in zip(view.at, view.params, strict=True)]  # θ̃
    strength_now = checks.at_step('strength', strength, own.count)

    def rule(condition: jax.Array, norms: Norms) -> tuple[jax.Array, jax.Array]:
      del condition
      ratio = formulas.projection_ratio(norms['distance'], norms['after'])
      return ratio, -strength_now * ratio

    sums = decay.sums(view, layers, *later, after=view.deviations(moved))
    decisions = decay.decide(own, layers, sums, rule)
    own = decay.next_state(own, view, layers, decisions)
    return view, layers, updates, moved, decisions, WithProjectionDecayState(own, inner_state)

  def update(
    updates: Any, state: WithProjectionDecayState, params: Any = None, **extra_args: Any
  ) -> tuple[Any, WithProjectionDecayState]:
    view, layers, updates, _, decisions, state = decide(updates, state, params, extra_args)
    if not checks.is_zero(strength):
      updates = step.shift(
        view, layers, updates, decisions, lambda u, p, a: (p + u) - a, ['cpu', 'tpu']
      )
    return updates, state

  def apply(
    gradients: Any, state: WithProjectionDecayState, params: Any, **extra_args: Any
  ) -> tuple[Any, WithProjectionDecayState]:
    # Once the other sums are known θ is not read again, and may be overwritten with θ̃.
    view, layers, updates, moved, decisions, state = decide(
      gradients, state, params, extra_args, 'after'
    )
    after = optax.apply_updates(params, updates)
    if checks.is_zero(strength):
      return after, state
    leaves, treedef = jax.tree.flatten(after)
    for i, leaf in zip(view.at, moved, strict=True):
      leaves[i] = leaf  # not yet rounded to a narrow dtype
    whole = jax.tree.unflatten(treedef, leaves)
    shifted = step.shift(view, layers, whole, decisions, lambda t, p, a: t - a, ['cpu', 'tpu'])
    return jax.tree.map(lambda t, p: t.astype(p.dtype), shifted, after), state

  whole: ProjectionDecayOptimizer = ProjectionDecayOptimizer(init, update)
  whole.apply = apply
  return whole
