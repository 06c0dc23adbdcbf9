"""Sums over a layer, as `distance` shows them: the right numbers of each slice, and all digits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import spd_optax as spd


def distance(params, **options):
  """The library's ‖θ − 0‖ of the one layer, or of each slice of it."""
  tx = spd.projection_decay(0, **options)
  _, state = jax.jit(tx.update)(jnp.zeros_like(params), tx.init(params), params)
  return state.distance['']


@pytest.mark.parametrize('stack_axis', [None, 0, 1, 2])
@pytest.mark.parametrize('shape', [(3, 5, 7), (2, 64, 128), (1, 1, 1), (4, 3, 192)])
def test_sums_per_slice(shape, stack_axis):
  """Catches a wrong axis, and rows that are left out where a length does not divide."""
  values = np.random.default_rng(0).normal(size=shape).astype(np.float32)
  axes = tuple(axis for axis in range(3) if axis != stack_axis)
  expected = np.sqrt((values.astype(np.float64) ** 2).sum(axes))
  np.testing.assert_allclose(distance(jnp.asarray(values), stack_axis=stack_axis), expected, 1e-6)


@pytest.mark.parametrize('shape', [(4096, 4096), (4100, 4099)])
def test_long_sums_are_accurate(shape):
  """Catches terms added one by one: 2^24 equal ones come out 8 % short."""
  size, value = np.prod(shape), np.float32(0.3).astype(np.float64)
  # XLA:CPU of jaxlib 0.10.0 is 8e-6 off, later ones less than 1e-6.
  np.testing.assert_allclose(distance(jnp.full(shape, 0.3)), np.sqrt(size) * value, rtol=1e-5)
