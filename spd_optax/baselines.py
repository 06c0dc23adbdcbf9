"""Other ways to stay near the pre-trained weights, for comparison."""

import math
from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax

from spd_optax import anchors, checks
from spd_optax.anchors import Anchoring
from spd_optax.engine import Engine
from spd_optax.layers import Arrangement, AxisName, Group, StackAxis
from spd_optax.leafwise import at_least_float32
from spd_optax.projection_decay import link
from spd_optax.rules import L2SP


def l2_sp(
  anchor: optax.Params | None = None,
  strength: optax.ScalarOrSchedule = 0.01,
  *,
  stack_axis: StackAxis = None,
  group: Group = None,
  axis_name: AxisName = None,
  anchor_dtype: jax.typing.DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
  r"""L2-SP: decay toward the anchor, for every layer at every step.

      u' = u + λ (θ − θ_0)

  First in a chain it is the gradient of the penalty λ/2 ‖θ − θ_0‖² (coupled);
  behind `optax.scale_by_adam` and before the learning rate it is decoupled, as
  `optax.add_decayed_weights` is, whose place it takes:

      optax.chain(optax.scale_by_adam(), spd.l2_sp(anchor, 0.01),
                  optax.scale_by_learning_rate(lr))

  Args:
    anchor: θ_0, a tree like the params or a prefix of it; see `projection_decay`.
    strength: λ, a number ≥ 0 or a schedule of the step.
    stack_axis, group, axis_name, anchor_dtype: see `projection_decay`; layers are for the reports.

  Returns:
    A transformation whose state is a `ProjectionDecayState`, with every `condition`
    true where the gradient is finite.

  References:
    Li, Grandvalet, Davoine, `Explicit Inductive Bias for Transfer Learning with
    Convolutional Networks <https://arxiv.org/abs/1802.01483>`_, 2018.

  Example:
    >>> import optax
    >>> import spd_optax as spd
    >>> optimizer = optax.chain(spd.l2_sp(strength=0.01), optax.adam(1e-3))
  """
  arrangement = Arrangement(stack_axis, group, axis_name)
  return link(Engine(L2SP(), strength, Anchoring(anchor, anchor_dtype), arrangement))


def interpolate(anchor: optax.Params, params: optax.Params, alpha: chex.Numeric) -> optax.Params:
  r"""WiSE-FT: the weights between the anchor and the fine-tuned params.

      (1 − α) θ_0 + α θ

  Args:
    anchor: θ_0, a tree like the params or a prefix of it: arrays, 0 (zero), or
      None where there is no anchor (θ is kept).
    params: θ, the fine-tuned weights.
    alpha: α; 0 is the anchor, 1 the fine-tuned params, both exactly.

  Returns:
    A tree like `params`, computed in float32 or wider, in the dtypes of `params`.

  Raises:
    ValueError: naming every leaf where anchor and params do not fit.
    TypeError: if there is no anchor at all.

  References:
    Wortsman et al., `Robust fine-tuning of zero-shot models
    <https://arxiv.org/abs/2109.01903>`_, 2022.

  Example:
    >>> import jax.numpy as jnp
    >>> import spd_optax as spd
    >>> spd.interpolate({'w': jnp.zeros(2)}, {'w': jnp.ones(2)}, 0.5)
    {'w': Array([0.5, 0.5], dtype=float32)}
  """
  structs = (x for x in jax.tree.leaves(anchor) if isinstance(x, jax.ShapeDtypeStruct))
  if anchor is None or any(structs):
    raise TypeError('interpolate(anchor, params, alpha): expected an anchor with values')
  checks.scalar('alpha', alpha, 'a number', math.isfinite)
  flat = anchors.flat_params(params)

  def between(start: Any, leaf: Any) -> Any:
    if start is None:
      return leaf
    start = 0.0 if checks.is_zero(start) else at_least_float32(start)
    end = at_least_float32(leaf)
    mixed = (1 - alpha) * start + alpha * end
    # 0 · ∞ is NaN.
    exact = jnp.where(jnp.equal(alpha, 0), start, jnp.where(jnp.equal(alpha, 1), end, mixed))
    return exact.astype(checks.dtype_of(leaf))

  pairs = zip(Anchoring(anchor).checked(flat), flat.leaves, strict=True)
  return jax.tree.unflatten(flat.treedef, [between(start, leaf) for start, leaf in pairs])
