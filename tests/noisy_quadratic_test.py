"""The theory of examples/noisy_quadratic.py against draws of its Gaussians, and its simulation."""

from typing import Any

import numpy as np
import optax
import pytest

import noisy_quadratic
import spd_optax as spd
from suite import tried

pytestmark = pytest.mark.examples

DRAWS = 400_000
ERRORS = 4  # standard errors


def agree(values: np.ndarray, expected: float) -> None:
  error = values.std(ddof=1) / np.sqrt(len(values))
  assert abs(values.mean() - expected) < ERRORS * error, (values.mean(), expected, error)


@pytest.mark.parametrize('momentum', [0.5, 0.9])
def test_with_projection_decay_balances_in_a_draw(momentum: float) -> None:
  """Catches wrong integrals, and a gradient without the mean that it has at the offset."""
  share, offset = noisy_quadratic.with_projection_decay(momentum)
  rng = np.random.default_rng(0)
  kappa = -offset / (1 - momentum)
  spread = momentum / np.sqrt(1 - momentum**2)
  g, w = offset + rng.normal(size=DRAWS), momentum * kappa + spread * rng.normal(size=DRAWS)
  held = (g > 0) & (w > g)
  assert kappa > 0.01
  agree(np.where(held, w - g, 0), kappa)
  agree(held.astype(float), share)


def test_with_projection_decay_without_momentum_never_acts() -> None:
  """Catches 0/0 at β = 0, and a wrong limit for small β, where κ ≈ β² / 2√(8π)."""
  assert noisy_quadratic.with_projection_decay(0.0) == (0.0, 0.0)
  share, offset = noisy_quadratic.with_projection_decay(0.01)
  assert share == pytest.approx(0.01 / (2 * np.pi), rel=0.01)
  assert offset == pytest.approx(-0.99 * 0.01**2 / 2 / np.sqrt(8 * np.pi), rel=0.02)


@pytest.mark.parametrize(('strength', 'margin', 'size'), [(1.0, 0.0, 1), (3.0, 0.05, 100)])
def test_projection_decay_balances_in_a_draw(strength: float, margin: float, size: int) -> None:
  """Catches a wrong expectation: the turned gradient is 0 on average at the offset."""
  share, offset = noisy_quadratic.projection_decay(strength, margin, size)
  g = offset + np.random.default_rng(1).normal(size=DRAWS)
  pull = np.maximum(g + margin * np.sqrt(size), 0)
  assert offset < -0.1
  agree(g + strength * pull, 0.0)
  agree((pull > 0).astype(float), share)


def chain(rate: float) -> optax.GradientTransformation:
  return optax.chain(spd.projection_decay(0, 1.0, margin=0.0), optax.sgd(rate, momentum=0.9))


def wrapped(rate: float) -> optax.GradientTransformation:
  return spd.with_projection_decay(optax.sgd(rate, momentum=0.9), 0, margin=0.0)


@pytest.mark.parametrize(
  ('make', 'theory'),
  [
    (chain, noisy_quadratic.projection_decay(1.0)),
    (wrapped, noisy_quadratic.with_projection_decay(0.9)),
  ],
)
def test_the_library_does_what_theory_says(make: Any, theory: tuple[float, float]) -> None:
  """Catches a simulation that measures another layer's, another step's or no condition."""
  found = noisy_quadratic.simulate(make(noisy_quadratic.RATE), 1, 20, 6000)
  agree(np.array(found['held']), theory[0])
  agree(np.array(found['offset']), theory[1])
  assert np.mean(found['offset']) < -0.01


def test_tables_and_picture(tmp_path: Any) -> None:
  """Catches theory and simulation that are swapped, and shares that are not in %."""
  simulated = {'held': [0.2, 0.4], 'offset': [-0.1, -0.3]}
  point = (0.9, (0.25, -0.5), simulated)
  found = {'with_projection_decay: momentum β': [point], 'projection_decay: strength λ': [point]}
  row = noisy_quadratic.table(found)['with_projection_decay: momentum β = 0.9']
  assert row['held, theory (%)'] == '25.0'
  assert row['held (%)'] == [20, 40]
  assert (row['offset, theory'], row['offset']) == ('-0.500', '-0.200 ± 0.100')
  noisy_quadratic.picture(tmp_path / 'a.png', found)
  assert (tmp_path / 'a.png').read_bytes().startswith(b'\x89PNG')


def test_a_layer_that_overshoots_may_leave_its_anchor() -> None:
  """Catches a rule that holds a layer for good where its first steps took it."""
  table = noisy_quadratic.curvatures(1, (1.0,))
  progress = {name: float(row['c = 1'].split()[0]) for name, row in table.items()}
  assert progress['Adam'] > 0.7
  for free in ('SignificantProjection', 'tried: Relieved', 'tried: NeitherWay'):
    assert progress[free] > 0.5, free
  for stuck in ('with_projection_decay', 'SignificantProjection, k = 0'):  # else nothing is tested
    assert progress[stuck] < 0.2, stuck


def test_relief_holds_a_layer_of_noise_as_the_paper_does() -> None:
  """Catches a relief that frees every layer."""

  def found(rule: spd.Rule) -> dict[str, float]:
    optimizer = spd.with_projection_decay(optax.adam(0.001), 0, rule=rule)
    each = noisy_quadratic.fine_tuned(optimizer, 800, 1, curvature=0.0)
    return {name: float(np.mean(values)) for name, values in each.items()}

  paper, relieved = found(spd.Projection()), found(tried.Relieved())
  assert relieved['held'] > 0.1
  assert relieved['noise'] == pytest.approx(paper['noise'], rel=0.05)
