"""One contract for every public transform, whatever its name.

The matrix is in `cases`; no test asks which case it runs. That conditions turn on and off is
itself a test.
"""

import functools
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax
import pytest
from cases import (
  CASES,
  MARKS,
  PER_LAYER,
  STEPS,
  assert_same_kind,
  bits,
  compiled,
  every_anchor,
  every_case,
  loop,
  make_step,
  noise,
  normal,
  trained,
  untouched,
)
from reference import x64


@every_anchor
@every_case
def test_one_trace_and_a_state_that_keeps_its_form(case, anchor):
  """Catches a second trace, and a state that takes another form than `init` announced."""
  states = [state for _, state in trained(case.make, anchor)]
  announced = jax.eval_shape(compiled(case.make, anchor)[0].init, normal(0))
  assert_same_kind(announced, *states)


@every_anchor
@every_case
def test_it_acts_on_every_layer_but_the_free(case, anchor):
  """Catches a condition that never fires (all else here would pass), and a free leaf held."""
  params, state = trained(case.make, anchor)[-1]
  same = jax.tree.map(lambda x, y: bits(x) == bits(y), params, untouched(case)[-1][0])
  assert same == {'body': {'kernel': False}, 'head': anchor == 'free'}
  for field in PER_LAYER:
    held = {'body~kernel'} if anchor == 'free' else {'body~kernel', 'head'}
    assert set(optax.tree.get(state, field)) == held
    steps = map(int, optax.tree.get(state, 'constrained').values())
    assert set(steps) <= set(case.held_steps(STEPS))


@every_case
def test_scan_is_the_loop(case):
  """Catches Python state in update, and a carry that changes its type."""
  tx = compiled(case.make, 'captured')[0]
  step = make_step(tx)
  scan = jax.jit(lambda c, gs: jax.lax.scan(lambda c, g: (step(*c, g), None), c, gs)[0])
  found = scan((normal(0), tx.init(normal(0))), noise(0))
  chex.assert_trees_all_close(found, trained(case.make)[-1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('anchor', ['captured', 'free'])
@every_case
def test_vmap_over_seeds_is_separate_runs(case, anchor):
  """Catches sums, copies and conditionals that are blind to a batch axis."""
  tx, seeds = compiled(case.make, anchor)[0], (0, 5)
  stack = functools.partial(jax.tree.map, lambda *xs: jnp.stack(xs, axis=-1))
  batched = functools.partial(jax.vmap, in_axes=-1, out_axes=-1)
  params, gradients = (stack(*map(f, seeds)) for f in (normal, noise))
  found = loop(jax.jit(batched(make_step(tx))), params, batched(tx.init)(params), gradients)[-1]
  expected = stack(*(trained(case.make, anchor, seed)[-1] for seed in seeds))
  chex.assert_trees_all_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('explicit', [False, True])
@every_case
def test_params_and_state_can_be_donated(case, explicit):
  """Catches an anchor that aliases the params, in the state or as the user passed it."""
  params = normal(0)
  tx = case.make(params if explicit else None)
  step = jax.jit(make_step(tx), donate_argnums=(0, 1))
  trail = loop(step, params, tx.init(params), noise(0))
  assert all(leaf.is_deleted() for leaf in jax.tree.leaves(params))
  chex.assert_trees_all_close(trail[-1], trained(case.make)[-1], rtol=1e-6)


@pytest.mark.parametrize(
  ('case', 'dtype'),
  [
    pytest.param(case, dtype, id=f'{name}-{dtype}', marks=MARKS[name])
    for name, case in CASES.items()
    for dtype in case.dtypes
  ],
)
def test_dtypes(case, dtype):
  """Catches a state or params that drift to another dtype, and statistics in a narrow one."""
  with x64():
    params, gradients = normal(0, dtype=dtype), noise(0, dtype)
    tx = case.make()
    trail = loop(jax.jit(make_step(tx)), params, tx.init(params), gradients)
    state = jax.eval_shape(tx.init, params)
    assert_same_kind(state, *(s for _, s in trail))
    assert_same_kind(params, optax.tree.get(state, 'anchor'), *(p for p, _ in trail))
    chex.assert_tree_all_finite(trail[-1])
  for field, wanted in PER_LAYER.items():
    values = optax.tree.get(trail[-1][1], field).values()
    assert {value.dtype.name for value in values} == {wanted}


def injected(make: Callable[..., Any], strength: Any) -> Any:
  return optax.inject_hyperparams(make)(strength=strength)


ZEROS = {
  'static': lambda make: make(strength=0),
  'traced': lambda make: injected(make, 0.0),
  'schedule': lambda make: make(strength=lambda count: 0.0 * count),
}


@pytest.mark.parametrize('jit', [True, False])
@pytest.mark.parametrize('zero', ZEROS)
@every_case
def test_strength_zero_changes_no_bit(case, zero, jit):
  """Catches u − 0·r·d where u belongs, and a strength that is not looked up.

  With a strength that is known only at run time, under jit, this holds for what the
  transformation returns; XLA may still round what is compiled with it otherwise than alone
  (1 ulp seen on CPU): the optimizer behind a link, and θ + u. So there a link is tested alone,
  and u is added outside.
  """
  alone = jit and zero != 'static'
  make, plain = case.own if alone else (case.make, case.plain)
  steps = STEPS if jit else 3
  gradients = jax.tree.map(lambda g: g[:steps], noise(0))

  def run(tx):
    if alone:
      tx = optax.GradientTransformation(tx.init, jax.jit(tx.update))
    step = make_step(tx) if alone or not jit else jax.jit(make_step(tx))
    return loop(step, normal(0), tx.init(normal(0)), gradients)

  runs = [run(tx) for tx in (ZEROS[zero](make), plain)]
  ours, inner = ([bits(params) for params, _ in run] for run in runs)
  assert ours == inner
