"""Params, gradients and anchors of different widths, real and complex; every public transform.

Params, gradients and anchors are multiples of 1/64, which every dtype holds exactly.
"""

from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from by_reference import CASES, DISTINCT, assert_reports, each_of, eps, every_case, own, steps
from reference import x64

FLOATS = ('float64', 'float32', 'bfloat16', 'float16')
COMPLEX = ('complex64', 'complex128')
SHAPE = (3, 4)
FACTORS = (-1.0, -1.0, 0.25)  # gradients by the deviation at the start: away, away, and home
ADAM = 'adam_spd, margin 0.05'  # computes with a real gradient in its own width
MORE = ('with_projection_decay', ADAM)
distinct_and_adam = each_of((*DISTINCT, *MORE), (*DISTINCT, ADAM))
distinct = each_of((*DISTINCT, *MORE))
layered = each_of((*DISTINCT[:-1], *MORE))
runs = pytest.mark.parametrize(
  ('anchor', 'jit'),
  [
    pytest.param('tree', True, id='tree'),
    pytest.param('captured', True, id='captured', marks=pytest.mark.slow),
    pytest.param('tree', False, id='tree, eager', marks=pytest.mark.slow),
  ],
)


def eighths(rng, least, most):
  """Multiples of 1/8 of either sign."""
  return rng.integers(least, most, SHAPE, endpoint=True) / 8 * rng.choice([-1, 1], SHAPE)


def problem(pairs):
  """A leaf for each pair of dtypes of a param and its gradient: params, gradients, anchors."""
  rng = np.random.default_rng(0)
  params, anchors, gradients = {}, {}, [{} for _ in FACTORS]
  for of_param, of_gradient in pairs:
    name = f'{of_param}_{of_gradient}'
    value, deviation = eighths(rng, 1, 16), eighths(rng, 2, 8)
    if of_param in COMPLEX:
      value, deviation = value + 1j * eighths(rng, 1, 16), deviation + 1j * eighths(rng, 2, 8)
    params[name] = jnp.asarray(value, of_param)
    anchors[name] = jnp.asarray(value - deviation, of_param)
    slope = deviation if of_gradient in COMPLEX else deviation.real
    for gradient, factor in zip(gradients, FACTORS, strict=True):
      gradient[name] = jnp.asarray(factor * slope + eighths(rng, 0, 1) / 8, of_gradient)
  return params, gradients, anchors


def assert_close(step, gradients, anchor_dtype=None, one_layer=False):
  """What was found is what the reference says, within the narrowest width that takes part.

  Nothing is computed in less than float32; what comes out is rounded to its own dtype. An inner
  optimizer may compute with a real gradient of a complex param in the gradient's dtype.
  """
  for name, found in step.found.items():
    param, wanted = np.asarray(step.params[name]), step.wanted[name]
    rounded = 8 * eps(found.dtype)
    if jnp.iscomplexobj(param) and not jnp.iscomplexobj(gradients[name]):
      rounded = 32 * eps(found.dtype, gradients[name].dtype)
    widths = [param.dtype, gradients[name].dtype, anchor_dtype or param.dtype]
    widths += [jnp.float32] if one_layer else []
    computed = eps(*(jnp.promote_types(dtype, jnp.float32) for dtype in widths))
    tolerance = 16 * computed * np.abs(param).max() + rounded * np.abs(wanted).max()
    difference = np.abs(np.asarray(found).astype(wanted.dtype) - wanted).max()
    assert difference <= tolerance, f'{name}: {difference:.3g} off, {tolerance:.3g} allowed'


def kinds(tree):
  return jax.tree.map(lambda x: (x.shape, x.dtype), tree)


def assert_kept(case, tx, trail):
  """Updates have the dtypes that the inner optimizer gives them; the state is as announced."""
  announced = kinds(own(jax.eval_shape(tx.init, trail[0].params)))
  for step in trail:
    assert kinds(step.found) == kinds(step.params if case.writes else step.inner)
    assert kinds(own(step.state)) == announced


def assert_meets_the_reference(case, pairs, anchor, jit, anchor_dtype=None, options=None, **layers):
  with x64():
    params, gradients, anchors = problem(pairs)
    given = anchors if anchor == 'tree' else None
    dtypes = {} if anchor_dtype is None else {'anchor_dtype': jnp.dtype(anchor_dtype)}
    tx = case.make(given, **dtypes, **(options or {}))
    trail = steps(case, tx, params, gradients, given, jit=jit, **layers)
    assert_kept(case, tx, trail)
    stored = optax.tree.get(trail[-1].state, 'anchor')
    assert all(x.dtype == (anchor_dtype or params[name].dtype) for name, x in stored.items())
    for step, gradient in zip(trail, gradients, strict=True):
      assert_close(step, gradient, anchor_dtype, 'groups' in layers)
      assert_reports(step)
  conditions = [np.all(held.condition) for step in trail for held in step.report.values()]
  assert any(conditions)  # else nothing is tested
  assert case.make is CASES['l2_sp'].make or not all(conditions)


PAIRS = [(of_param, of_gradient) for of_param in FLOATS for of_gradient in FLOATS]
FEW = [pair for pair in PAIRS if 'float16' not in pair][:-1]
SAME = [(dtype, dtype) for dtype in FLOATS]
# Every width on each side; wider, narrower and alike.
SOME = [*SAME[:2], *pairwise(FLOATS), *pairwise(reversed(FLOATS))]


@pytest.mark.parametrize(
  'pairs', [SOME, pytest.param(PAIRS, marks=pytest.mark.slow)], ids=['some', 'all']
)
@runs
@every_case
def test_params_and_gradients_of_two_widths(case, anchor, jit, pairs):
  """Catches sums of two float widths in one reduction, which XLA refuses where a CPU is alone."""
  assert_meets_the_reference(case, pairs, anchor, jit)


@pytest.mark.parametrize(
  'dtypes',
  [pytest.param(pair, marks=() if pair in SOME else pytest.mark.slow) for pair in PAIRS],
  ids='-'.join,
)
def test_a_single_leaf_of_two_widths(dtypes):
  """Catches the same for one leaf alone, whose sums share nothing with those of another."""
  assert_meets_the_reference(CASES['projection_decay'], [dtypes], 'tree', True)


@pytest.mark.parametrize('anchor', ['tree', pytest.param('captured', marks=pytest.mark.slow)])
@pytest.mark.parametrize(
  'anchor_dtype',
  ['float64', *(pytest.param(dtype, marks=pytest.mark.slow) for dtype in FLOATS[1:])],
)
@distinct
def test_anchors_of_another_width(case, anchor_dtype, anchor):
  """Catches an anchor wider than its param, or narrower, that ends in XLA, or is not stored so."""
  pairs = [*SAME, ('float32', 'float64'), ('float64', 'float32')]
  assert_meets_the_reference(case, pairs, anchor, True, anchor_dtype)


@distinct
def test_wide_anchors_without_jit(case):
  """Catches the same where each operation is compiled by itself."""
  assert_meets_the_reference(case, SAME, 'tree', False, 'float64')


@layered
def test_a_group_of_many_widths(case):
  """Catches sums of leaves of different widths that are added as if they were of one."""
  names = problem(FEW)[0]
  options = {'group': lambda path: 'all'}
  groups = dict.fromkeys(names, 'all')
  assert_meets_the_reference(case, FEW, 'tree', True, None, options, groups=groups)


@pytest.mark.parametrize('stack_axis', [0, pytest.param(1, marks=pytest.mark.slow)])
@layered
def test_stacked_layers_of_two_widths(case, stack_axis):
  """Catches two widths in one reduction over the slices of a stack."""
  axes = dict.fromkeys(problem(FEW)[0], stack_axis)
  options = {'stack_axis': stack_axis}
  assert_meets_the_reference(case, FEW, 'tree', True, None, options, stack_axes=axes)


def with_imaginary_part(gradients):
  return {
    name: x if jnp.iscomplexobj(x) else x.astype(jnp.promote_types(x.dtype, jnp.complex64))
    for name, x in gradients.items()
  }


def complex_steps(case, pairs, anchor, jit):
  """The steps, and the gradients of each of them."""
  params, gradients, anchors = problem(pairs)
  given = anchors if anchor == 'tree' else None
  tx = case.make(given)
  trail = steps(case, tx, params, gradients, given, jit=jit, of_inner=with_imaginary_part)
  assert any(np.all(held.condition) for step in trail for held in step.report.values())
  return tx, list(zip(trail, gradients, strict=True))


@runs
@distinct_and_adam
def test_real_gradients_of_complex_params(case, anchor, jit):
  """Catches a real gradient that breaks the step, or an update that has lost its imaginary part.

  Such a gradient stands for a complex one whose imaginary part is 0.
  """
  with x64():
    pairs = [(of_param, of_gradient) for of_param in COMPLEX for of_gradient in FLOATS]
    tx, trail = complex_steps(case, pairs, anchor, jit)
    announced = kinds(own(jax.eval_shape(tx.init, trail[0][0].params)))
    for step, gradient in trail:
      assert all(jnp.iscomplexobj(x) for x in step.found.values())
      assert step.found['complex64_float32'].dtype == jnp.complex64
      assert step.found['complex128_float64'].dtype == jnp.complex128
      assert kinds(own(step.state)) == announced
      assert_close(step, gradient)
      assert_reports(step)


@runs
@distinct
def test_complex_gradients_of_complex_params(case, anchor, jit):
  """Catches complex numbers of two widths in one reduction, and a lost imaginary part."""
  with x64():
    pairs = [(of_param, of_gradient) for of_param in COMPLEX for of_gradient in COMPLEX]
    tx, trail = complex_steps(case, pairs, anchor, jit)
    assert_kept(case, tx, [step for step, _ in trail])
    for step, gradient in trail:
      assert_close(step, gradient)
      assert_reports(step)


@distinct
def test_real_gradients_beside_complex_ones(case):
  """Catches a tree of real and complex params of which only one kind is taken right."""
  pairs = [
    ('complex64', 'float32'),
    ('float32', 'float32'),
    ('complex64', 'complex64'),
    ('bfloat16', 'float32'),
  ]
  params, gradients, anchors = problem(pairs)

  def of_inner(tree):
    seen = with_imaginary_part(tree)
    return {name: seen[name] if name.startswith('complex') else tree[name] for name in tree}

  trail = steps(case, case.make(anchors), params, gradients, anchors, of_inner=of_inner)
  for step, gradient in zip(trail, gradients, strict=True):
    assert [jnp.iscomplexobj(x) for x in step.found.values()] == [
      name.startswith('complex') for name in step.found
    ]
    assert_close(step, gradient)
    assert_reports(step)
