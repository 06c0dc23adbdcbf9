"""The equations of Selective Projection Decay, one function each.

Every function works elementwise on values per layer: arrays of shape ``[]`` for an ordinary
layer and ``[L]`` for the ``L`` slices of a stacked one. θ are the weights, θ_0 the anchor,
d = θ − θ_0 the deviation, g the gradient and θ̃ the weights after the inner optimizer's step.
The caller supplies ``inner`` = ⟨g, d⟩, ``gradient_norm`` = ‖g‖, ``distance`` = ‖d‖ and
``distance_after`` = ‖θ̃ − θ_0‖.

Source: Tian, Huang, Kira, *Rethinking Weight Decay for Robust Fine-Tuning of
Foundation Models*, NeurIPS 2024, https://arxiv.org/abs/2411.01713.
"""

import chex
import jax
import jax.numpy as jnp


def divide(numerator: jax.Array, denominator: jax.Array) -> jax.Array:
  """numerator / denominator for denominator > 0, and 0 elsewhere; never 0/0."""
  positive = denominator > 0
  return jnp.where(positive, numerator / jnp.where(positive, denominator, 1), 0)


@jax.custom_jvp
def norm(square: jax.Array) -> jax.Array:
  """√square; its derivative at 0 is 0, not infinite."""
  return jnp.sqrt(square)


@norm.defjvp
def _norm_jvp(square: tuple[jax.Array], change: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
  root = norm(*square)
  return root, divide(*change, 2 * root)


def cosine(inner: jax.Array, gradient_norm: jax.Array, distance: jax.Array) -> jax.Array:
  """cos(g, d) = ⟨g, d⟩ / (‖g‖ ‖d‖), in [−1, 1], and 0 where a norm is 0."""
  # Two divisions: the product of two norms leaves float32 long before they do.
  return jnp.clip(divide(divide(inner, gradient_norm), distance), -1, 1)


def turned_back(inner: jax.Array) -> jax.Array:
  """The paper's condition, eq. 3 and 4: c < 0 with c = −⟨g, d⟩."""
  return inner > 0


def not_clearly_outward(
  inner: jax.Array, gradient_norm: jax.Array, distance: jax.Array, margin: chex.Numeric
) -> jax.Array:
  """The condition with a margin m in [0, 1): c < m ‖g‖ ‖d‖, that is cos(g, d) > −m.

  A layer moves freely only where −g points clearly away from the anchor. Never true where
  ‖g‖ or ‖d‖ is 0 or not finite, or m is out of its range. A square leaves float32 where its
  root leaves 1e-19 to 1e19; the cosine is then not known, and does not hold a layer.
  """
  threshold: jax.Array = margin * gradient_norm * distance
  measured = (gradient_norm > 0) & (distance > 0) & jnp.isfinite(gradient_norm + distance)
  known: jax.Array = measured & jnp.isfinite(threshold) & (margin >= 0) & (margin < 1)
  return (-inner < threshold) & known


def projection_ratio(distance: jax.Array, distance_after: jax.Array) -> jax.Array:
  """r = max(0, γ_t − γ_{t−1}) / γ_t, eq. 9, in [0, 1], and 0 where γ_t is 0 or not finite."""
  growth = jnp.maximum(distance_after - distance, 0)
  return divide(growth, jnp.where(jnp.isfinite(distance_after), distance_after, 0))


def pull(cos: jax.Array, margin: chex.Numeric) -> jax.Array:
  """φ = max(0, cos + m): the pull toward the anchor relative to ‖g‖, at strength 1."""
  return jnp.maximum(cos + margin, 0)
