"""bfloat16 params lose SPD's corrections; float32 params with a bfloat16 anchor keep them.

A bfloat16 checkpoint of weights near 0.02 meets noisy gradients, whose minimum swings
out and home, so that conditions turn on and off. Adam moves up to 1e-4 a step, where
bfloat16 numbers stand 1.2e-4 apart.
"""

import functools
import warnings
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import spd_optax as spd

# A warning at init that says what these tests show is no failure here.
pytestmark = pytest.mark.filterwarnings('ignore:.*bfloat16:UserWarning')

BF16 = jnp.bfloat16
LEARNING_RATE, STEPS, SEEDS, TRAVEL = 1e-4, 300, 4, 3e-3


class Recipe(NamedTuple):
  params: Any = jnp.float32  # the dtype in which they are stored,
  compute: Any = jnp.float32  # in which the loss sees them,
  anchor: Any = None  # of the anchor
  mu: Any = None  # and of Adam's first moment


EXACT, PURE, MASTER = Recipe(), Recipe(BF16, BF16), Recipe(jnp.float32, BF16, BF16)
MASTER_MU = MASTER._replace(mu=BF16)


def form1(recipe: Recipe, anchor: Any = None, stack_axis: Any = None) -> Any:
  options = {'anchor_dtype': recipe.anchor, 'stack_axis': stack_axis}
  link = spd.projection_decay(anchor, strength=10.0, margin=0.1, **options)
  return optax.chain(link, optax.adam(LEARNING_RATE, mu_dtype=recipe.mu))


def form2(recipe: Recipe, anchor: Any = None, stack_axis: Any = None) -> Any:
  options = {'anchor_dtype': recipe.anchor, 'stack_axis': stack_axis}
  return spd.adam_spd(LEARNING_RATE, anchor, mu_dtype=recipe.mu, **options)


FORMS = pytest.mark.parametrize('form', [form1, form2])


@functools.cache
def trained(form: Any, recipe: Recipe) -> Any:
  """Per seed: the checkpoint, the trained params, SPD's reports by step; two stacked layers."""
  tx = form(recipe, stack_axis=0)

  def run(seed: jax.Array) -> Any:
    start, goal, noise = jax.random.split(jax.random.key(seed), 3)
    start, goal = (jax.random.normal(key, (2, 512)) for key in (start, goal))
    checkpoint = (0.02 * start).astype(BF16)

    def loss(weights: Any, i: jax.Array) -> jax.Array:
      target = checkpoint + TRAVEL * (0.6 + 0.4 * jnp.sin(2 * jnp.pi * i / 60)) * goal
      slope = jax.random.normal(jax.random.fold_in(noise, i), goal.shape)
      return jnp.sum((weights - target) ** 2) / (2 * TRAVEL) + jnp.vdot(weights, slope)

    def step(carry: Any, i: jax.Array) -> Any:
      params, state = carry
      gradients = jax.grad(lambda p: loss(optax.tree.cast(p, recipe.compute), i))(params)
      updates, state = tx.update(gradients, state, params)
      reports = [optax.tree.get(state, key)[''] for key in ('condition', 'ratio', 'distance')]
      return (optax.apply_updates(params, updates), state), reports

    params = checkpoint.astype(recipe.params)
    carry, reports = jax.lax.scan(step, (params, tx.init(params)), jnp.arange(STEPS))
    return *optax.tree.cast((checkpoint, carry[0]), jnp.float32), reports

  return jax.tree.map(np.asarray, jax.jit(jax.vmap(run))(jnp.arange(SEEDS)))


def norm(x: np.ndarray) -> np.ndarray:
  return np.sqrt((x**2).sum((1, 2)))


@FORMS
def test_only_float32_params_follow_the_float32_run(form: Any) -> None:
  """Catches a recipe that drifts, and a warning about bfloat16 params without a ground."""
  start, exact, (held, *_) = trained(form, EXACT)
  assert 0.1 < held.mean() < 0.9

  def drift(recipe: Recipe) -> np.ndarray:
    return norm(trained(form, recipe)[1] - exact) / norm(start - exact)

  assert min(drift(PURE)) > 0.2
  assert max(drift(MASTER)) < 0.03
  assert max(drift(MASTER_MU)) < 0.1


def test_a_held_layer_stays_on_its_sphere_only_in_float32() -> None:
  """Catches a held layer that moves in or out, and a ratio of another step than was taken."""
  errors = {}
  for recipe in (EXACT, MASTER, PURE):
    start, _, (held, ratio, distance) = trained(form2, recipe)
    held, ratio, before, after = held[:, :-1], ratio[:, :-1], distance[:, :-1], distance[:, 1:]
    outward = (ratio > 0) & (ratio < 1)  # 1: the first step from the anchor
    assert (held & outward).sum((1, 2)).min() > 50
    reported = np.where(held, before, before / np.where(outward, 1 - ratio, 1))
    rounding = float(jnp.finfo(jnp.float32).eps) * norm(start)
    for kind, steps in (('held', held & outward), ('free', ~held & outward)):
      errors[recipe, kind] = np.where(steps, abs(after - reported), 0).max((1, 2)) / rounding
  for kind in ('held', 'free'):
    assert max(*errors[EXACT, kind], *errors[MASTER, kind]) < 1
    assert min(errors[PURE, kind]) > 100


@FORMS
def test_a_bfloat16_anchor_changes_no_bit_of_the_run(form: Any) -> None:
  """Catches an anchor that is rounded, and a step that depends on the dtype it is kept in."""
  chex.assert_trees_all_equal(*(trained(form, MASTER._replace(anchor=a)) for a in (BF16, None)))


@FORMS
@pytest.mark.parametrize('given', [None, 'bfloat16', 'float32'])
def test_every_bfloat16_number_is_stored_exactly(given: str | None, form: Any) -> None:
  """Catches an anchor that goes through float16, or loses −0, subnormal or large numbers."""
  numbers = np.arange(2**16, dtype=np.uint16).view(BF16).astype(np.float32)
  params = numbers[np.isfinite(numbers)]
  tx = form(MASTER, None if given is None else params.astype(given))
  state = tx.init(jnp.asarray(params))
  for _ in range(2):
    stored = optax.tree.get(state, 'anchor')
    assert stored.dtype == BF16
    assert np.asarray(stored).tobytes() == params.astype(BF16).tobytes()
    _, state = jax.jit(tx.update)(jnp.ones(params.shape), state, jnp.asarray(params))


BYTES = {EXACT: (4, 4, 4, 4), PURE: (2, 2, 2, 2), MASTER: (4, 2, 4, 4), MASTER_MU: (4, 2, 2, 4)}


@FORMS
@pytest.mark.parametrize('recipe', BYTES)
def test_bytes_per_parameter(recipe: Recipe, form: Any) -> None:
  """Catches a second copy of the weights in the state, or one in a wider dtype."""
  params = jax.ShapeDtypeStruct((1000, 1000), recipe.params)
  state = jax.eval_shape(form(recipe).init, params)
  parts = [params, *(optax.tree.get(state, key) for key in ('anchor', 'mu', 'nu'))]
  assert tuple(part.dtype.itemsize for part in parts) == BYTES[recipe]
  total = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((params, state)))
  assert 0 <= total - 10**6 * sum(BYTES[recipe]) < 50  # one layer's flags, and counts


@pytest.mark.parametrize(('dtype', 'percent'), [('bfloat16', '0.2'), ('float16', '0.024')])
@pytest.mark.parametrize('make', [spd.projection_decay, spd.with_projection_decay])
def test_a_warning_names_the_first_narrow_param(make, dtype, percent):
  """Catches silence where steps will be lost."""
  arguments = (optax.adam(1e-3),) if make is spd.with_projection_decay else ()
  params = {'free': jnp.ones(2, dtype), 'a': jnp.ones(2), 'b': {'w': jnp.ones(2, dtype)}}
  tx = make(*arguments, {'free': None, 'a': 0, 'b': 0})
  with pytest.warns(UserWarning, match=f"1 of 2 .*'b/w', {dtype}.* about {percent} % of a weight"):
    tx.init(params)


def test_no_warning_without_narrow_constrained_params():
  """Catches a warning of params that SPD leaves alone."""
  tx = spd.adam_spd(1e-3, {'free': None, 'a': 0})
  with warnings.catch_warnings():
    warnings.simplefilter('error')
    tx.init({'free': jnp.ones(2, BF16), 'a': jnp.ones(2)})
