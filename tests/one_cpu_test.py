"""Where a CPU is the only device, a layer's sums share one loop (these tests have eight)."""

import os
import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from golden_test import CASES, assert_recorded, load, replay, wrapper
from reference import x64

import spd_optax as spd
from spd_optax import layers, trees

PROGRAM = """
import jax, jax.numpy as jnp, optax, spd_optax as spd
tx = spd.with_projection_decay(optax.adam(1e-3))
params = {'kernel': jnp.ones((64, 64))}
state = tx.init(params)
print(jax.devices(), jax.jit(tx.update).lower(params, state, params).as_text())
"""


@pytest.fixture(autouse=True)
def only_a_cpu(monkeypatch):
  monkeypatch.setattr(layers, 'only_a_cpu', lambda: True)


def several_at_once(text):
  """Whether a reduction with several operands stands in a StableHLO program."""
  return any('stablehlo.reduce' in line and line.count('init:') > 1 for line in text.splitlines())


@pytest.mark.parametrize('devices', [1, 2])
def test_it_is_used_on_a_single_cpu_only(devices):
  """Catches a sum that XLA would gather, and one loop per sum where one would do."""
  flags = f'--xla_force_host_platform_device_count={devices}'
  environment = os.environ | {'XLA_FLAGS': flags, 'JAX_PLATFORMS': 'cpu'}
  done = subprocess.run(
    [sys.executable, '-c', PROGRAM], env=environment, capture_output=True, text=True, check=True
  )
  assert several_at_once(done.stdout) == (devices == 1)


@pytest.mark.parametrize('stack_axis', [None, 0, 1, 2])
@pytest.mark.parametrize('shape', [(3, 5, 7), (2, 64, 128), (1, 1, 1), (4, 3, 192)])
def test_sums_per_slice(shape, stack_axis):
  """Catches a wrong axis, rows of a length that does not divide, and swapped sums."""
  values = np.random.default_rng(0).normal(size=(2, *shape)).astype(np.float32)
  arranged = layers.find_layers(trees.flatten(jnp.zeros(shape)), [True], stack_axis)
  found = jax.jit(lambda x, y: arranged.sums({'x': [x], 'y': [y]}))(*values)
  axes = tuple(axis for axis in range(3) if axis != stack_axis)
  for name, array in zip('xy', values, strict=True):
    chex.assert_trees_all_close(found[name][0], array.sum(axes), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize('shape', [(4096, 4096), (4100, 4099)])
def test_long_sums_are_accurate(shape):
  """Catches terms added one by one: 2^24 equal ones come out 8 % short."""
  arranged = layers.find_layers(trees.flatten(jnp.zeros(shape)), [True])
  found = jax.jit(lambda x: arranged.sums({'x': [x], 'y': [x * x]}))(jnp.full(shape, 0.3))
  size, value = np.prod(shape), np.float32(0.3).astype(np.float64)
  np.testing.assert_allclose(found['x'][0], size * value, rtol=2e-6)
  np.testing.assert_allclose(found['y'][0], size * value**2, rtol=2e-6)


@pytest.mark.parametrize('case', [case for case in CASES if case != 'float32'])
def test_golden_steps(case):
  """Catches a sum that lands in the wrong place; the steps are the reference's."""
  golden = load(case)
  with x64():
    run = replay(wrapper(golden), golden)
  assert_recorded(run, golden, np.float64, 1e-12)


def test_a_step_can_be_differentiated():
  """Catches a reduction without a derivative."""
  params = jnp.arange(1.0, 7.0).reshape(2, 3)

  def length(strength):
    tx = spd.projection_decay(0, strength)
    updates, _ = tx.update(params / 7, tx.init(params), params)
    return jnp.sum((params + updates) ** 2)

  found, e = jax.grad(length)(0.5), 1e-2
  np.testing.assert_allclose(found, (length(0.5 + e) - length(0.5 - e)) / (2 * e), rtol=1e-2)
  assert found != 0


FORMS = {
  'in the chain': lambda anchor: optax.chain(spd.projection_decay(anchor), optax.sgd(0.1)),
  'exact': lambda anchor: spd.with_projection_decay(optax.sgd(0.1, momentum=0.9), anchor),
}


@pytest.mark.parametrize('one_cpu', [True, False])
@pytest.mark.parametrize('make', FORMS.values(), ids=FORMS)
def test_steps_from_the_anchor_can_be_differentiated(make, one_cpu, monkeypatch):
  """Catches √'(0) · 0 = NaN, and a sum of which some terms have no derivative."""
  monkeypatch.setattr(layers, 'only_a_cpu', lambda: one_cpu)
  anchor = jnp.array([[1.0, 2.0], [-3.0, 1.0]])
  tx = make(anchor)

  def loss(scale, params):
    state = tx.init(anchor)
    for turn in (1.0, 1.0, -0.1):
      updates, state = tx.update(turn * scale * (params + 1), state, params)
      params = optax.apply_updates(params, updates)
    return jnp.sum(params**2)

  assert jnp.all(jnp.isfinite(jax.grad(loss, 1)(1.0, anchor)))
  with x64():
    found, e = jax.grad(loss)(1.0, anchor), 1e-3
    expected = (loss(1 + e, anchor) - loss(1 - e, anchor)) / (2 * e)
  np.testing.assert_allclose(found, expected, rtol=1e-3)
