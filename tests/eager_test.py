"""Steps without jit: they compile nothing anew, keep no memory, and do what jitted steps do."""

import contextlib
import functools
import gc
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import spd_optax as spd

ADAM = optax.adam(0.05)
RULES = {
  'stack_axis': {'blocks': 0, 'embed': None, 'head': None},
  'group': lambda path: 'head' if path.startswith('head/') else None,
}


def chained(link: Any) -> Any:
  return optax.chain(link, ADAM)


def around(**options: Any) -> Any:
  return spd.with_projection_decay(ADAM, **options)


# Every public transform, and the options that take a path of their own in a step.
MAKERS = {
  'projection_decay': lambda: chained(spd.projection_decay()),
  'projection_decay, options': lambda: chained(spd.projection_decay(0, margin=0.1, **RULES)),
  'with_projection_decay': around,
  'with_projection_decay, options': lambda: around(margin=0.1, anchor_ema=0.9, **RULES),
  'with_projection_decay, schedule': lambda: around(strength=optax.linear_schedule(0, 1, 9)),
  'with_projection_decay, bfloat16': lambda: around(anchor_dtype=jnp.bfloat16),
  'adam_spd': lambda: spd.adam_spd(0.05),
  'l2_sp': lambda: chained(spd.l2_sp()),
}
every_maker = pytest.mark.parametrize('make', MAKERS.values(), ids=MAKERS)


def update(tx: Any, params: Any, state: Any, gradients: Any) -> Any:
  updates, state = tx.update(gradients, state, params)
  return optax.apply_updates(params, updates), state


def apply(tx: Any, params: Any, state: Any, gradients: Any) -> Any:
  return tx.apply(gradients, state, params)


# Both ways to take a step, for each transform that has them.
STEPS = {name: (make, update) for name, make in MAKERS.items()}
STEPS |= {
  f'{name}, apply': (make, apply)
  for name, make in MAKERS.items()
  if name.startswith(('with_', 'adam_'))
}
# `adam_spd` is `with_projection_decay` around Adam: forms_test says that no bit differs.
every_step = pytest.mark.parametrize(
  ('make', 'step'),
  [
    pytest.param(*both, id=name, marks=pytest.mark.slow if name.startswith('adam_') else ())
    for name, both in STEPS.items()
  ],
)


def normal(seed: int) -> Any:
  rng = np.random.default_rng(seed)
  shapes = {'blocks': (2, 8, 4), 'embed': (8, 4), 'head': {'bias': (4,), 'kernel': (4, 4)}}
  draw = lambda shape: jnp.float32(rng.standard_normal(shape))  # noqa: E731
  return jax.tree.map(draw, shapes, is_leaf=lambda x: isinstance(x, tuple))


@contextlib.contextmanager
def counted(*ends: str) -> Iterator[list[str]]:
  """The events of JAX whose names end in one of these, while the block runs."""
  found = []

  def listen(event: str, duration: float, **details: Any) -> None:
    if event.endswith(ends):
      found.append(event)

  jax.monitoring.register_event_duration_secs_listener(listen)
  try:
    yield found
  finally:
    jax.monitoring.unregister_event_duration_listener(listen)


@every_step
def test_after_the_second_step_nothing_is_compiled(make, step):
  """Catches functions made anew in each step: JAX traces and compiles each of them again.

  The first step is from the state of `init`, the second from one that a step has made.
  """
  tx, params = make(), normal(0)
  state = tx.init(params)
  for seed in (1, 2):
    params, state = step(tx, params, state, normal(seed))
  gradients = [normal(seed) for seed in (3, 4, 5)]
  with counted('backend_compile_duration', 'jaxpr_trace_duration') as found:
    for gradient in gradients:
      params, state = step(tx, params, state, gradient)
    jax.block_until_ready(params)
  assert found == []


GRADIENTS = range(1, 9)  # their seeds


class Run(NamedTuple):
  """Steps under jit: the params and the state after them, and how often JAX was at work."""

  end: Any
  traces: int
  programs: int


@functools.cache
def under_jit(make: Any, step: Any) -> Run:
  tx, params, traces = make(), normal(0), []

  @jax.jit
  def jitted(params: Any, state: Any, gradients: Any) -> Any:
    traces.append(None)
    return step(tx, params, state, gradients)

  state = jax.jit(tx.init)(params)
  gradients = [normal(seed) for seed in GRADIENTS]
  with counted('backend_compile_duration') as found:
    for gradient in gradients:
      params, state = jitted(params, state, gradient)
    jax.block_until_ready(params)
  return Run((params, state), len(traces), len(found))


@every_step
def test_under_jit_there_is_one_trace_and_one_program(make, step):
  """Catches a state whose types change at the first step, and Python values that are traced in."""
  run = under_jit(make, step)
  assert (run.traces, run.programs) == (1, 1)


@every_step
def test_eager_steps_are_jitted_steps(make, step):
  """Catches a decision that is taken in Python, and so differently under jit."""
  tx, found = make(), under_jit(make, step).end
  eager = normal(0), tx.init(normal(0))
  for seed in GRADIENTS:
    eager = step(tx, *eager, normal(seed))
  for field in ('condition', 'constrained'):
    chex.assert_trees_all_equal(*(optax.tree.get(state, field) for _, state in (eager, found)))
  chex.assert_trees_all_equal_shapes_and_dtypes(eager, found)
  chex.assert_trees_all_close(eager, found, rtol=1e-5, atol=1e-6)


def resident() -> int:
  """Bytes of memory that this process holds now."""
  pages = int(Path('/proc/self/statm').read_text().split()[1])
  return pages * resource.getpagesize()


@pytest.mark.skipif(not Path('/proc/self/statm').exists(), reason='reads /proc, as Linux has it')
@pytest.mark.parametrize('step', [update, apply])
def test_memory_stands_still(step):
  """Catches programs, or anything else, that each step keeps: once it was 8 MB a step."""
  tx, params = spd.with_projection_decay(ADAM), normal(0)
  state, gradients = tx.init(params), [normal(seed) for seed in (1, 2, 3, 4)]

  def steps(count: int, params: Any, state: Any) -> Any:
    for i in range(count):
      params, state = step(tx, params, state, gradients[i % len(gradients)])
    jax.block_until_ready(params)
    gc.collect()
    return params, state

  params, state = steps(20, params, state)  # the allocator's own pools grow at first
  before = resident()
  steps(200, params, state)
  assert resident() - before < 4 * 2**20
