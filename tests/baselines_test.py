"""L2-SP and WiSE-FT against NumPy."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from reference import x64

import spd_optax as spd

RATE, STRENGTH, STEPS = 0.1, 0.3, 6


def trees(*seeds: int) -> list[dict[str, np.ndarray]]:
  """Random leaves: one anchored, one with the zero anchor, one free."""
  rngs = [np.random.default_rng(seed) for seed in seeds]
  return [{name: rng.standard_normal((2, 3)) for name in ('array', 'zero', 'free')} for rng in rngs]


def toward(params: Any, start: np.ndarray) -> dict[str, Any]:
  """d = θ − θ_0 for the anchor {'array': start, 'zero': 0, 'free': None}."""
  return {'array': params['array'] - start, 'zero': params['zero'], 'free': 0.0}


def run(tx: optax.GradientTransformation, params: Any) -> Any:
  with x64():
    params = jax.tree.map(jnp.asarray, params)
    state, update = tx.init(params), jax.jit(tx.update)
    for gradients in trees(*range(STEPS)):
      updates, state = update(gradients, state, params)
      params = optax.apply_updates(params, updates)
    return jax.tree.map(np.asarray, params)


def adam(gradients: np.ndarray, m: Any, v: Any, t: int) -> tuple[Any, Any, Any]:
  """Adam's direction by hand, with optax's default constants."""
  m, v = 0.9 * m + 0.1 * gradients, 0.999 * v + 0.001 * gradients**2
  return m, v, (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)


def by_hand(params: Any, start: np.ndarray, coupled: bool) -> Any:
  m = v = dict.fromkeys(params, 0.0)
  for t, gradients in enumerate(trees(*range(STEPS)), 1):
    deviation, after, m, v = toward(params, start), {}, dict(m), dict(v)
    for name, theta in params.items():
      decay = STRENGTH * deviation[name]
      g = gradients[name] + (decay if coupled else 0)
      m[name], v[name], direction = adam(g, m[name], v[name], t)
      after[name] = theta - RATE * (direction + (0 if coupled else decay))
    params = after
  return params


@pytest.mark.parametrize('coupled', [True, False])
def test_l2_sp_by_hand(coupled: bool) -> None:
  """Catches a decay that is scaled twice by the learning rate, has the wrong sign or centre."""
  params, start = trees(10, 11)
  l2_sp = spd.l2_sp({'array': start['array'], 'zero': 0, 'free': None}, STRENGTH)
  tx = {
    True: optax.chain(l2_sp, optax.adam(RATE)),
    False: optax.chain(optax.scale_by_adam(), l2_sp, optax.scale_by_learning_rate(RATE)),
  }[coupled]
  expected = by_hand(params, start['array'], coupled)
  chex.assert_trees_all_close(run(tx, params), expected, rtol=1e-12)


def test_l2_sp_first_is_the_gradient_of_the_penalty() -> None:
  """Catches a missing factor: λ/2 ‖θ − θ_0‖² has the gradient λ (θ − θ_0)."""
  params, start, gradients = (jax.tree.map(jnp.float32, tree) for tree in trees(0, 1, 2))

  def penalty(params: Any) -> Any:
    return STRENGTH / 2 * sum(jnp.sum((params[name] - start[name]) ** 2) for name in params)

  tx = spd.l2_sp(start, STRENGTH)
  found, _ = tx.update(gradients, tx.init(params), params)
  expected = optax.tree.add(gradients, jax.grad(penalty)(params))
  chex.assert_trees_all_close(found, expected, rtol=1e-6)


def test_l2_sp_to_zero_is_weight_decay() -> None:
  """Catches a decoupled L2-SP that cannot take the place of `optax.add_decayed_weights`."""
  params = trees(4)[0]
  behind = [optax.scale_by_adam(), optax.scale_by_learning_rate(RATE)]
  chex.assert_trees_all_close(
    run(optax.chain(behind[0], spd.l2_sp(0, STRENGTH), behind[1]), params),
    run(optax.adamw(RATE, weight_decay=STRENGTH), params),
    rtol=1e-12,
  )


def test_l2_sp_captures_the_anchor_and_reads_the_schedule() -> None:
  """Catches an anchor from `init`, one that follows the params, and a schedule off by one."""
  params, other = (jax.tree.map(jnp.float32, tree) for tree in trees(5, 6))
  tx = spd.l2_sp(None, lambda count: 10.0 * count)
  zeros = jax.tree.map(jnp.zeros_like, params)
  updates, state = tx.update(zeros, tx.init(other), params)
  chex.assert_trees_all_equal(updates, zeros)
  chex.assert_trees_all_equal(state.anchor, params)
  for count in (1, 2):
    assert state.count == count
    updates, state = tx.update(zeros, state, other)
    expected = jax.tree.map(lambda p, q, c=count: 10 * c * (p - q), other, params)
    chex.assert_trees_all_close(updates, expected, rtol=1e-6)
  chex.assert_trees_all_equal(state.anchor, params)


def test_l2_sp_adds_in_float32_whatever_the_params() -> None:
  """Catches a deviation, or a sum with the gradient, that is rounded to bfloat16 on the way.

  With the anchor in float32 and everything else in bfloat16: d = 2^-10 would be lost.
  """
  params, gradients = (jnp.ones(2, jnp.bfloat16) * x for x in (1.0, 2.0**-9))
  tx = spd.l2_sp(jnp.full(2, 1 - 2**-10, jnp.float32), 1.0, anchor_dtype=jnp.float32)
  found, state = tx.update(gradients, tx.init(params), params)
  assert (found.dtype, state.anchor.dtype) == (jnp.bfloat16, jnp.float32)
  np.testing.assert_array_equal(np.float32(found), 2.0**-9 + 2.0**-10)


@given(st.floats(0, 1))
def test_interpolate_by_hand(alpha: float) -> None:
  """Catches swapped weights, and leaves without an anchor that are moved anyway."""
  params, start = trees(7, 8)
  with x64():
    found = spd.interpolate({'array': start['array'], 'zero': 0, 'free': None}, params, alpha)
    traced = jax.jit(spd.interpolate)(start, params, alpha)
  expected = {
    'array': (1 - alpha) * start['array'] + alpha * params['array'],
    'zero': alpha * params['zero'],
    'free': params['free'],
  }
  chex.assert_trees_all_close(found, expected, rtol=1e-12, atol=1e-15)
  expected = jax.tree.map(lambda a, p: (1 - alpha) * a + alpha * p, start, params)
  chex.assert_trees_all_close(traced, expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize('dtype', [jnp.bfloat16, jnp.float16, jnp.float32, jnp.complex64])
def test_interpolate_is_exact_at_both_ends(dtype: Any) -> None:
  """Catches θ + (1 − α)(θ_0 − θ), which misses θ_0 by rounding, and dtypes that change."""
  params, start = (jax.tree.map(lambda x: jnp.asarray(x, dtype), tree) for tree in trees(1, 2))
  chex.assert_trees_all_equal(spd.interpolate(start, params, 0), start)
  chex.assert_trees_all_equal(spd.interpolate(start, params, 1), params)
  chex.assert_trees_all_equal_dtypes(spd.interpolate(start, params, jnp.float32(0.5)), params)


def test_interpolate_at_an_end_ignores_the_other() -> None:
  """Catches 0 · ∞, which is NaN."""
  odd, even = {'w': jnp.array([jnp.inf, jnp.nan])}, {'w': jnp.array([1.0, 2.0])}
  np.testing.assert_array_equal(spd.interpolate(odd, even, 1.0)['w'], even['w'])
  np.testing.assert_array_equal(spd.interpolate(even, odd, 0.0)['w'], even['w'])


def test_interpolate_computes_in_float32() -> None:
  """Catches α rounded to the params' dtype: 0.999 is 1 in bfloat16."""
  start, params = jnp.full(3, 256.0, jnp.bfloat16), jnp.zeros(3, jnp.bfloat16)
  found = spd.interpolate(start, params, 0.999)
  np.testing.assert_array_equal(found, jnp.full(3, 0.256, jnp.bfloat16))


def test_interpolate_keeps_integers_and_empty_leaves() -> None:
  """Catches a step counter among the params that comes back as a mixture, or a float."""
  params = {'steps': jnp.int32(7), 'none': None, 'empty': jnp.zeros((0, 2)), 'w': jnp.ones(2)}
  start = {'steps': jnp.int32(3), 'none': None, 'empty': jnp.zeros((0, 2)), 'w': jnp.zeros(2)}
  found = spd.interpolate(start, params, 0.25)
  chex.assert_trees_all_equal(found, {**params, 'w': jnp.full(2, 0.25)})
  chex.assert_trees_all_equal_dtypes(found, params)


def test_interpolate_from_the_anchor_of_a_state() -> None:
  """Catches a narrow anchor that is refused, and a leaf without one that has no name."""
  params = {'w': jnp.full(2, 2.0), 'b': jnp.ones(3)}
  tx = spd.adam_spd(1e-3, free='b', anchor_dtype=jnp.bfloat16)
  anchor = optax.tree.get(tx.init(params), 'anchor')
  with pytest.raises(ValueError, match=r'b: found MaskedNode; pass 0 .*None if the leaf is free'):
    spd.interpolate(anchor, params, 0.5)
  found = spd.interpolate({**anchor, 'b': None}, {**params, 'w': jnp.zeros(2)}, 0.25)
  chex.assert_trees_all_equal(found, {**params, 'w': jnp.full(2, 1.5)})
  with pytest.raises(ValueError, match='w: anchor int32'):
    spd.interpolate({'w': jnp.ones(2, int), 'b': 0}, params, 0.5)


@pytest.mark.parametrize('shape', [(), (0, 2), (2,)])
def test_interpolate_needs_values(shape: tuple[int, ...]) -> None:
  """Catches a struct without a length that ends in another error."""
  struct = jax.ShapeDtypeStruct(shape, jnp.float32)
  with pytest.raises(TypeError, match='expected an anchor with values'):
    spd.interpolate({'w': struct}, {'w': jnp.ones(shape)}, 0.5)
