"""A long run: 100,000 steps leave no trace but their result."""

import gc
import resource
import sys
import tracemalloc
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import PUBLIC, make_step

STEPS, EVERY = 100_000, 20_000
every_public = pytest.mark.parametrize('case', PUBLIC.values(), ids=PUBLIC)


def resident() -> int:
  """Bytes of memory that the process holds."""
  status = Path('/proc/self/statm')
  if status.exists():
    return int(status.read_text().split()[1]) * resource.getpagesize()
  unit = 1 if sys.platform == 'darwin' else 1024  # the most so far
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


@pytest.mark.slow
@every_public
def test_many_steps(case):
  """Catches a second trace, Python objects or buffers kept for each step, and NaN in the end.

  A leak of one small array, or of 100 bytes, per step would show as 10 MB.
  """
  tx = case.make()
  chex.clear_trace_counter()
  step = jax.jit(chex.assert_max_traces(make_step(tx), n=1), donate_argnums=(0, 1))
  rng = np.random.default_rng(0)
  noise = [{'w': jnp.float32(rng.normal(size=(4, 3)) - 0.1)} for _ in range(64)]
  params = {'w': jnp.float32(rng.normal(size=(4, 3)))}
  state, sizes, arrays, objects = tx.init(params), [], [], []
  tracemalloc.start()
  for i in range(STEPS):
    params, state = step(params, state, noise[i % 64])
    if (i + 1) % EVERY == 0:
      jax.block_until_ready(params)
      gc.collect()
      sizes.append(resident())
      arrays.append(len(jax.live_arrays()))
      objects.append(tracemalloc.get_traced_memory()[0])
  tracemalloc.stop()
  assert len(set(arrays)) == 1
  assert objects[-1] - objects[0] < 100_000
  assert sizes[-1] - sizes[0] < 10 * 2**20
  chex.assert_tree_all_finite((params, state))
  assert int(optax.tree.get_all_with_path(state, 'count')[0][1]) == STEPS
  for steps in optax.tree.get(state, 'constrained').values():
    assert int(steps) in case.held_steps(STEPS)
