"""Every dtype, zero, NaN, infinity and overflow, in both forms."""

import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from reference import x64

import spd_optax as spd

NAN, INF = float('nan'), float('inf')
DTYPES = ['bfloat16', 'float16', 'float32', 'float64', 'complex64', 'complex128']


def form1(anchor: Any = 0, strength: Any = 1.0, **options: Any) -> Any:
  return spd.projection_decay(anchor, strength, **options)


def form2(anchor: Any = 0, strength: Any = 1.0, **options: Any) -> Any:
  """Around an optimizer that goes uphill: a layer that is held grows, too."""
  return spd.with_projection_decay(optax.identity(), anchor, strength, **options)


FORMS = pytest.mark.parametrize('form', [form1, form2])
MARGINS = pytest.mark.parametrize('margin', [0.0, 0.1])


def one_step(tx: Any, params: Any, gradients: Any, state: Any = None) -> Any:
  """The updates, and SPD's own state."""
  state = tx.init(params) if state is None else state
  updates, state = tx.update(gradients, state, params)
  return updates, getattr(state, 'projection_decay', state)


def expected_step(form: Any, params: Any, gradients: Any, anchors: Any, margin: float) -> Any:
  """The updates in complex128, and the conditions, from the reference."""
  if form is form1:
    updates, report = reference.projection_decay(params, gradients, anchors, margin=margin)
  else:
    after, report = reference.with_projection_decay(
      params, gradients, gradients, anchors, margin=margin
    )
    updates = {name: after[name] - params[name] for name in params}
  return updates, {name: np.asarray(layer.condition) for name, layer in report.items()}


def complex128(tree: Any) -> Any:
  return jax.tree.map(lambda x: np.asarray(x, complex), tree)


@FORMS
@MARGINS
@pytest.mark.parametrize('dtype', DTYPES)
def test_every_dtype_is_rounded_once(dtype: str, margin: float, form: Any) -> None:
  """Catches updates that are rounded twice, or promoted, and wrong complex products."""
  rng = np.random.default_rng(1)

  def random() -> dict[str, jax.Array]:
    imaginary = 1j if dtype.startswith('complex') else 0
    draws = {name: rng.standard_normal((2, 5)) for name in 'abcd'}
    return {n: jnp.asarray(x[0] + imaginary * x[1], dtype) for n, x in draws.items()}

  with x64():
    params, gradients, anchors = random(), random(), random()
    found, state = one_step(form(anchors, margin=margin), params, gradients)
    exact = map(complex128, (params, gradients, anchors))
    expected, condition = expected_step(form, *exact, margin)
  chex.assert_trees_all_equal_dtypes(found, params, state.anchor)
  eps = float(jnp.finfo(dtype).eps)
  eps_of_sums = min(eps, float(np.finfo(np.float32).eps))  # float32 or wider
  chex.assert_trees_all_close(complex128(found), expected, rtol=0.51 * eps, atol=16 * eps_of_sums)
  chex.assert_trees_all_equal(state.condition, condition)
  assert {bool(held) for held in condition.values()} == {True, False}


@FORMS
@pytest.mark.parametrize(
  ('dtype', 'step'), [('bfloat16', 2**-7), ('float16', 2**-10), ('float64', 2**-23)]
)
def test_products_are_wider_than_the_params(dtype: str, step: float, form: Any) -> None:
  """Catches ⟨g, d⟩ in the params' dtype, or in float32 for float64 params.

  There (1 + ε)² − (1 + 2ε) is 0; exactly it is ε² > 0, and the layer is held.
  """
  with x64():
    params = jnp.array([1 + step, 1 + 2 * step], dtype)
    gradients = jnp.array([1 + step, -1.0], dtype)
    held = [one_step(form(margin=0.0), params, sign * gradients)[1] for sign in (1, -1)]
    assert [bool(state.condition['']) for state in held] == [True, False]


@FORMS
@pytest.mark.parametrize('size', [300.0, 1e-4])
def test_sums_beyond_float16(size: float, form: Any) -> None:
  """Catches squares in float16: 300² is infinite there, 1e-4² is 0."""
  params = jnp.full(4, size, jnp.float16)
  updates, state = one_step(form(), params, params)
  assert state.condition['']
  np.testing.assert_allclose(state.distance[''], 2 * np.float32(params[0]), rtol=1e-6)
  assert np.isfinite(updates).all()


def test_a_growth_that_bfloat16_cannot_see_is_measured() -> None:
  """Catches θ̃, or norms, in bfloat16: 1 + 2^-9 is 1 there, and ‖1‖ = √1000 is 31.625."""
  params, gradients = jnp.ones(1000, jnp.bfloat16), jnp.full(1000, 2**-9, jnp.bfloat16)
  _, state = one_step(form2(), params, gradients)
  np.testing.assert_allclose(state.ratio[''], 1 - 1 / (1 + 2**-9), rtol=1e-4)
  np.testing.assert_allclose(state.distance[''], np.sqrt(1000), rtol=1e-6)


@FORMS
def test_an_anchor_in_bfloat16_does_not_round_the_params(form: Any) -> None:
  """Catches a deviation in the anchor's dtype: 1 + 2^-10 is 1 in bfloat16."""
  tx, params = form(jnp.ones(4), anchor_dtype=jnp.bfloat16), jnp.full(4, 1 + 2**-10)
  _, state = one_step(tx, params, jnp.ones(4))
  assert state.anchor.dtype == jnp.bfloat16
  np.testing.assert_allclose(state.distance[''], 2 * 2**-10, rtol=1e-6)


@FORMS
def test_complex_products_are_real_inner_products(form: Any) -> None:
  """Catches a missing conjugate (i·i = −1), and |⟨g, d⟩| for Re⟨g, d⟩."""
  params = jnp.array([1j, 1 + 1j])
  for factor, held in [(1, True), (-1, False), (1j, False), (1j + 1e-3, True), (1j - 1e-3, False)]:
    _, state = one_step(form(margin=0.0), params, factor * params)
    assert bool(state.condition['']) == held, factor


ZEROS = {
  'no_gradient': (1.0, 0.0),
  'at_anchor': (0.0, 1.0),
  'both': (0.0, 0.0),
  'usual': (1.0, 1.0),
}


@MARGINS
@pytest.mark.parametrize('stack_axis', [None, 0])
@pytest.mark.parametrize('wrap', [jax.jit, lambda function: function])
def test_zeros_and_empty_leaves(wrap: Any, stack_axis: Any, margin: float) -> None:
  """Catches 0/0 anywhere, also where a mask hides it: without jit each operation is checked."""
  shapes = {**dict.fromkeys(ZEROS, (3, 2)), 'empty': (3, 0)}
  params, gradients = (
    {name: jnp.full(shape, ZEROS.get(name, (1, 1))[i]) for name, shape in shapes.items()}
    for i in (0, 1)
  )
  anchor = jax.tree.map(jnp.zeros_like, params)
  options = {'margin': margin, 'stack_axis': stack_axis}
  with jax.debug_nans(True), jax.debug_infs(True):
    for tx in (form1(anchor, **options), form2(anchor, **options), form2(0, **options)):
      updates, state = wrap(tx.update)(gradients, tx.init(params), params)
      for _ in range(2):
        updates, state = wrap(tx.update)(gradients, state, params)
      held = optax.tree.get(state, 'condition')
      assert {name for name in held if np.any(held[name])} == {'usual'}
      chex.assert_trees_all_equal(
        *({n: t[n] for n in t if n != 'usual'} for t in (updates, gradients))
      )


BAD = pytest.mark.parametrize('bad', [NAN, INF, -INF])
WHERE = pytest.mark.parametrize('where', [np.s_[...], np.s_[1, 0]], ids=['whole', 'one'])


def three_layers(bad: float, where: Any) -> Any:
  """Params, gradients that hold every layer, and the same with `bad` in one leaf and one slice."""
  params = {'bad': jnp.ones((2, 2)), 'good': jnp.ones((3, 2)), 'stack': jnp.ones((2, 3))}
  gradients = jax.tree.map(lambda p: 0.3 * p, params)
  broken = {
    'bad': gradients['bad'].at[where].set(bad),
    'good': gradients['good'],
    'stack': gradients['stack'].at[1, 0].set(bad),
  }
  return params, gradients, broken


@functools.cache
def stepper(form: Any, anchor: float | None, margin: float) -> Any:
  """`one_step` for the three layers, compiled once; the anchor is full of a number, or captured."""
  full = None if anchor is None else jax.tree.map(lambda p: anchor * p, three_layers(0.0, ...)[0])
  tx = form(full, margin=margin, stack_axis={'bad': None, 'good': None, 'stack': 0})
  update = jax.jit(tx.update)

  def step(params: Any, gradients: Any, state: Any = None) -> Any:
    updates, state = update(gradients, tx.init(params) if state is None else state, params)
    return updates, state, getattr(state, 'projection_decay', state)

  return step


@FORMS
@MARGINS
@BAD
@WHERE
def test_a_bad_gradient_holds_nothing(bad: Any, where: Any, margin: float, form: Any) -> None:
  """Catches NaN that passes a comparison, and one layer's NaN that reaches another's sums."""
  params, gradients, broken = three_layers(bad, where)
  step = stepper(form, 0.0, margin)
  expected, _, usual = step(params, gradients)
  assert all(np.all(held) for held in usual.condition.values())
  updates, _, own = step(params, broken)
  condition = {'bad': np.array(False), 'good': np.array(True), 'stack': np.array([True, False])}
  chex.assert_trees_all_equal(own.condition, condition)
  chex.assert_trees_all_equal(own.constrained, jax.tree.map(np.int32, condition))
  chex.assert_trees_all_equal(updates['good'], expected['good'])
  chex.assert_trees_all_equal(updates['stack'][0], expected['stack'][0])
  chex.assert_trees_all_equal(updates['bad'], broken['bad'])


@FORMS
@MARGINS
@BAD
@WHERE
def test_a_bad_gradient_leaves_no_trace(bad: Any, where: Any, margin: float, form: Any) -> None:
  """Catches an anchor captured from a damaged step, and NaN that stays in the state."""
  params, gradients, broken = three_layers(bad, where)
  _, state, own = stepper(form, None, margin)(params, broken)
  chex.assert_trees_all_equal(own.anchor, params)
  assert not any(np.any(held) for held in own.condition.values())
  later = jax.tree.map(lambda p: 1.5 * p, params)
  found = stepper(form, None, margin)(later, gradients, state)
  fixed = stepper(form, 1.0, margin)(later, gradients)
  chex.assert_trees_all_equal(found[0], fixed[0])


@FORMS
@MARGINS
@BAD
def test_the_reports_of_a_bad_step_are_finite(bad: float, margin: float, form: Any) -> None:
  """Catches NaN in a log of ratios, from ∞/∞ behind a mask."""
  params, _, broken = three_layers(bad, np.s_[1, 0])
  _, _, own = stepper(form, 0.0, margin)(params, broken)
  chex.assert_tree_all_finite((own.ratio, own.distance))


@FORMS
@MARGINS
@pytest.mark.parametrize('size', [1e20, 1e30, 1e-25])
def test_a_gradient_whose_square_leaves_float32(size: float, margin: float, form: Any) -> None:
  """Catches 0 · ∞, and a layer that counts as held though ‖g‖, and so the cosine, is not known."""
  params, gradients = {'w': jnp.array([1.0, 2.0])}, {'w': jnp.array([size, size / 2])}
  updates, state = one_step(form(margin=margin), params, gradients)
  needed = form is form1 or margin > 0
  assert bool(state.condition['w']) == (not needed)
  assert not needed or np.array_equal(updates['w'], gradients['w'])
  chex.assert_tree_all_finite((updates, state))


@FORMS
@pytest.mark.parametrize('special', [-0.0, NAN, INF, 1e-42])
def test_strength_zero_keeps_every_bit(special: float, form: Any) -> None:
  """Catches u + 0 · d, which loses −0, spreads NaN and flushes subnormal numbers."""
  gradients = jnp.array([special, 1.0, 3.0], jnp.float32)
  for strength in (0.0, lambda count: 0.0 * count):
    updates, _ = one_step(form(0, strength, margin=0.5), jnp.ones(3), gradients)
    assert np.asarray(updates).tobytes() == np.asarray(gradients).tobytes()


@FORMS
def test_a_step_can_be_differentiated(form: Any) -> None:
  """Catches an operation without a derivative on the way, and a wrong one (meta-learning)."""
  params = jnp.array([1.0, -2.0, 3.0])

  def length(strength: jax.Array) -> jax.Array:
    tx = form(strength=strength)
    updates, _ = tx.update(params / 7, tx.init(params), params)
    return jnp.sum((params + updates) ** 2)

  found, e = jax.grad(length)(0.5), 1e-2
  np.testing.assert_allclose(found, (length(0.5 + e) - length(0.5 - e)) / (2 * e), rtol=1e-2)
  assert found != 0


CHAINS = {
  'in the chain': lambda anchor: optax.chain(spd.projection_decay(anchor), optax.sgd(0.1)),
  'with_projection_decay': lambda anchor: spd.with_projection_decay(
    optax.sgd(0.1, momentum=0.9), anchor
  ),
}


@pytest.mark.parametrize('make', CHAINS.values(), ids=CHAINS)
def test_steps_from_the_anchor_can_be_differentiated(make: Any) -> None:
  """Catches √'(0) · 0 = NaN, and a sum of which some terms have no derivative."""
  anchor = jnp.array([[1.0, 2.0], [-3.0, 1.0]])
  tx = make(anchor)

  def loss(scale: Any, params: Any) -> jax.Array:
    state = tx.init(anchor)
    for turn in (1.0, 1.0, -0.1):
      updates, state = tx.update(turn * scale * (params + 1), state, params)
      params = optax.apply_updates(params, updates)
    return jnp.sum(params**2)

  assert jnp.all(jnp.isfinite(jax.jit(jax.grad(loss, 1))(1.0, anchor)))
  with x64():
    found, e, loss = jax.jit(jax.grad(loss))(1.0, anchor), 1e-3, jax.jit(loss)
    expected = (loss(1 + e, anchor) - loss(1 - e, anchor)) / (2 * e)
  np.testing.assert_allclose(found, expected, rtol=1e-3)
