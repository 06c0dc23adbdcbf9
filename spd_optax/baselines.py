"""Other ways to stay near the pre-trained weights, for comparison."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from spd_optax import anchors, checks
from spd_optax.anchors import Anchoring, Kind
from spd_optax.checks import NumberOrSchedule


class L2SPState(NamedTuple):
  """State of `l2_sp`.

  Attributes:
    count: int32[], updates so far.
    anchor: tree like the params: θ_0, or `optax.MaskedNode()` where none is stored.
  """

  count: jax.Array  # type: ignore[assignment]  # optax's name; hides tuple.count
  anchor: Any


def l2_sp(
  anchor: Any = None, strength: NumberOrSchedule = 0.01, *, anchor_dtype: Any = None
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
    anchor_dtype: dtype to store the anchor in; see `projection_decay`.

  Returns:
    A transformation whose state is an `L2SPState`.

  Raises:
    ValueError, TypeError: as `projection_decay`.

  References:
    Li, Grandvalet, Davoine, `Explicit Inductive Bias for Transfer Learning with
    Convolutional Networks <https://arxiv.org/abs/1802.01483>`_, 2018.

  Example:
    >>> import optax
    >>> import spd_optax as spd
    >>> optimizer = optax.chain(spd.l2_sp(strength=0.01), optax.adam(1e-3))
  """
  checks.number_or_schedule('strength', strength)
  anchoring = Anchoring(anchor, anchor_dtype)

  def init(params: Any) -> L2SPState:
    return L2SPState(jnp.zeros([], jnp.int32), anchoring.init(params))

  def update(
    updates: Any, state: L2SPState, params: Any = None, **extra_args: Any
  ) -> tuple[Any, L2SPState]:
    del extra_args
    checks.state(state, L2SPState)
    view = anchoring.view(updates, state.anchor, state.count, params)
    next_state = L2SPState(optax.safe_increment(state.count), view.stored)
    if checks.is_zero(strength):
      return updates, next_state
    strength_now = checks.at_step('strength', strength, state.count)
    leaves, treedef = jax.tree.flatten(updates)
    for i, gradient, deviation in zip(
      view.at, view.gradients, view.deviations(view.params), strict=True
    ):
      leaves[i] = (gradient + strength_now * deviation).astype(jnp.result_type(leaves[i]))
    return jax.tree.unflatten(treedef, leaves), next_state

  return optax.GradientTransformationExtraArgs(init, update)


def interpolate(anchor: Any, params: Any, alpha: float | jax.Array) -> Any:
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
  if anchor is None:
    raise TypeError('interpolate(anchor, params, alpha): the anchor must be given, not None')
  checks.alpha(alpha)
  flat = anchors.flat_params(params)

  def between(kind: Kind, start: Any, leaf: Any) -> Any:
    if kind is Kind.FREE:
      return leaf
    if isinstance(start, jax.ShapeDtypeStruct):
      raise TypeError('interpolate(anchor, params, alpha): the anchor has no values, only shapes')
    start = 0.0 if kind is Kind.ZERO else anchors.wide(start)
    mixed = (1 - alpha) * start + alpha * anchors.wide(leaf)
    return mixed.astype(jnp.result_type(leaf))

  pairs = Anchoring(anchor).resolve(flat)
  return jax.tree.unflatten(
    flat.treedef,
    [between(kind, start, leaf) for (kind, start), leaf in zip(pairs, flat.leaves, strict=True)],
  )
