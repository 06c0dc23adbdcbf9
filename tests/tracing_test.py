"""What it takes to trace a step: linear in the leaves, and a small multiple of Adam's."""

import gc
import statistics
import sys
import time

import jax
import optax
import pytest

import spd_optax as spd

ROUNDS = 3
FORMS = {
  'projection_decay': spd.projection_decay,
  'with_projection_decay': lambda **options: spd.with_projection_decay(optax.adam(1e-3), **options),
  'adam_spd, margin': lambda **options: spd.adam_spd(1e-3, margin=0.05, **options),
  'projection_decay, following': lambda: spd.projection_decay(anchor_ema=0.5),
  'l2_sp': spd.l2_sp,
}
every_form = pytest.mark.parametrize('make', FORMS.values(), ids=FORMS)


def model(leaves):
  """So many arrays, as names of layers have them."""
  return {
    f'block_{i}': {'mlp': {'kernel': jax.ShapeDtypeStruct((2,), 'float32')}} for i in range(leaves)
  }


def seconds(tx, params):
  """CPU time to trace one update; nothing is compiled or run.

  A new function each time: JAX keeps the trace of one that it has seen.
  """
  state = jax.eval_shape(tx.init, params)
  gc.collect()
  start = time.process_time()
  jax.eval_shape(lambda *arguments: tx.update(*arguments), params, state, params)
  return time.process_time() - start


def medians(*cases):
  """The median of a few times for each case, which take turns; the first round warms up."""
  times = [[seconds(*case) for case in cases] for _ in range(ROUNDS + 1)][1:]
  return [statistics.median(column) for column in zip(*times, strict=True)]


def calls(tx, params):
  """How many functions are called, of Python and of C, while one update is traced.

  That is the same on every machine, and shows what the time of a few hundred leaves may not.
  """
  state, count = jax.eval_shape(tx.init, params), 0

  def called(frame, event, argument):
    nonlocal count
    count += event in ('call', 'c_call')

  before = sys.getprofile()
  sys.setprofile(called)
  try:
    jax.eval_shape(lambda *arguments: tx.update(*arguments), params, state, params)
  finally:
    sys.setprofile(before)
  return count


@every_form
def test_the_work_to_trace_is_linear_in_the_leaves(make):
  """Catches paths that are joined once for each leaf and leaf."""
  tx = make()
  calls(tx, model(10))  # fills the tables of jax
  few, some, many = (calls(tx, model(leaves)) for leaves in (50, 100, 200))
  assert many - some < 2.05 * (some - few)


@pytest.mark.slow  # times vary
@pytest.mark.parametrize('make', [FORMS['projection_decay'], FORMS['adam_spd, margin']])
def test_the_time_to_trace_does_not_explode(make):
  """Catches the same where the work is within a function."""
  tx = make()
  few, many = medians((tx, model(100)), (tx, model(400)))
  assert many < 8 * few  # 16 where the work is quadratic; times are not exact


@pytest.mark.slow
@pytest.mark.parametrize('make', [FORMS['with_projection_decay'], FORMS['adam_spd, margin']])
def test_a_step_is_traced_in_thrice_the_time_of_adam(make):
  """Catches work done for each leaf that Adam does not do: functions traced anew, checks."""
  params = model(400)
  ours, adam = medians((make(), params), (optax.adam(1e-3), params))
  assert ours < 3 * adam


@pytest.mark.slow
def test_a_link_is_traced_in_thrice_the_time_of_adam():
  """Catches the same in the chain, of which the link is the smaller part."""
  params = model(400)
  chain = optax.chain(spd.projection_decay(), optax.adam(1e-3))
  link, ours, adam = medians(
    (spd.projection_decay(), params), (chain, params), (optax.adam(1e-3), params)
  )
  assert link < 3 * adam
  assert ours < 4 * adam
