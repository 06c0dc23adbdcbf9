"""`apply` is `update` and `optax.apply_updates` in one."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import ADAM, ANCHORS, always, loop, make_step, noise, normal, trained

import spd_optax as spd


def steps(tx, params, state, gradients):
  """(params, state) before the first and after each step of `apply`."""

  def step(params, state, gradients):
    return tx.apply(gradients, state, params)

  return loop(jax.jit(step, donate_argnums=(0, 1)), params, state, gradients)


def around(anchor='captured', **options):
  return spd.with_projection_decay(ADAM, ANCHORS[anchor](normal(0)), **options)


OPTIONS = {
  'plain': {},
  'options': {'strength': 0.5, 'margin': 0.1},
  'group': {'group': lambda path: 'all'},
  'stacked': {'stack_axis': {'body': 0, 'head': None}},
  'schedule': {'strength': lambda count: 0.1 * count},
}


@pytest.mark.parametrize(
  ('anchor', 'options'),
  [
    pytest.param(anchor, OPTIONS[name], id=f'{anchor}-{name}', marks=marks)
    for anchor in ANCHORS
    for name in OPTIONS
    for marks in [() if name == 'plain' or anchor == 'captured' else pytest.mark.slow]
  ],
)
def test_it_is_update_and_apply_updates(anchor, options):
  """Catches θ where θ̃ belongs, a leaf that is left out, and a state that lags behind."""
  tx = around(anchor, **options)
  expected = loop(jax.jit(make_step(tx)), normal(0), tx.init(normal(0)), noise(0))[-1]
  found = steps(tx, normal(0), tx.init(normal(0)), noise(0))[-1]
  chex.assert_trees_all_close(found, expected, rtol=1e-5, atol=1e-6)
  if not options:  # one layer of all leaves at the zero anchor, say, never turns in this noise
    assert all(np.max(n) > 0 for n in optax.tree.get(found[1], 'constrained').values())


def test_strength_zero_is_the_inner_optimizer_bit_for_bit():
  """Catches arithmetic that is left over at λ = 0."""
  tx = around(strength=0)
  params, _ = steps(tx, normal(0), tx.init(normal(0)), noise(0))[-1]
  chex.assert_trees_all_equal(params, trained(always(ADAM))[-1][0])


def test_narrow_params_are_rounded_once():
  """Catches θ̃ that is rounded to bfloat16 before it is projected."""
  tx = spd.with_projection_decay(optax.identity(), 0)
  params = {'w': jnp.linspace(1, 2, 64, dtype=jnp.bfloat16)}
  gradients = jax.tree.map(lambda x: x / 64, params)  # uphill: θ̃ is longer, and held
  found, state = jax.jit(tx.apply)(gradients, tx.init(params), params)
  assert found['w'].dtype == jnp.bfloat16
  assert optax.tree.get(state, 'condition')['w']
  # λ = 1 projects θ (1 + 1/64) back onto the sphere of θ: to θ itself.
  chex.assert_trees_all_equal(found, params)


def test_extra_arguments_reach_the_inner_optimizer():
  """Catches an `apply` that drops arguments which `update` hands on."""
  inner = optax.GradientTransformationExtraArgs(
    lambda params: (), lambda g, s, p, *, factor: (jax.tree.map(lambda x: factor * x, g), s)
  )
  tx = spd.with_projection_decay(inner)
  params, _ = tx.apply(normal(1), tx.init(normal(0)), normal(0), factor=2.0)
  chex.assert_trees_all_close(params, jax.tree.map(lambda p, g: p + 2 * g, normal(0), normal(1)))
