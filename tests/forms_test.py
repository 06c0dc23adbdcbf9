"""Both forms against the plain NumPy reference, and what their docstrings promise."""

import inspect
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from cases import GIVEN
from hypothesis import given
from hypothesis import strategies as st
from reference import x64

import spd_optax as spd


class Problem(NamedTuple):
  """One step: trees as the reference wants them, by path, and the options of the forms."""

  params: dict[str, Any]
  gradients: dict[str, Any]
  updates: dict[str, Any]
  anchors: dict[str, Any]
  groups: dict[str, str]
  stack_axes: dict[str, int]
  strength: float
  margin: float

  @property
  def layout(self) -> dict[str, Any]:
    """For the reference."""
    return {'margin': self.margin, 'groups': self.groups, 'stack_axes': self.stack_axes}

  @property
  def options(self) -> dict[str, Any]:
    """For the library."""
    return {
      'anchor': nest(self.anchors),
      'strength': self.strength,
      'margin': self.margin,
      'group': self.groups.get,
      'stack_axis': lambda path, leaf: self.stack_axes.get(path),
    }


def nest(leaves: dict[str, Any]) -> dict[str, Any]:
  """{'a/b': x} → {'a': {'b': x}}."""
  tree: dict[str, Any] = {}
  for path, leaf in leaves.items():
    top, name = path.split('/')
    tree.setdefault(top, {})[name] = leaf
  return tree


def numbers(rng: np.random.Generator, shape: Any, is_complex: bool) -> np.ndarray:
  x = rng.standard_normal(shape)
  return np.asarray(x + 1j * rng.standard_normal(shape) if is_complex else x)


@st.composite
def problems(draw: Any) -> Problem:
  """Modules of one or two leaves: plain, stacked, grouped; every kind of anchor."""
  rng = np.random.default_rng(draw(st.integers(0, 10**6)))
  problem = Problem({}, {}, {}, {}, {}, {}, draw(STRENGTHS), draw(MARGINS))
  for module in range(draw(st.integers(1, 3))):
    slices, grouped = draw(st.sampled_from([None, None, 1, 3])), draw(st.booleans())
    for leaf in range(draw(st.integers(1, 2))):
      path = f'module{module}/leaf{leaf}'
      shape = draw(st.sampled_from([(), (2, 3)]))
      if grouped:
        problem.groups[path] = f'group{module}'
      if slices is not None:
        axis = draw(st.integers(0, len(shape)))
        shape = (*shape[:axis], slices, *shape[axis:])
        problem.stack_axes[path] = axis - draw(st.sampled_from([0, len(shape)]))
      is_complex = draw(st.booleans())
      params, problem.gradients[path], anchor = (numbers(rng, shape, is_complex) for _ in range(3))
      at_anchor, kind = draw(st.booleans()), draw(st.sampled_from(['array', 'zero', 'free']))
      problem.params[path] = anchor if at_anchor and kind == 'array' else params
      problem.anchors[path] = {'array': anchor, 'zero': 0, 'free': None}[kind]
      problem.updates[path] = numbers(rng, shape, is_complex)
  return problem


STRENGTHS = st.sampled_from([0.0, 0.3, 1.0, 4.0])
MARGINS = st.sampled_from([0.0, 0.1, 0.6, 0.99])
NEAR = st.sampled_from([0.0, 0.7, 1.4])  # of a step, whose length is about that of d


def assert_reported(state: spd.ProjectionDecayState, report: dict[str, reference.Held]) -> None:
  report = reference.state_keys(report)
  held = {name: np.asarray(layer.condition) for name, layer in report.items()}
  chex.assert_trees_all_equal(state.condition, held)
  chex.assert_trees_all_equal(state.constrained, jax.tree.map(lambda x: x.astype(np.int32), held))
  distance = {name: np.asarray(layer.distance, np.float32) for name, layer in report.items()}
  chex.assert_trees_all_close(state.distance, distance, rtol=2e-7)


def ratios(report: dict[str, reference.Held]) -> dict[str, Any]:
  report = reference.state_keys(report)
  return {name: np.asarray(layer.ratio, np.float32) for name, layer in report.items()}


@given(problems(), NEAR)
def test_with_projection_decay_is_the_reference(problem: Problem, near: float) -> None:
  """Catches a wrong sum, slice, group, sign, margin, step or anchor, on any tree."""
  p = problem
  after, report = reference.with_projection_decay(
    p.params, p.gradients, p.updates, p.anchors, p.strength, near=near, **p.layout
  )
  of_rule = {'margin': 0.0, 'rule': spd.Projection(p.margin, near)} if near else {}
  with x64():
    tx = spd.with_projection_decay(GIVEN, **p.options | of_rule)
    params = jax.tree.map(jnp.asarray, nest(p.params))
    updates, state = tx.update(nest(p.gradients), tx.init(params), params, given=nest(p.updates))
    found = optax.apply_updates(params, updates)
  chex.assert_trees_all_close(found, nest(after), rtol=1e-12, atol=1e-12)
  assert_reported(state.projection_decay, report)
  chex.assert_trees_all_close(state.projection_decay.ratio, ratios(report), rtol=2e-7, atol=1e-15)


@given(problems())
def test_projection_decay_is_the_reference(problem: Problem) -> None:
  """Catches a wrong sum, slice, group, sign, margin or anchor, on any tree."""
  p = problem
  with x64():
    turned, report = reference.projection_decay(
      p.params, p.gradients, p.anchors, p.strength, **p.layout
    )
    tx = spd.projection_decay(**p.options)
    params = jax.tree.map(jnp.asarray, nest(p.params))
    found, state = tx.update(nest(p.gradients), tx.init(params), params)
  chex.assert_trees_all_close(found, nest(turned), rtol=1e-12, atol=1e-12)
  assert_reported(state, report)


def test_state_over_many_steps_under_a_schedule() -> None:
  """Catches counters that skip, a schedule read at the wrong step, distance after the step."""
  rng = np.random.default_rng(0)
  params, anchors = ({name: rng.standard_normal(3) for name in 'ab'} for _ in range(2))
  strengths, held = [0.0, 1.0, 0.5, 2.0, 1.0, 0.0, 1.0, 3.0], {'a': 0, 'b': 0}
  with x64():
    tx = spd.with_projection_decay(GIVEN, anchors, lambda count: jnp.asarray(strengths)[count])
    state = start = tx.init(params)
    for t, strength in enumerate(strengths):
      gradients, updates = ({name: rng.standard_normal(3) for name in 'ab'} for _ in range(2))
      after, report = reference.with_projection_decay(params, gradients, updates, anchors, strength)
      found, state = tx.update(gradients, state, params, given=updates)
      chex.assert_trees_all_close(optax.apply_updates(params, found), after, rtol=1e-12)
      chex.assert_trees_all_equal_shapes_and_dtypes(state, start)
      held = {name: held[name] + report[name].condition for name in held}
      own, params = state.projection_decay, after
      assert own.count == t + 1
      chex.assert_trees_all_equal(own.constrained, jax.tree.map(np.int32, held))
      chex.assert_trees_all_close(own.ratio, ratios(report), rtol=2e-7)
      chex.assert_trees_all_close(own.distance['a'], np.float32(report['a'].distance), rtol=2e-7)
  assert 0 < held['a'] < len(strengths)


def test_a_gradient_that_turns_while_momentum_carries_on() -> None:
  """Catches the flipped sign, and a condition on the momentum: only the third step is held.

  SGD with momentum 0.9 has gone 0.1 and 0.19 outward and wants to go 0.151 more.
  """
  params, conditions = jnp.array([1.0, -1.0]), []
  tx = spd.with_projection_decay(optax.sgd(0.1, momentum=0.9))
  state = tx.init(params)
  for gradient, expected in [(-1.0, 0.1), (-1.0, 0.29), (0.2, 0.29), (-0.2, 0.4459)]:
    updates, state = tx.update(jnp.full(2, gradient), state, params)
    params = optax.apply_updates(params, updates)
    conditions.append(bool(state.projection_decay.condition['']))
    np.testing.assert_allclose(params, [1 + expected, -1 + expected], rtol=1e-6)
  assert conditions == [False, False, True, False]


def test_a_turned_gradient_is_pulled_and_an_outward_one_is_not_touched() -> None:
  """Catches a pull with the wrong sign: cos = 1 gives g' = (1 + λ (1 + m)) g for φ = cos + m."""
  params, anchor = jnp.array([1.3, -0.7]), jnp.array([1.0, -1.0])
  tx = spd.projection_decay(anchor, 2.0, margin=0.25)
  factor = 1 + 2 * 1.25
  for gradient, expected in [(0.2, 0.2 * factor), (-0.2, -0.2)]:
    found, state = tx.update(jnp.full(2, gradient), tx.init(params), params)
    np.testing.assert_allclose(found, [expected, expected], rtol=2e-7)
    assert state.condition[''] == (gradient > 0)


def test_a_straight_walk_is_never_held() -> None:
  """Catches a rule "fixed" to fire on smooth problems."""
  tx, params = spd.adam_spd(0.1), {'w': jnp.array([3.0, -4.0])}
  state = tx.init(params)
  for _ in range(20):
    updates, state = tx.update(jax.tree.map(jnp.ones_like, params), state, params)
    params = optax.apply_updates(params, updates)
  assert state.projection_decay.constrained['w'] == 0


@pytest.mark.parametrize('anchor', [None, {'w': np.ones((2, 3), np.float32)}])
@pytest.mark.parametrize('form', ['projection_decay', 'with_projection_decay', 'adam_spd'])
def test_the_first_step_from_the_anchor_is_free(form: str, anchor: Any) -> None:
  """Catches a capture of something else than θ, and ≤ instead of <."""
  tx, plain = {
    'projection_decay': (spd.projection_decay(anchor), optax.identity()),
    'with_projection_decay': (spd.with_projection_decay(optax.sgd(0.1), anchor), optax.sgd(0.1)),
    'adam_spd': (spd.adam_spd(0.1, anchor), optax.adam(0.1)),
  }[form]
  params = {'w': jnp.ones((2, 3))}
  gradients = {'w': jax.random.normal(jax.random.key(0), (2, 3))}
  updates, state = tx.update(gradients, tx.init(params), params)
  chex.assert_trees_all_equal(updates, plain.update(gradients, plain.init(params), params)[0])
  assert not optax.tree.get(state, 'condition')['w']


def test_projection_decay_reports_no_pull_where_there_is_none() -> None:
  """Catches a ratio ("the size of the pull") of `margin` at the anchor and without a gradient."""
  params, gradients = {'w': jnp.ones(3), 'z': jnp.ones(3)}, {'w': jnp.ones(3), 'z': jnp.zeros(3)}
  tx = spd.projection_decay({'w': jnp.ones(3), 'z': jnp.zeros(3)}, margin=0.1)
  state = tx.update(gradients, tx.init(params), params)[1]
  chex.assert_trees_all_equal(state.condition, {'w': np.array(False), 'z': np.array(False)})
  chex.assert_trees_all_equal(state.ratio, {'w': np.float32(0), 'z': np.float32(0)})


def noisy_run(tx: Any, arrange: Any) -> tuple[Any, Any]:
  """Params and conditions over 12 noisy steps from rest; `arrange` makes the tree of one array."""
  rng = np.random.default_rng(3)
  params, history = jax.tree.map(jnp.asarray, arrange(rng.standard_normal((3, 4, 2)))), []
  state, update = tx.init(params), jax.jit(tx.update)
  for _ in range(12):
    updates, state = update(arrange(rng.standard_normal((3, 4, 2))), state, params)
    params = optax.apply_updates(params, updates)
    history.append((params, optax.tree.get(state, 'condition')))
  return history[-1][0], [condition for _, condition in history]


def float32(array: Any) -> dict[str, Any]:
  return {'w': jnp.float32(array)}


FORMS = {
  'projection_decay': lambda **kw: optax.chain(spd.projection_decay(**kw), optax.adam(0.1)),
  'with_projection_decay': lambda **kw: spd.with_projection_decay(optax.adam(0.1), **kw),
}


@pytest.mark.parametrize('form', FORMS)
@pytest.mark.parametrize('axis', [pytest.param(0, marks=pytest.mark.slow), 1, -1])
def test_stacked_slices_are_separate_leaves(form: str, axis: int) -> None:
  """Catches one condition for a whole scanned model, and sums over the wrong axes."""

  def unstack(array: Any) -> dict[str, Any]:
    return {f'{i}': layer for i, layer in enumerate(jnp.moveaxis(array, axis, 0))}

  with x64():
    stacked, held = noisy_run(FORMS[form](stack_axis=axis), lambda array: {'w': array})
    leaves, expected = noisy_run(FORMS[form](), unstack)
    chex.assert_trees_all_close(unstack(stacked['w']), leaves, rtol=1e-12)
  held = np.stack([condition['w'] for condition in held])
  np.testing.assert_array_equal(held, [list(condition.values()) for condition in expected])
  assert len(np.unique(held[:, 0] ^ held[:, 1])) == 2  # slices differ, but not always


@pytest.mark.parametrize('form', FORMS)
@pytest.mark.parametrize('axis', [None, 0])
def test_a_group_is_one_concatenated_leaf(form: str, axis: int | None) -> None:
  """Catches a group whose members keep norms or conditions of their own."""

  def parts(array: Any) -> dict[str, Any]:
    return {'kernel': array[:, :3], 'bias': array[:, 3]}

  with x64():
    whole, expected = noisy_run(FORMS[form](stack_axis=axis), lambda array: {'w': array})
    split, held = noisy_run(FORMS[form](stack_axis=axis, group=lambda path: 'w'), parts)
    chex.assert_trees_all_close(split, parts(whole['w']), rtol=1e-12)
  chex.assert_trees_all_equal(held, expected)
  assert 0 < np.mean([condition['w'] for condition in held]) < 1


@pytest.mark.parametrize('form', FORMS)
@pytest.mark.parametrize(('strength', 'margin'), [(0.0, 0.25), (1.0, 0.0), (0.75, 0.25)])
def test_traced_strength_and_margin_are_the_numbers(
  form: str, strength: float, margin: float
) -> None:
  """Catches a margin or strength that only a Python number can set."""

  def make(strength: Any, margin: Any) -> Any:
    return FORMS[form](strength=strength, margin=margin)

  with x64():  # in float32, XLA's fusions of the two programs part by some rounding
    traced = noisy_run(optax.inject_hyperparams(make)(strength, margin), lambda array: {'w': array})
    found = noisy_run(make(strength, margin), lambda array: {'w': array})
    chex.assert_trees_all_close(traced, found, rtol=1e-12)


@pytest.mark.parametrize('form', FORMS)
def test_strength_zero_is_the_inner_optimizer_bit_for_bit(form: str) -> None:
  """Catches arithmetic that is left over at λ = 0, also by way of XLA's fusions under jit."""
  found, held = noisy_run(FORMS[form](strength=0.0), float32)
  assert any(condition['w'] for condition in held)
  chex.assert_trees_all_equal(found, noisy_run(optax.adam(0.1), float32)[0])


ADAM = {'b1': 0.7, 'b2': 0.8, 'eps': 0.1, 'eps_root': 0.2, 'mu_dtype': 'bfloat16', 'nesterov': True}


def test_adam_spd_hands_everything_to_optax_adam() -> None:
  """Catches an argument of `optax.adam` that is dropped or swapped with another."""
  own = {'strength': 0.5, 'margin': 0.2, 'stack_axis': 1, 'group': lambda path: 'all'}

  found = noisy_run(spd.adam_spd(0.1, **ADAM, **own), float32)
  wrapped = spd.with_projection_decay(optax.adam(0.1, **ADAM), **own)
  chex.assert_trees_all_equal(found, noisy_run(wrapped, float32))
  for name in ADAM:
    default = inspect.signature(optax.adam).parameters[name].default
    other = noisy_run(spd.adam_spd(0.1, **{**ADAM, name: default}, **own), float32)
    assert not np.array_equal(other[0]['w'], found[0]['w']), name
