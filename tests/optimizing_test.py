"""What optax asks of an optimizer: each transform minimizes, and takes what a training loop gives.

On the ideas of optax/contrib/_common_test.py (Apache-2.0). Traces, dtypes and wrappers are in
contract_test and nesting_test.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import spd_optax as spd

STEPS, RATE = 30_000, 0.01
AROUND = functools.partial(spd.with_projection_decay, optax.adam(RATE))


class Transform(NamedTuple):
  """A transform: `make(**options)`; how near it comes to the minimum of Rosenbrock's function."""

  make: Callable[..., Any]
  options: dict[str, Any] = {}  # noqa: RUF012  # never written to
  optimizer: Any = None  # behind a link
  within: float = 0.03

  def __call__(self) -> Any:
    return self.complete(self.make(**self.options))

  def complete(self, tx: Any) -> Any:
    return optax.chain(tx, self.optimizer) if self.optimizer else tx


ADAM = optax.adam(RATE)
TRANSFORMS = {
  'projection_decay': Transform(spd.projection_decay, {}, ADAM, within=0.11),
  'with_projection_decay': Transform(AROUND),
  'adam_spd': Transform(spd.adam_spd, {'learning_rate': RATE, 'rule': spd.Projection(near=20.0)}),
  'SignificantProjection': Transform(AROUND, {'rule': spd.SignificantProjection()}),
  'within_distance': Transform(AROUND, {'strength': spd.within_distance(9.0)}),
  'l2_sp': Transform(spd.l2_sp, {'strength': 1e-3}, ADAM),
}
every_transform = pytest.mark.parametrize('transform', TRANSFORMS.values(), ids=TRANSFORMS)


def square(x):
  return jnp.real(x) ** 2 + jnp.imag(x) ** 2


# Each is a layer of its own: start, minimum, loss.
TARGETS = {
  'parabola': ([-1.0, 10.0, 1.0], [1.0, -1.0, 1.0], lambda x, y: square(x - y).sum()),
  'matrix': ([[0.0, 0], [0, 0]], [[3.0, -2], [1, 4]], lambda x, y: square(x - y).sum()),
  'rosenbrock': (
    [0.0, 0.0],
    [1.0, 1.0],
    lambda x, _: square(1 - x[0]) + 100 * square(x[1] - x[0] ** 2),
  ),
}
TURN = {'float32': 1.0, 'complex64': 0.6 + 0.8j}  # of the minima of the parabolas


def ends(dtype):
  """The params at the start, and at the minimum."""
  start = {name: jnp.asarray(x, dtype) for name, (x, _, _) in TARGETS.items()}
  end = {name: jnp.asarray(y, dtype) * TURN[dtype] for name, (_, y, _) in TARGETS.items()}
  end['rosenbrock'] = end['rosenbrock'] / TURN[dtype]
  start['rosenbrock'] = start['rosenbrock'] + (TURN[dtype] - 1) / 4
  return start, end


def loss(params):
  end = ends(params['matrix'].dtype.name)[1]
  return sum(f(params[name], end[name]) for name, (_, _, f) in TARGETS.items())


def minimized(tx, params, steps=STEPS):
  """Params and state after so many steps."""

  def step(carry, _):
    params, state = carry
    gradients = jax.tree.map(jnp.conj, jax.grad(loss)(params))
    updates, state = tx.update(gradients, state, params)
    return (optax.apply_updates(params, updates), state), None

  run = jax.jit(lambda carry: jax.lax.scan(step, carry, length=steps)[0])
  return run((params, tx.init(params)))


# One kind of float for each transform; the other is slow.
@pytest.mark.parametrize('dtype', ['complex64', pytest.param('float32', marks=pytest.mark.slow)])
@every_transform
def test_it_minimizes(transform, dtype):
  """Catches a rule that holds a layer short of its minimum, and wrong complex products."""
  start, wanted = ends(dtype)
  found, _ = minimized(transform(), start)
  apart = {target: np.abs(x - wanted[target]).max() for target, x in found.items()}
  assert apart.pop('rosenbrock') < transform.within
  assert max(apart.values()) < 0.03, apart


def test_a_link_circles_at_a_distance_of_the_rate():
  """Catches what the docstring of `projection_decay` says of it, where it is no longer so."""
  start = {**ends('float32')[1], 'rosenbrock': jnp.zeros(2)}

  def apart(rate):
    tx = optax.chain(spd.projection_decay(), optax.adam(rate))
    found, state = minimized(tx, start, steps=100_000)
    share = optax.tree.get(state, 'constrained')['rosenbrock'] / 100_000
    return float(np.abs(found['rosenbrock'] - 1).max()), float(share)

  for rate in (0.01, 0.001):
    distance, share = apart(rate)
    assert 3 * rate < distance < 12 * rate
    assert 0.3 < share < 0.6
  assert apart(optax.cosine_decay_schedule(0.01, 100_000))[0] < 1e-4


def steps(tx, count=3, **extra_args):
  """Updates and state of some steps out and back, without jit."""
  params, trail = ends('float32')[0], []
  state = tx.init(params)
  for i in range(count):
    gradients = jax.tree.map(lambda p, i=i: jnp.cos(p + i), params)
    updates, state = tx.update(gradients, state, params, **extra_args)
    params = optax.apply_updates(params, updates)
    trail.append((updates, state))
  return trail


@every_transform
def test_arguments_that_nobody_knows_are_passed_over(transform):
  """Catches an update that refuses what another transformation of the loop needs."""
  found = steps(transform(), value=1.0, unknown=object(), grad_fn=None)
  chex.assert_trees_all_equal(found, steps(transform()))


@every_transform
def test_every_number_can_be_injected(transform):
  """Catches a hyperparameter that only a Python number can be, and defaults that are lost.

  A budget is no number, and is passed on as it is.
  """
  injected = optax.inject_hyperparams(transform.make)(**transform.options)
  (updates, state), *_ = steps(transform.complete(injected), 1)
  inner = state[0].inner_state if transform.optimizer else state.inner_state
  (expected, own), *_ = steps(transform(), 1)
  chex.assert_trees_all_close(updates, expected, rtol=1e-5, atol=1e-8)
  own = own[0] if transform.optimizer else own
  chex.assert_trees_all_equal_shapes_and_dtypes(inner, own)
  chex.assert_trees_all_close(inner, own, rtol=1e-5, atol=1e-8)


@every_transform
def test_reduce_on_plateau_behind(transform):
  """Catches updates or a state that a factor from behind does not reach, or changes the type of."""
  plateau = optax.contrib.reduce_on_plateau(factor=0.5, patience=1)
  tx, params = optax.chain(transform(), plateau), ends('float32')[0]
  alone, gradients = transform(), jax.tree.map(jnp.cos, params)

  def step(carry, value):
    state, own = carry
    updates, state = tx.update(gradients, state, params, value=value)
    expected, own = alone.update(gradients, own, params)
    return (state, own), (updates, expected, optax.tree.get(state, 'scale'))

  values = jnp.array([3.0, 2.0, 2.0, 2.0, 2.0, 1.0])
  run = jax.jit(lambda carry: jax.lax.scan(step, carry, values))
  (state, own), (updates, expected, scales) = run((tx.init(params), alone.init(params)))
  np.testing.assert_array_equal(scales[-1], 0.125)
  assert scales[0] == 1
  scaled = jax.tree.map(lambda x: jax.vmap(jnp.multiply)(scales, x), expected)
  chex.assert_trees_all_close(updates, scaled, rtol=1e-6)
  chex.assert_trees_all_close(state[0], own, rtol=1e-6)


@every_transform
def test_map_params_over_the_state(transform):
  """Catches a state that optax cannot take apart and put together."""
  tx = transform()
  _, state = steps(tx, 1)[-1]
  chex.assert_trees_all_equal(optax.tree.map_params(tx, lambda x: x, state), state)


def test_the_learning_rate_of_adam_spd_may_be_a_schedule():
  """Catches a schedule that is read at another step. (Of the strength: nesting_test.)"""
  rate = optax.linear_schedule(0.1, 0.2, 3)
  expected = steps(spd.with_projection_decay(optax.adam(rate)))
  chex.assert_trees_all_equal(steps(spd.adam_spd(rate)), expected)
