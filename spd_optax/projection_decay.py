"""Selective Projection Decay of the gradients, as a link of a chain; and L2-SP, its peer."""

import functools
from typing import Any

import chex
import jax
import optax

from spd_optax import checks, misuse, rules, trees
from spd_optax.anchors import Anchoring
from spd_optax.budgets import Budget
from spd_optax.engine import Engine, ProjectionDecayState, replaced
from spd_optax.layers import Arrangement, AxisName, Group, StackAxis
from spd_optax.leafwise import deviation, fusion_barrier, taken_back
from spd_optax.patterns import Patterns
from spd_optax.rules import L2SP, GradientTurn, Rule


def projection_decay(
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
) -> optax.GradientTransformationExtraArgs:
  r"""Selective Projection Decay of the gradients: the first transformation of a chain.

  Per layer, with gradient g, deviation d = θ − θ_0 from the anchor,
  cos = ⟨g, d⟩ / (‖g‖ ‖d‖), strength λ and margin m:

      g' = g + λ (cos + m) ‖g‖ d / ‖d‖     where cos > −m
      g' = g                               otherwise

  A layer moves freely while −g points away from the anchor. The gradient of any other layer is
  turned toward the anchor before the optimizer sees it. With m = 0, the default, it is

      g' = g + λ max(0, ⟨g, d⟩) d / ‖d‖²

  which has no term that grows with the size of a layer. The rule is scale-free:
  multiplying the loss changes only the scale of g', and ‖g'‖ ≤ (1 + λ (1 + m)) ‖g‖.

  With Adam at a constant learning rate, a layer in a narrow valley circles and never comes to rest.
  The gradient across the valley changes sign, and is turned in 40 to 50 % of the steps. On
  Rosenbrock's function the layer stays 4 to 10 learning rates away from the minimum for three
  million steps. With a rate that decays to 0 it comes to within 1e-5, as Adam does.
  `SignificantProjection` and the paper's rule, around Adam, come to within a tenth of a learning
  rate.

  This is *not* the paper's rule, which projects the optimizer's output. `with_projection_decay`
  is the paper's rule. Change ``optax.adam(lr)`` to
  ``optax.chain(spd.projection_decay(), optax.adam(lr))``.

  Args:
    anchor: θ_0, a tree like the params or a prefix of it. An array leaf is the
      anchor of that param. `0` is the zero anchor, for which nothing is stored. `None` at a
      leaf or subtree leaves it free. A `jax.ShapeDtypeStruct` captures that param at the first
      update. `None` for the whole tree captures all params, so you may load the pre-trained weights
      after `init`. Arrays are copied into the state with the sharding of the params.
    strength: λ ≥ 0, a number, a schedule of the step, or a budget that sets it (`within_budget`,
      `within_distance`). 0 changes no bit, 0.3 is gentle, 1 doubles the part of a turned gradient
      that pulls toward the anchor, 10 holds firmly. If a schedule gives a negative number, infinity
      or NaN, no layer is held in that step.
    margin: m in [0, 1). 0 holds a layer if −g points back at all. A small margin, 0.05 or 0.1, also
      holds layers that move out sideways. The same margin is firmer for a larger layer and for
      noisier gradients. It belongs to the default rule: with `rule` give it to that.
    rule: a `Rule` in place of `GradientTurn`, the equation above.
    free: a pattern, or a list of patterns, of leaves that are never held, such as a new head. It
      overrides the anchor, which may lack them. A pattern matches whole names, anywhere in a
      '/'-joined path, and everything below: 'head' matches 'params/head/kernel' and does not match
      'overhead/kernel'. Within a name '*', '?' and '[ab]' work as in a shell. '**' matches any
      number of names. A leading '/' is the root.
    stack_axis: the axis that stacks layers in a leaf (nn.scan): an int, a prefix
      tree of ints and None, ``(path, leaf) -> int | None``, or patterns by axis, as in
      ``{0: ['encoder/layers', 'decoder/layers']}``. Each slice is a layer.
    group: ``path -> key | None``; leaves with the same key, a string or an int, are one layer.
      Paths are '/'-joined, as in 'encoder/block_0/kernel'. 1 and '1' are the same key. A leaf with
      None is a layer of its own. Or patterns: all leaves below a path that a pattern matches are
      one layer. 'block_*' makes one layer of each block, with a key such as 'encoder/block_0'. The
      first pattern that matches counts.
    axis_name: inside `shard_map` or `pmap`, the mapped axes over which one layer is
      split: a name, a tuple of names, or, if leaves differ, a prefix tree or function as in
      `stack_axis`. Leave out an axis over which a leaf is replicated, or over which the layers of
      `stack_axis` are distributed. Under `jit` nothing is needed, because sums over sharded arrays
      are global there.
    anchor_dtype: dtype to store the anchor in, such as `jnp.bfloat16`.
    anchor_memory_kind: 'pinned_host' keeps the anchor in the host's memory and streams
      it to the device in each step. A backend without such memory, such as a CPU, warns, and the
      anchor stays on the device. None is the memory of the params.
    anchor_ema: β in [0, 1), for data that drifts. After each step the anchor follows the params
      slowly: θ_0 ← β θ_0 + (1 − β) θ, where θ is the params before the step. A zero anchor does not
      move. Do not use `drop_anchor` then: only the state has the anchor. `reanchor` moves an anchor
      all at once.

  Returns:
    A transformation whose state is a `ProjectionDecayState`.

  Raises:
    ValueError, TypeError: for a bad argument; in `init` and `update`, at trace time, for trees
      that do not fit the params. The message names every such leaf.

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
  return _link(
    Engine(
      rules.chosen(rule, GradientTurn, margin),
      strength,
      Anchoring(anchor, anchor_dtype, anchor_memory_kind, anchor_ema, free),
      Arrangement(stack_axis, group, axis_name),
    )
  )


def l2_sp(
  anchor: optax.Params | None = None,
  strength: optax.ScalarOrSchedule | Budget = 0.01,
  *,
  free: Patterns | None = None,
  stack_axis: StackAxis = None,
  group: Group = None,
  axis_name: AxisName = None,
  anchor_dtype: jax.typing.DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
  r"""L2-SP: decay toward the anchor, for every layer at every step.

      u' = u + λ (θ − θ_0)

  First in a chain it is the gradient of the penalty λ/2 ‖θ − θ_0‖² (coupled). Behind
  `optax.scale_by_adam` and before the learning rate it is decoupled. There it takes the place of
  `optax.add_decayed_weights`.

  Args:
    strength: λ ≥ 0, a number, a schedule of the step, or a budget that sets it.
    anchor, free, stack_axis, group, axis_name, anchor_dtype: see `projection_decay`. Layers matter
      only for the reports.

  Returns:
    A transformation whose state is a `ProjectionDecayState`, with every `condition`
    true where the gradient is finite.

  Raises:
    ValueError, TypeError: as `projection_decay`.

  References:
    Li, Grandvalet, Davoine, `Explicit Inductive Bias for Transfer Learning with
    Convolutional Networks <https://arxiv.org/abs/1802.01483>`_, 2018.
  """
  arrangement = Arrangement(stack_axis, group, axis_name)
  return _link(Engine(L2SP(), strength, Anchoring(anchor, anchor_dtype, free=free), arrangement))


def _link(engine: Engine) -> optax.GradientTransformationExtraArgs:
  """A link of a chain that changes the gradients of held layers."""
  if unseen := sorted({'after', 'step'} & set(engine.rule.needs)):
    raise ValueError(
      f'rule: {type(engine.rule).__name__} needs {unseen}, which a link of a chain never sees; '
      'use with_projection_decay(optimizer, rule=…)'
    )

  place = misuse.LinkCheck(engine.rule)

  def update(
    updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra_args: Any
  ) -> tuple[optax.Updates, ProjectionDecayState]:
    place.at_update(updates)
    step, state = engine.decide(state, *engine.view(updates, state, params), extra_args)
    if not checks.is_zero(engine.strength):
      updates = replaced(updates, step, step.view.gradients, _turned_back)
    return updates, state

  def init(params: optax.Params) -> ProjectionDecayState:
    if not trees.is_placeholder(params):
      place.at_init()
    return engine.init(params)

  return optax.GradientTransformationExtraArgs(init, update)


@functools.partial(jax.jit, static_argnames='axis')
def _turned_back(gradient, param, anchor, active, scale, *, axis):  # type: ignore[no-untyped-def]
  """g + scale · d."""
  gradient, active, scale = fusion_barrier(gradient, active, scale, platforms=('cpu',))
  return taken_back(gradient, deviation(param, anchor), active, scale, axis)
