"""What holds for every layer, gradient and step: 30 examples each, 1,000 in the nightly profile."""

import functools
from typing import Any, NamedTuple

import chex
import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from cases import GIVEN, bits
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from reference import x64

import spd_optax as spd

SEEDS = st.integers(0, 10**6)
MARGINS = st.sampled_from([0.0, 0.1, 0.6, 0.99])
SHAPES = {'a': (8, 3), 'b': (8,), 'c': (2, 4)}


class Step(NamedTuple):
  """One step of either form; a tree like the params each."""

  params: Any
  gradients: Any
  anchor: Any
  updates: Any  # of the inner optimizer


def in_chain(step: Step, strength: Any = 1.0, margin: Any = 0.0, **options: Any) -> Any:
  """g', and SPD's state."""
  tx = spd.projection_decay(step.anchor, strength, margin=margin, **options)
  return tx.update(step.gradients, tx.init(step.params), step.params)


def around(step: Step, strength: Any = 1.0, **options: Any) -> Any:
  """The update after SPD, and SPD's state."""
  tx = spd.with_projection_decay(GIVEN, step.anchor, strength, **options)
  state = tx.init(step.params)
  found, state = tx.update(step.gradients, state, step.params, given=step.updates)
  return found, state.projection_decay


def applied(step: Step, strength: Any = 1.0, **options: Any) -> Any:
  """The params after SPD, and SPD's state."""
  tx = spd.with_projection_decay(GIVEN, step.anchor, strength, **options)
  state = tx.init(step.params)
  found, state = tx.apply(step.gradients, state, step.params, given=step.updates)
  return found, state.projection_decay


every_form = pytest.mark.parametrize('form', [in_chain, around])


@functools.cache
def jitted(form: Any, *options: Any) -> Any:
  """Compiled once for all examples; the strength may be traced."""
  return jax.jit(functools.partial(form, **dict(options)))


def drawn(seed: int, shapes: Any = SHAPES, dtype: Any = np.float32) -> Step:
  """A step of which everything is of order 1."""
  rng = np.random.default_rng(seed)
  trees = (
    {name: rng.normal(size=at).astype(dtype) for name, at in shapes.items()} for _ in Step._fields
  )
  return Step(*trees)


def each(change: Any, *trees: Any) -> Any:
  return jax.tree.map(change, *trees)


TREES = {
  'reversed': lambda t: {'z': t['a'], 'y': t['b'], 'x': t['c']},
  'list': lambda t: [t['c'], t['a'], t['b']],
  'tuple in FrozenDict': lambda t: flax.core.freeze({'m': (t['a'], t['b'], t['c'])}),
  'nnx.State': lambda t: nnx.State(
    {'c': nnx.Param(t['c']), 'a': nnx.Param(t['a']), 'b': nnx.Param(t['b'])}
  ),
}


@pytest.mark.parametrize('arrange', TREES.values(), ids=TREES)
@every_form
@given(SEEDS)
def test_order_and_type_of_the_tree(form, arrange, seed):
  """Catches leaves that are matched by their place, and a condition that goes to a neighbour."""
  step = drawn(seed)
  expected, state = jitted(form)(step)
  found, other = jitted(form)(Step(*map(arrange, step)))
  chex.assert_trees_all_close(jax.tree.leaves(found), jax.tree.leaves(arrange(expected)), rtol=1e-6)
  assert sorted(map(bool, other.condition.values())) == sorted(map(bool, state.condition.values()))


@every_form
@given(SEEDS)
def test_sharding(form, seed):
  """Catches sums over one shard, whatever the numbers."""
  mesh = Mesh(np.array(jax.devices()), ('x',))
  step = drawn(seed, {'a': (8, 3), 'b': (8,)})
  placed = jax.device_put(step, NamedSharding(mesh, PartitionSpec('x')))
  found, expected = jitted(form)(placed), jitted(form)(step)
  chex.assert_trees_all_close(found, expected, rtol=1e-5, atol=1e-6)


@every_form
@given(SEEDS)
def test_stacking(form, seed):
  """Catches slices that share a sum: stacked layers are separate ones."""
  step = drawn(seed, {'w': (3, 4, 2)})
  found, state = jitted(form, ('stack_axis', 1))(step)
  apart = Step(*({str(i): tree['w'][:, i] for i in range(4)} for tree in step))
  expected, states = jitted(form)(apart)
  slices = {str(i): found['w'][:, i] for i in range(4)}
  chex.assert_trees_all_close(slices, expected, rtol=1e-5, atol=1e-6)
  assert list(state.condition['w']) == list(states.condition.values())


POWERS = st.integers(-30, 30)


@pytest.mark.parametrize('margin', [0.0, 0.1])
@every_form
@given(SEEDS, POWERS, POWERS)
def test_scaling(form, margin, seed, of_loss, of_params):
  """Catches an ε in a denominator, and c or r that depend on a unit: to the bit.

  Scaled by powers of two, of the loss and of the params: `projection_decay` gives the gradient in
  the one scale, `with_projection_decay` the update in the other.
  """
  step = drawn(seed)
  loss, weights = np.float32(2.0**of_loss), np.float32(2.0**of_params)
  scaled = Step(
    *(
      each(lambda x, s=s: x * s, t)
      for s, t in zip((weights, loss, weights, weights), step, strict=True)
    )
  )
  (found, state), (expected, usual) = (jitted(form, ('margin', margin))(s) for s in (scaled, step))
  scale = loss if form is in_chain else weights
  assert bits(found) == bits(each(lambda x: x * scale, expected))
  assert bits((state.condition, state.ratio)) == bits((usual.condition, usual.ratio))
  assert bits(state.distance) == bits(each(lambda x: x * weights, usual.distance))


def radius(params: Any, anchor: Any) -> dict[str, float]:
  return {
    n: float(np.linalg.norm(np.asarray(params[n], float) - np.asarray(anchor[n], float)))
    for n in params
  }


@pytest.mark.parametrize('apply', [False, True])
@given(SEEDS, MARGINS, st.lists(st.floats(0, 1, width=32), min_size=4, max_size=4))
def test_the_radius(apply, seed, margin, strengths):
  """Catches a ratio that is not eq. 9, and a projection around another point.

  For λ from 0 to 1 the radius never exceeds the inner optimizer's, falls with λ, and at λ = 1 a
  held layer stays within the sphere that it stood on (eq. 10).
  """
  with x64():
    step = drawn(seed, dtype=np.float64)
    one = jitted(applied if apply else around)
    before = radius(step.params, step.anchor)
    last = inner = radius(each(np.add, step.params, step.updates), step.anchor)
    for strength in [0.0, *sorted(strengths), 1.0]:
      found, state = one(step, jnp.float64(strength))
      now = radius(found if apply else each(np.add, step.params, found), step.anchor)
      assert all(now[name] <= last[name] * (1 + 1e-12) for name in now)
      last = now
  for name, held in state.condition.items():
    expected = min(before[name], inner[name]) if held else inner[name]
    np.testing.assert_allclose(last[name], expected, rtol=1e-12)


LADDER = {'float16': 2**-10, 'bfloat16': 2**-7, 'float32': 2**-23}


@every_form
@given(SEEDS)
def test_dtypes_agree_within_their_epsilon(form, seed):
  """Catches a step that is coarser than its dtype: the numbers are exact in all of them."""
  rng = np.random.default_rng(seed)
  with x64():
    step = Step(*({'w': rng.integers(-31, 32, (3, 2)) / 16} for _ in Step._fields))
    expected, usual = jitted(form)(step)
    for dtype, epsilon in LADDER.items():
      found, state = jitted(form)(each(lambda x, d=dtype: jnp.asarray(x, d), step))
      assert found['w'].dtype == dtype
      chex.assert_trees_all_equal(state.condition, usual.condition)
      chex.assert_trees_all_close(
        np.asarray(found['w'], float), expected['w'], rtol=epsilon, atol=2**-20
      )


SIZES = st.integers(-30, 30)


def sized(seed: int, *powers: int) -> Step:
  """Params, gradients and updates of these powers of ten, in float32, and an anchor of 0."""
  params, gradients, anchor, updates = drawn(seed, {'w': (5,)})
  trees = zip((params, gradients, updates), powers, strict=True)
  params, gradients, updates = ({'w': np.float32(t['w'] * 10.0**power)} for t, power in trees)
  return Step(params, gradients, each(np.zeros_like, anchor), updates)


@given(SEEDS, SIZES, SIZES)
def test_projection_decay_is_exact_or_free_at_extreme_sizes(seed, of_gradient, of_deviation):
  """Catches NaN, ∞, a pull on a layer that counts as free, and one that is beyond its bound.

  Where a norm leaves float32 the layer is not held; near the limits a pull may be too weak.
  """
  step = sized(seed, of_deviation, of_gradient, 0)
  found, state = jitted(in_chain)(step)
  exact = [each(np.float64, tree) for tree in step[:3]]
  expected, report = reference.projection_decay(*exact)
  held, size = bool(state.condition['w']), np.linalg.norm(exact[1]['w'])
  within = max(abs(of_gradient), abs(of_deviation)) <= 17 and abs(of_gradient + of_deviation) <= 35
  if within:
    assert held == report['w'].condition
    np.testing.assert_allclose(found['w'] / size, expected['w'] / size, atol=1e-5)
  if not -24 < of_gradient < 21 or not -24 < of_deviation < 21:
    assert not held
  assert held or bits(found) == bits(step.gradients)
  assert held == (state.ratio['w'] > 0)
  assert np.linalg.norm(np.float64(found['w'])) <= 2.0001 * size


@given(SEEDS, SIZES, SIZES, SIZES)
def test_with_projection_decay_is_exact_or_free_at_extreme_sizes(
  seed, of_params, of_gradient, of_update
):
  """Catches NaN, ∞, and a layer that SPD carries farther away than the inner optimizer does.

  Gradients of any size are compared; only their product with the deviation must be in float32.
  """
  step = sized(seed, of_params, of_gradient, of_update)
  found, state = jitted(around)(step)
  params, gradients, anchor, updates = (each(np.float64, tree) for tree in step)
  expected, report = reference.with_projection_decay(params, gradients, updates, anchor)
  after, inner = params['w'] + np.float64(found['w']), params['w'] + updates['w']
  farthest = np.abs([inner, params['w']]).max()
  if max(abs(of_params), of_update) <= 17 and abs(of_gradient + of_params) <= 35:
    assert bool(state.condition['w']) == report['w'].condition
    np.testing.assert_allclose(after / farthest, expected['w'] / farthest, atol=1e-5)
  assert state.condition['w'] or bits(found) == bits(step.updates)
  assert np.linalg.norm(after) <= np.linalg.norm(inner) + 1e-6 * farthest
  chex.assert_tree_all_finite(found)
