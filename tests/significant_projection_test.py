"""SignificantProjection: against a loop in NumPy, and what its numbers mean."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import ADAM
from meshes import SHAPES, STEPS, alone, assert_close, sharded

import spd_optax as spd

Z, DECAY, NEAR, STRENGTH, RATE = 1.5, 0.75, 3.0, 0.5, 0.0625


class Loop:
  """One layer in float64, by SGD with momentum 1/2; the mean and its error by their definitions."""

  def __init__(self, start):
    self.start, self.x, self.momentum = start, start.copy(), np.zeros_like(start)
    self.slopes, self.held, self.freed = [], [], 0

  def step(self, gradient):
    d = self.x - self.start
    distance = np.linalg.norm(d)
    held = False
    if distance > 0:
      self.slopes.append(gradient @ d / distance)
      # The newest counts 1 − DECAY, the one before it DECAY times that, …
      weights = (1 - DECAY) * DECAY ** np.arange(len(self.slopes))[::-1]
      mean, square = weights @ self.slopes, weights @ np.square(self.slopes)
      # Of 1 / Σ weights² independent slopes, once there are many.
      error = np.sqrt(square * (1 - DECAY) / (1 + DECAY))
      held = mean > -Z * error
    self.momentum = self.momentum / 2 + gradient
    near = distance < NEAR * np.linalg.norm(RATE * self.momentum)
    self.freed += held and near
    held = held and not near
    moved = self.x - RATE * self.momentum - self.start
    after = np.linalg.norm(moved)
    ratio = max(after - distance, 0) / after if after else 0.0
    self.x = self.start + moved * (1 - STRENGTH * ratio * held)
    self.held.append(held)


@pytest.mark.parametrize('jit', [True, False], ids=['jit', 'eager'])
def test_agrees_with_a_loop(jit):
  """Catches a wrong mean, error or step, and evidence at the anchor."""
  rng = np.random.default_rng(0)
  start = {'kernel': rng.normal(size=(3, 4)), 'bias': rng.normal(size=4), 'still': np.ones(2)}
  loops = {name: Loop(x.ravel()) for name, x in start.items()}
  params = jax.tree.map(jnp.float32, start)
  optimizer = spd.with_projection_decay(
    optax.sgd(RATE, momentum=0.5), strength=STRENGTH, rule=spd.SignificantProjection(Z, DECAY, NEAR)
  )
  state = optimizer.init(params)
  update = jax.jit(optimizer.update) if jit else optimizer.update
  for i in range(40):
    drift = -1.0 if i % 20 < 10 else 0.5  # outward first, then back, as far as it is one direction
    gradients = {name: drift + rng.normal(size=x.shape) for name, x in start.items()}
    gradients['still'] *= i >= 5
    for name, gradient in gradients.items():
      loops[name].step(gradient.ravel())
    updates, state = update(jax.tree.map(jnp.float32, gradients), state, params)
    params = optax.apply_updates(params, updates)
    for name, loop in loops.items():
      np.testing.assert_allclose(np.ravel(params[name]), loop.x, rtol=1e-4, atol=1e-4)
      assert bool(state.projection_decay.condition[name]) == loop.held[-1], (i, name)
  shares = {name: np.mean(loop.held) for name, loop in loops.items()}
  assert all(0.1 < share < 0.9 for share in shares.values()), shares
  assert all(loop.freed for loop in loops.values()), [loop.freed for loop in loops.values()]


def held_share(size, drift, z, batch=1, scale=1):
  """Share of steps held, of a layer whose gradients are noise around a drift outward."""
  optimizer = spd.with_projection_decay(
    optax.sgd(1e-6), 0, rule=spd.SignificantProjection(z), strength=0
  )
  direction = jnp.full(size, size**-0.5)
  params = 100 * direction  # so far from its anchor that its direction stays

  def step(state, key):
    noise = jax.random.normal(key, (size,)) * batch**-0.5
    _, state = optimizer.update(scale * (noise - drift * direction), state, params)
    return state, state.projection_decay.condition['']

  keys = jax.random.split(jax.random.key(0), 4000)
  _, held = jax.jit(lambda state: jax.lax.scan(step, state, keys))(optimizer.init(params))
  return float(held[100:].mean())


@pytest.mark.parametrize('drift', [0.0, 0.16, 0.5])
def test_z_means_the_same_at_every_size(drift):
  """Catches a threshold that is a cosine, whose noise falls as the layer grows."""
  shares = [held_share(size, drift, 1.0) for size in (10, 1000, 30_000)]
  # A mean of 39 effective steps: 4000 steps have about 100 of them, so ± 0.05.
  assert max(shares) - min(shares) < 0.12, shares
  expected = {0.0: 0.84, 0.16: 0.5, 0.5: 0.02}[drift]
  assert np.mean(shares) == pytest.approx(expected, abs=0.08)


def test_only_the_ratio_of_drift_to_noise_counts():
  """Catches a threshold that has units: the same layer, its loss times 1000, and other batches."""
  assert held_share(100, 0.2, 1.0) == held_share(100, 0.2, 1.0, scale=1024)
  assert held_share(100, 0.05, 1.0, batch=16) == pytest.approx(held_share(100, 0.2, 1.0), abs=1e-3)


def test_a_layer_at_its_anchor_is_free():
  """Catches a layer that came back, and then may never leave."""
  optimizer = spd.with_projection_decay(
    optax.sgd(0.1, momentum=0.9), jnp.zeros(3), rule=spd.SignificantProjection(near=0.0)
  )
  state = optimizer.init(jnp.zeros(3))
  for params, held in ((jnp.full(3, 10.0), True), (jnp.zeros(3), False)):
    updates, state = optimizer.update(jnp.ones(3), state, params)
    assert bool(state.projection_decay.condition['']) == held
    assert np.all(updates != 0) or held


@pytest.mark.parametrize(
  'wrong', [{'decay': -0.5}, {'decay': 1.5}, {'near': -5.0}, {'z': np.inf}, {'z': np.nan}], ids=str
)
def test_what_is_computed_and_out_of_range_holds_nothing(wrong):
  """Catches a schedule of a hyperparameter that leaves its range, and holds all or grows."""
  rule = spd.SignificantProjection(**jax.tree.map(jnp.float32, {'near': 0.0, **wrong}))
  optimizer = spd.with_projection_decay(optax.sgd(0.1), 0, rule=rule)
  params = jnp.full(3, 10.0)
  _, state = optimizer.update(jnp.ones(3), optimizer.init(params), params)
  assert not state.projection_decay.condition['']


def test_a_gradient_of_nan_is_forgotten():
  """Catches a NaN, or a slope whose square is infinite, that stays in the running means."""
  optimizer = spd.with_projection_decay(optax.sgd(0.1), 0, rule=spd.SignificantProjection())
  params = jnp.full(3, 10.0)
  state = optimizer.init(params)
  conditions = []
  for value in (1.0, jnp.nan, jnp.inf, 1e20, 1.0):
    before = state.projection_decay.rule_state
    _, state = optimizer.update(jnp.full(3, value), state, params)
    conditions.append(bool(state.projection_decay.condition['']))
    kept = before == state.projection_decay.rule_state
    assert kept != (value == 1.0)
  assert conditions == [True, False, False, False, True]


def waiting(anchor=None, **options):
  rule = spd.SignificantProjection(z=1.0, decay=0.75, near=2.0)
  return spd.with_projection_decay(ADAM, anchor, rule=rule, **options)


@pytest.mark.eight_devices
@pytest.mark.parametrize(
  'name', ['FSDP x tensor', pytest.param('explicit', marks=pytest.mark.slow)]
)
def test_many_devices_are_one(name):
  """Catches a slope or a step of single shards, and numbers that are placed wrong."""
  expected = alone(waiting, 'captured')
  assert_close(sharded(waiting, 'captured', name), expected)
  steps = optax.tree.get(expected[1], 'constrained')
  assert all(np.all(steps[name] < STEPS) and np.any(steps[name]) for name in SHAPES), steps
