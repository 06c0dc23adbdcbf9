"""Each equation against its hand-expanded value, at zero, and where sums are not finite."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from reference import x64

from spd_optax import formulas

NAN, INF = float('nan'), float('inf')
MARGINS = [0.0, 0.1, 0.5, 0.99]
BAD = [NAN, INF, -INF]

sizes = st.floats(0, 1e15) | st.floats(1e-15, 1e-3)
scales = st.floats(1e-10, 1e10)
cosines = st.floats(-1, 1).map(lambda x: round(x, 6))  # no subnormals: XLA flushes them
margins = st.floats(0, 0.99).map(lambda x: round(x, 6))


@st.composite
def layers(draw):
  """⟨g, d⟩, ‖g‖, ‖d‖ of two random vectors, far from the margins' edge."""
  g = np.array(draw(st.lists(st.integers(-9, 9), min_size=3, max_size=3)), float)
  d = np.array(draw(st.lists(st.integers(-9, 9), min_size=3, max_size=3)), float)
  return np.dot(g, d), np.linalg.norm(g), np.linalg.norm(d)


def arrays(*values):
  return [jnp.asarray(value) for value in values]


def test_divide_is_numpys_quotient_or_zero():
  """Catches a mask that also hides good quotients, or is applied after dividing."""
  with jax.debug_nans(True):
    found = formulas.divide(jnp.array([3.0, 3.0, 0.0, -3.0]), jnp.array([4.0, 0.0, 0.0, 4.0]))
  np.testing.assert_array_equal(found, [0.75, 0.0, 0.0, -0.75])


def test_cosine_of_vectors():
  """Catches a square too many or a norm too few: cos of (3, 4) and (4, 3) is 24/25."""
  found = formulas.cosine(*arrays([24.0, -24.0, 25.0], [5.0, 5.0, 5.0], [5.0, 5.0, 5.0]))
  np.testing.assert_allclose(found, [0.96, -0.96, 1.0], rtol=1e-7)


def test_cosine_where_the_product_of_norms_leaves_float32():
  """Catches ‖g‖‖d‖ as the denominator: 1e20² is infinite in float32."""
  found = formulas.cosine(*arrays([1e38, -1e30, 5e-26], [1e20, 1e20, 1e-25], [1e20, 1e20, 1.0]))
  np.testing.assert_allclose(found, [1e-2, -1e-10, 0.5], rtol=1e-6)


def test_cosine_is_clipped():
  """Catches rounding that carries a cosine past 1."""
  np.testing.assert_array_equal(
    formulas.cosine(*arrays([1.0001, -1.0001], [1.0, 1.0], [1.0, 1.0])), [1, -1]
  )


@given(layers(), scales)
def test_cosine_is_scale_free_and_within_one(layer, scale):
  """Catches a cosine that depends on the size of the loss, as one with an ε would."""
  inner, gradient_norm, distance = layer
  with x64():
    found = float(formulas.cosine(*arrays(inner, gradient_norm, distance)))
    scaled = float(formulas.cosine(*arrays(inner * scale, gradient_norm * scale, distance)))
  expected = inner / (gradient_norm * distance) if gradient_norm * distance else 0.0
  np.testing.assert_allclose([found, scaled], expected, rtol=1e-12, atol=0)
  assert -1 <= found <= 1


def test_turned_back_is_the_papers_sign():
  """Catches the flipped sign, and ≤ for <: c = −⟨g, d⟩ < 0 holds a layer, c = 0 does not."""
  inner = jnp.array([2.0, 1e-37, 0.0, -0.0, -1e-37, -2.0])
  np.testing.assert_array_equal(formulas.turned_back(inner), [True, True] + [False] * 4)


@pytest.mark.parametrize('bad', BAD)
def test_sums_that_are_not_finite_hold_nothing(bad):
  """Catches norms out of the range of their dtype that turn into a constraint."""
  for margin in MARGINS:
    for norms in ([abs(bad), 1.0], [1.0, abs(bad)], [0.0, 1.0], [1.0, 0.0]):
      assert not formulas.not_clearly_outward(*arrays(1.0, *norms), margin), (norms, margin)


def test_margin_by_hand():
  """Catches a margin on the wrong side, or times one norm: c < m ‖g‖ ‖d‖ is −inner < 0.1·2·5."""
  inner = jnp.array([3.0, 0.0, -0.99, -1.01, -10.0])
  held = formulas.not_clearly_outward(inner, jnp.asarray(2.0), jnp.asarray(5.0), 0.1)
  np.testing.assert_array_equal(held, [True, True, True, False, False])


@given(layers(), margins)
def test_margin_means_cosine_above_minus_margin(layer, margin):
  """Catches a condition and a cosine that disagree: `projection_decay` needs both."""
  inner, gradient_norm, distance = layer
  with x64():
    held = formulas.not_clearly_outward(*arrays(inner, gradient_norm, distance), margin)
  cos = inner / (gradient_norm * distance) if gradient_norm * distance else NAN
  if abs(cos + margin) > 1e-9:
    assert held == (cos > -margin)
  if np.isnan(cos):
    assert not held


@given(layers(), scales)
def test_margin_zero_is_the_papers_condition(layer, scale):
  """Catches two conditions that part at m = 0, or change with the size of the loss."""
  inner, gradient_norm, distance = layer
  with x64():
    plain = formulas.turned_back(jnp.asarray(inner))
    scaled = arrays(inner * scale, gradient_norm * scale, distance)
    assert formulas.not_clearly_outward(*scaled, 0.0) == plain == (inner > 0)


def test_projection_ratio_by_hand():
  """Catches γ_{t−1} as the denominator (0.25 → 0.333), or growth that is not cut off at 0."""
  found = formulas.projection_ratio(*arrays([3.0, 4.0, 4.0, 0.0], [4.0, 4.0, 3.0, 2.0]))
  np.testing.assert_array_equal(found, [0.25, 0.0, 0.0, 1.0])


def test_projection_ratio_at_zero_and_beyond_floats():
  """Catches 0/0 at the anchor, and ∞/∞ after an update that is not finite."""
  with jax.debug_nans(True):
    assert formulas.projection_ratio(*arrays(0.0, 0.0)) == 0
    assert formulas.projection_ratio(*arrays(1.0, 0.0)) == 0
    assert formulas.projection_ratio(*arrays(1.0, INF)) == 0
  for sums in ([INF, INF], [1.0, NAN], [NAN, NAN], [INF, 1.0]):
    assert formulas.projection_ratio(*arrays(*sums)) == 0, sums


@given(sizes, sizes, scales)
def test_projection_ratio_is_a_part(before, after, scale):
  """Catches a ratio outside [0, 1], or one that depends on the unit of length."""
  with x64():
    ratio = float(formulas.projection_ratio(*arrays(before, after)))
    scaled = float(formulas.projection_ratio(*arrays(before * scale, after * scale)))
  assert 0 <= ratio <= 1
  np.testing.assert_allclose(ratio, max(0, after - before) / after if after else 0, rtol=1e-15)
  np.testing.assert_allclose(scaled, ratio, rtol=1e-9, atol=1e-14)


@given(sizes, sizes)
def test_projection_ratio_projects(before, after):
  """Catches any other ratio: (1 − r) γ_t is γ_{t−1} where the layer grew (eq. 10)."""
  with x64():
    ratio = float(formulas.projection_ratio(*arrays(before, after)))
  np.testing.assert_allclose(
    (1 - ratio) * after, min(before, after), rtol=1e-12, atol=1e-15 * after
  )


def test_pull_by_hand():
  """Catches a pull on layers that move freely, and a margin with the wrong sign."""
  cos = jnp.array([1.0, 0.5, 0.0, -0.1, -0.3, -1.0])
  np.testing.assert_array_equal(formulas.pull(cos, 0.0), jnp.array([1.0, 0.5, 0, 0, 0, 0]))
  np.testing.assert_allclose(formulas.pull(cos, 0.25), [1.25, 0.75, 0.25, 0.15, 0, 0], rtol=1e-6)


@given(cosines, margins)
def test_pull_is_positive_exactly_where_the_layer_is_held(cos, margin):
  """Catches a φ that pulls a free layer, leaves a held one alone, or is not bounded."""
  with x64():
    pull = float(formulas.pull(jnp.asarray(cos), margin))
  assert (pull > 0) == (cos > -margin)
  assert 0 <= pull <= 1 + margin


@pytest.mark.parametrize('margin', MARGINS)
def test_zero_gradients_and_zero_deviations(margin):
  """Catches 0/0 in any of the equations, and a layer at its anchor that is held."""
  zero, one = jnp.zeros(3), jnp.ones(3)
  with jax.debug_nans(True), jax.debug_infs(True):
    for norms in ((zero, zero), (one, zero), (zero, one)):
      np.testing.assert_array_equal(formulas.cosine(zero, *norms), zero)
      np.testing.assert_array_equal(
        formulas.not_clearly_outward(zero, *norms, margin), np.zeros(3, bool)
      )
