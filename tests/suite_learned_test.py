"""The learned strengths of examples/compare.py against NumPy."""

from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from suite import jobs, learned, methods

pytestmark = pytest.mark.examples

RATE, STEPS = 0.1, 8
RNG = np.random.default_rng(3)
THETA = RNG.normal(size=(4, 3)).astype(np.float32)
GRADIENTS = RNG.normal(size=(STEPS, 4, 3)).astype(np.float32)
HELD_OUT = RNG.normal(size=(STEPS, 4, 3)).astype(np.float32)


def run(turn: bool, rate: float) -> tuple[np.ndarray, float]:
  """The weights after all steps, and the strength."""
  tx = learned.learning(turn)(RATE, None, rate)
  params = learned.twins({'w': jnp.array(THETA)}, ())
  state = tx.init(params)
  for g, h in zip(GRADIENTS, HELD_OUT, strict=True):
    updates, state = tx.update({'model': {'w': g}, 'twin': {'w': h}}, state, params)
    params = optax.apply_updates(params, updates)
  np.testing.assert_array_equal(params['model']['w'], params['twin']['w'])
  return np.asarray(params['model']['w']), float(np.exp(state.logs['w']))


@pytest.mark.parametrize(
  ('turn', 'fixed'),
  [(True, methods.chained(RATE, None, 1.0, 0.05)), (False, methods.decoupled_l2_sp(RATE, None, 1))],
)
def test_without_learning_it_is_the_fixed_method(turn: bool, fixed: Any) -> None:
  """Catches another rule than the one that it is compared with."""
  params = jnp.array(THETA)
  state = fixed.init(params)
  for g in GRADIENTS:
    updates, state = fixed.update(g, state, params)
    params = optax.apply_updates(params, updates)
  found, strength = run(turn, 0.0)
  np.testing.assert_allclose(found, params, rtol=1e-4, atol=1e-6)
  assert strength == 1


def test_strengths_by_hand() -> None:
  """Catches the wrong sign, the wrong gradient, and a strength that acts a step late."""

  class Adam:
    m = v = t = 0.0

    def __call__(self, g: Any) -> Any:
      self.m, self.v, self.t = 0.9 * self.m + 0.1 * g, 0.999 * self.v + 0.001 * g**2, self.t + 1
      return self.m / (1 - 0.9**self.t) / (np.sqrt(self.v / (1 - 0.999**self.t)) + 1e-8)

  adam, learner = Adam(), Adam()
  theta, log = np.float64(THETA), 0.0
  for g, h in zip(np.float64(GRADIENTS), np.float64(HELD_OUT), strict=True):
    d = theta - THETA
    norms = np.linalg.norm(h) * np.linalg.norm(d)
    log -= 0.5 * learner(-np.sum(h * d) / norms if norms else 0.0)
    theta = theta - RATE * (adam(g) + np.exp(log) * d)
  found, strength = run(False, 0.5)
  np.testing.assert_allclose(strength, np.exp(log), rtol=1e-3)
  np.testing.assert_allclose(found, theta, rtol=1e-3, atol=1e-5)
  assert abs(log) > 0.5


def test_held_out_examples_are_never_trained_on() -> None:
  """Catches a shared example, one that is left out, and halves that are taken for one another."""
  pool = np.arange(30, dtype=np.float32)
  task: Any = SimpleNamespace(shots=20, batch=4)
  parts = jobs.split(task, pool, 2, 40, apart=True)
  for seed in range(2):
    fit, held_out = (set(x.ravel().tolist()) for x in np.split(parts.order[seed], 2, axis=1))
    assert (len(fit), len(held_out), fit & held_out) == (15, 5, set())
    assert fit | held_out == set(jobs.rows_of(task, 30, seed)[0].tolist())
  loss = learned.of_both(lambda w, batch: w * jnp.mean(batch))
  found = jax.grad(loss)({'model': 1.0, 'twin': 1.0}, jnp.array([1.0, 3.0, 10.0, 30.0]))
  assert (float(found['model']), float(found['twin'])) == (2, 20)
