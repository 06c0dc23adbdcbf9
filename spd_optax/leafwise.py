"""What is computed for one leaf.

Those that a step calls are jitted. So a second leaf of the same shape costs no second
trace, and a step without jit compiles nothing anew.
"""

import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp

from spd_optax import checks, placement
from spd_optax.layers import Sums, broadcast_to_leaf, sum_of


def at_least_float32(array: Any) -> jax.Array:
  """The array in float32 (complex64) or wider."""
  dtype = checks.dtype_of(array)
  return jnp.asarray(array, dtype if jnp.finfo(dtype).bits >= 32 else jnp.float32)


def like_param(update: Any, param: Any) -> jax.Array:
  """The gradient or update; complex where the param is."""
  dtype = checks.dtype_of(update)
  if jnp.iscomplexobj(param) and not jnp.issubdtype(dtype, jnp.complexfloating):
    dtype = jnp.promote_types(dtype, jnp.complex64)
  return jnp.asarray(update, dtype)


def deviation(param: jax.Array, anchor: jax.Array | None) -> jax.Array:
  """d = θ − θ_0, in float32 or wider; None is the zero anchor."""
  param = at_least_float32(param)
  return param if anchor is None else param - at_least_float32(anchor)


def _products(x: jax.Array, y: jax.Array) -> jax.Array:
  """The elementwise terms of the real inner product Re⟨x, y⟩."""
  if jnp.iscomplexobj(x):
    return x.real * y.real + x.imag * y.imag
  return x * y


@functools.partial(jax.jit, static_argnames=('stack_axis', 'needed'))
def sums(
  gradient: jax.Array,
  param: jax.Array,
  anchor: jax.Array | None,
  after: jax.Array | None,
  *,
  stack_axis: int | None,
  needed: tuple[str, ...],
) -> Sums:
  """⟨g, d⟩ as 'inner', and the squared norms that are needed, of one leaf."""
  # Each sum on a CPU computes d for itself.
  (alone,) = fusion_barrier(param, platforms=('cpu',))
  g, p = fusion_barrier(gradient, param, platforms=('cpu',))
  d, gradient = deviation(alone, anchor), at_least_float32(gradient)
  terms = {
    'inner': _products(at_least_float32(g), deviation(p, anchor)),
    'distance': _products(d, d),
  }
  if 'gradient_norm' in needed:
    terms['gradient_norm'] = _products(gradient, gradient)
  if 'anchor_norm' in needed:
    start = jnp.zeros_like(d) if anchor is None else at_least_float32(anchor)
    terms['anchor_norm'] = _products(start, start)
  if after is not None and 'after' in needed:
    d_after = deviation(after, anchor)
    terms['after'] = _products(d_after, d_after)
  if after is not None and 'step' in needed:
    step = after - at_least_float32(param)
    terms['step'] = _products(step, step)
  return {name: sum_of(x, stack_axis) for name, x in terms.items()}


@jax.jit
def followed(param: jax.Array, anchor: jax.Array, ema: chex.Numeric) -> jax.Array:
  """β θ_0 + (1 − β) θ; a param that is not finite is not followed, nor any with β out of [0, 1)."""
  anchor, param = at_least_float32(anchor), at_least_float32(param)
  follows = jnp.isfinite(param) & (ema >= 0) & (ema < 1)
  return jnp.where(follows, anchor + (1 - ema) * (param - anchor), anchor)


def taken_back(
  leaf: jax.Array, direction: jax.Array, active: jax.Array, scale: jax.Array, axis: int | None
) -> jax.Array:
  """leaf + scale · direction where the layer is held, and the leaf's own bits elsewhere."""
  active, scale = (broadcast_to_leaf(x, leaf, axis) for x in (active, scale))
  shifted = (at_least_float32(leaf) + scale * direction).astype(leaf.dtype)
  return jnp.where(active, shifted, leaf)


def fusion_barrier(*arrays: jax.Array, platforms: tuple[str, ...]) -> tuple[jax.Array, ...]:
  """The arrays, for a use of their own on these platforms.

  What XLA:CPU computes for two loops (d, say) it writes to a new buffer, whose pages cost more
  than computing it twice; behind a barrier nothing is shared. XLA:TPU, on the other hand,
  computes an optimizer's step twice unless a barrier keeps it on the chip. XLA:GPU does best
  without barriers.
  """
  branches = dict.fromkeys(platforms, jax.lax.optimization_barrier)
  # All results of one barrier vary over the mapped axes of any operand of it.
  apart = any(map(placement.is_shard, arrays))
  groups = [(array,) for array in arrays] if apart else [arrays]
  kept = [jax.lax.platform_dependent(x, **branches, default=tuple) for x in groups]
  return tuple(array for group in kept for array in group)
