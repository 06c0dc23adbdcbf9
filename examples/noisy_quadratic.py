"""When does SPD hold a layer, and how near to the anchor does it settle? Theory and check.

    python examples/noisy_quadratic.py

A layer x in n dimensions has the loss h ‖x − x*‖² / 2 and gradients with noise of standard
deviation σ in each. It is trained by SGD with momentum β; its anchor is 0, at a distance
D = ‖x*‖ that is large against its own fluctuations. What matters then is the component along
d = x − θ_0, in which everything is a scalar problem. With h lr ≪ 1 − β:

`with_projection_decay`, λ = 1. A step is taken back where the gradient has turned, G > 0, but the
momentum V before it carries on outward: G < W with W = −β V. In units of σ, G is normal with the
mean h b / σ = −(1 − β) κ, and W is normal with the variance s² = β² / (1 − β²) and the mean β κ,
where −κ is the mean of V. The outward steps taken back, lr σ κ on average, equal the mean step
outward, −lr h b / (1 − β), at a mean offset b = E[x] − x*. With φ and Φ the normal density and
distribution:

    κ = E[max(0, W − G); G > 0]          b = −(σ/h) (1 − β) κ
    share held with r > 0 = P(0 < G < W)

Without these means they are (1/√(1 − β²) − 1) / √(8π) and arctan(s) / 2π.

`projection_decay`. Its gradient along d is G' = G + λ max(0, G + m ‖g‖); in balance E[G'] = 0. With
z = h b / σ, ‖g‖ ≈ σ √n and a = z + m √n:

    z + λ (φ(a) + a Φ(a)) = 0
    share held = Φ(a)

Neither depends on the learning rate. `with_projection_decay` is gentle: |b| is about 0.03 σ/h at
most, at any β. `projection_decay` does not need momentum. It pulls with the noise itself, and with
a margin the more the larger the layer is.

The second table asks what a rule does to layers of other sizes, and with other batches. Of n
coordinates one in eight has something to learn, in blocks of up to 1,000 neighbours: its gradient
is 0.3 σ at first, and falls to 0 on the way. The others are noise. *Progress* is the share of the
way that the first go in 300 steps with a cosine decay, *noise* how far the others end from the
anchor, in units of the learning rate.

The third table (n = 800) gives the noise weights a curvature c and their optimum at the anchor: at
one learning rate from it their gradient is c σ. They overshoot, which adds to ⟨g, d⟩ on average.
The weights that learn lower it in proportion to their distance. So ⟨g, d⟩ > 0 near the anchor
even of a layer that has far to go.
"""

import argparse
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib

matplotlib.use('Agg')
import matplotlib.pyplot as plt
import numpy as np
import optax
from scipy import integrate, optimize, stats

import reporting
import spd_optax as spd
from suite import tried

RATE, DISTANCE = 0.002, 300.0  # h = σ = 1
MOMENTA = (0.0, 0.5, 0.8, 0.9, 0.95)
STRENGTHS = (0.1, 0.3, 1.0, 3.0, 10.0)
SIZES = (1, 10, 100, 1000)  # n, at m = 0.05 and λ = 1
MARGIN = 0.05


def with_projection_decay(momentum: float) -> tuple[float, float]:
  """Theory: share of steps held, and the offset b, at λ = 1; h = σ = 1."""
  s = momentum / np.sqrt(1 - momentum**2)
  if not s:
    return 0.0, 0.0

  def held(g: float, kappa: float) -> float:
    return density(g, kappa) * stats.norm.cdf((momentum * kappa - g) / s)

  def taken_back(g: float, kappa: float) -> float:
    k = (momentum * kappa - g) / s
    return density(g, kappa) * s * (stats.norm.pdf(k) + k * stats.norm.cdf(k))

  def density(g: float, kappa: float) -> float:
    return stats.norm.pdf(g + (1 - momentum) * kappa)

  def excess(kappa: float) -> float:
    return integrate.quad(taken_back, 0, np.inf, kappa)[0] - kappa

  kappa = optimize.brentq(excess, 0, 10)
  return float(integrate.quad(held, 0, np.inf, kappa)[0]), float(-(1 - momentum) * kappa)


def projection_decay(strength: float, margin: float = 0.0, size: int = 1) -> tuple[float, float]:
  """Theory: share of steps held, and the offset b; h = σ = 1."""
  shift = margin * np.sqrt(size)

  def force(z: float) -> float:
    a = z + shift
    return z + strength * (stats.norm.pdf(a) + a * stats.norm.cdf(a))

  z = optimize.brentq(force, -shift - 10, 0)
  return float(stats.norm.cdf(z + shift)), float(z)


def simulate(
  optimizer: optax.GradientTransformation, size: int, runs: int, steps: int
) -> dict[str, list[float]]:
  """Share held with r > 0 and offset along d, a value for each run, after a third of the steps."""
  optimum = jnp.zeros(size).at[0].set(DISTANCE)

  def run(key: jax.Array) -> tuple[jax.Array, jax.Array]:
    def step(carry: Any, key: jax.Array) -> tuple[Any, Any]:
      x, state = carry
      gradient = x - optimum + jax.random.normal(key, (size,))
      updates, state = optimizer.update(gradient, state, x)
      x = x + updates
      inner = optax.tree.get(state, 'ProjectionDecayState')
      held = inner.condition[''] & (inner.ratio[''] > 0)
      return (x, state), (x[0] - DISTANCE, held)

    start = optimum, optimizer.init(optimum)
    _, (offset, held) = jax.lax.scan(step, start, jax.random.split(key, steps))
    return offset[steps // 3 :].mean(), held[steps // 3 :].mean()

  offsets, held = jax.jit(jax.vmap(run))(jax.random.split(jax.random.key(0), runs))
  return {'held': np.asarray(held).tolist(), 'offset': np.asarray(offsets).tolist()}


LEARNED, TO_GO, RATES = 8, 30, {'Adam': 1e-3, 'SGD': 1e-4}  # one in 8; 30 of Adam's rates away
BLOCK = 1000


def learned(size: int) -> jax.Array:
  """Where there is something to learn: bool[size]."""
  return (jnp.arange(size) // min(BLOCK, max(size // LEARNED, 1))) % LEARNED == 0


def fine_tuned(
  optimizer: optax.GradientTransformation,
  size: int,
  runs: int,
  *,
  batch: int = 1,
  blocks: bool = False,
  curvature: float = 0.0,
) -> dict[str, list[float]]:
  """Progress and noise of each run, and the share of steps held."""
  shape = (-1, BLOCK) if blocks and size > BLOCK else (size,)
  optimum = TO_GO * RATES['Adam']
  is_learned = learned(size).reshape(shape)

  def run(key: jax.Array) -> tuple[jax.Array, ...]:
    def step(carry: Any, key: jax.Array) -> tuple[Any, Any]:
      x, state = carry
      noise = jax.random.normal(key, x.shape) / np.sqrt(batch)
      others = curvature * x / RATES['Adam']
      gradient = jnp.where(is_learned, 0.3 * (x / optimum - 1), others) + noise
      updates, state = optimizer.update(gradient, state, x)
      held = jnp.mean(optax.tree.get(state, 'condition', {'': jnp.zeros(1)})[''])
      return (x + updates, state), held

    start = jnp.zeros(is_learned.shape)
    (x, _), held = jax.lax.scan(step, (start, optimizer.init(start)), jax.random.split(key, STEPS))
    noise = jnp.sqrt(jnp.mean(x**2, where=~is_learned)) / RATES['Adam']
    return jnp.mean(x, where=is_learned) / optimum, noise, held.mean()

  found = jax.jit(lambda keys: jax.lax.map(run, keys))(jax.random.split(jax.random.key(0), runs))
  return dict(
    zip(('progress', 'noise', 'held'), (np.asarray(x).tolist() for x in found), strict=True)
  )


STEPS = 300
CASES = [(80, 1), (800, 1), (8_000, 1), (80_000, 1), (800_000, 1), (8_000, 8), (8_000, 64)]


def rules(inner: optax.GradientTransformation) -> dict[str, tuple[Any, bool]]:
  """Optimizers by name, and whether blocks of 1,000 are layers of their own."""

  def around(**options: Any) -> Any:
    return spd.with_projection_decay(inner, 0, **options)

  significant = spd.SignificantProjection
  layers = {'stack_axis': lambda path, leaf: 0 if leaf.ndim > 1 else None}
  return {
    'alone': (inner, False),
    'with_projection_decay': (around(), False),
    'with_projection_decay, m = 0.05': (around(margin=0.05), False),
    'SignificantProjection': (around(rule=significant()), False),
    'SignificantProjection, z = 2': (around(rule=significant(2.0)), False),
    f'with_projection_decay, blocks of {BLOCK:,}': (around(**layers), True),
    f'SignificantProjection, z = 2, blocks of {BLOCK:,}': (
      around(rule=significant(2.0), **layers),
      True,
    ),
  }


def sizes(runs: int, cases: Sequence[tuple[int, int]]) -> dict[str, dict[str, str]]:
  """A row for each rule: progress / noise / share held at each size and batch."""
  table: dict[str, dict[str, str]] = {}
  for name, make in {'Adam': optax.adam, 'SGD': functools.partial(optax.sgd, momentum=0.9)}.items():
    inner = make(optax.cosine_decay_schedule(RATES[name], STEPS))
    for rule, (optimizer, blocks) in rules(inner).items():
      row = table[f'{name}: {rule}'] = {}
      for size, batch in cases:
        column = f'n = {size:,}' + (f', batch × {batch}' if batch > 1 else '')
        row[column] = cell(fine_tuned(optimizer, size, runs, batch=batch, blocks=blocks))
  return table


def cell(found: dict[str, list[float]]) -> str:
  """Progress / noise / share held, means over runs."""
  progress, noise, held = (np.mean(found[key]) for key in ('progress', 'noise', 'held'))
  return f'{progress:.2f} / {noise:.1f} / {100 * held:.0f} %'


CURVATURES = (0.0, 0.03, 0.1, 0.3, 1.0)


def curvatures(runs: int, each: Sequence[float] = CURVATURES) -> dict[str, dict[str, str]]:
  """A row for each rule around Adam, whose rate has a warm-up over a tenth of the steps."""
  adam = optax.adam(optax.warmup_cosine_decay_schedule(0, RATES['Adam'], STEPS // 10, STEPS))
  projections = {
    'with_projection_decay': spd.Projection(),
    'SignificantProjection, k = 0': spd.SignificantProjection(near=0.0),
    'SignificantProjection': spd.SignificantProjection(),
    'SignificantProjection, β = 0': spd.SignificantProjection(decay=0.0),
    'tried: Relieved': tried.Relieved(),
    'tried: NeitherWay': tried.NeitherWay(),
  }
  optimizers = {
    'Adam': adam,
    'projection_decay': optax.chain(spd.projection_decay(0), adam),
    'projection_decay, m = 0.05': optax.chain(spd.projection_decay(0, margin=MARGIN), adam),
  }
  for name, rule in projections.items():
    optimizers[name] = spd.with_projection_decay(adam, 0, rule=rule)
  return {
    name: {f'c = {k:g}': cell(fine_tuned(optimizer, 800, runs, curvature=k)) for k in each}
    for name, optimizer in optimizers.items()
  }


Point = tuple[float, tuple[float, float], dict[str, list[float]]]  # x, theory, simulation


def panels(runs: int, steps: int) -> dict[str, list[Point]]:
  """What is varied -> values, what theory says and what simulation finds."""

  def sgd(momentum: float = 0.9) -> optax.GradientTransformation:
    return optax.sgd(RATE, momentum=momentum)

  def chain(strength: float, margin: float = 0.0) -> optax.GradientTransformation:
    return optax.chain(spd.projection_decay(0, strength, margin=margin), sgd())

  def check(optimizer: optax.GradientTransformation, size: int = 1) -> dict[str, list[float]]:
    return simulate(optimizer, size, runs, steps)

  return {
    'with_projection_decay: momentum β': [
      (b, with_projection_decay(b), check(spd.with_projection_decay(sgd(b), 0))) for b in MOMENTA
    ],
    'projection_decay: strength λ': [(x, projection_decay(x), check(chain(x))) for x in STRENGTHS],
    f'projection_decay, λ = 1, m = {MARGIN}: size n': [
      (n, projection_decay(1.0, MARGIN, n), check(chain(1.0, MARGIN), n)) for n in SIZES
    ],
  }


def table(found: dict[str, list[Point]]) -> dict[str, dict[str, Any]]:
  """A row for each point: share of steps held, and the offset in units of σ/h."""
  return {
    f'{title} = {x:g}': {
      'held, theory (%)': f'{100 * share:.1f}',
      'held (%)': [100 * value for value in simulated['held']],
      'offset, theory': f'{offset:.3f}',
      'offset': f'{np.mean(simulated["offset"]):.3f} ± {stats.sem(simulated["offset"]):.3f}',
    }
    for title, points in found.items()
    for x, (share, offset), simulated in points
  }


def picture(path: Path, found: dict[str, list[Point]]) -> None:
  """Theory as lines, simulation as points."""
  figure, grid = plt.subplots(2, len(found), figsize=(11, 6), layout='constrained', sharex='col')
  for (title, points), column in zip(found.items(), grid.T, strict=True):
    x = [point[0] for point in points]
    for axes, i, name in zip(column, (0, 1), ('held', 'offset'), strict=True):
      axes.plot(x, [point[1][i] for point in points], color='0.4', label='theory')
      values = [point[2][name] for point in points]
      mean, error = np.mean(values, axis=1), stats.sem(values, axis=1)
      axes.errorbar(x, mean, 2 * error, fmt='o', color='tab:red', label='simulation, ± 2 s.e.')
      axes.grid(alpha=0.3)
      if 'β' not in title:
        axes.set_xscale('log')
    column[1].set_xlabel(title)
  grid[0, 0].set_ylabel('share of steps held')
  grid[1, 0].set_ylabel('mean offset from x* along d, in σ/h')
  grid[0, 0].legend(fontsize=9)
  figure.savefig(path, dpi=110)
  plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> dict[str, dict[str, Any]]:
  """Writes results.json and results.png."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--runs', type=int, default=20, help='default: %(default)s')
  parser.add_argument('--steps', type=int, default=60_000, help='default: %(default)s')
  parser.add_argument('--sizes', type=int, default=len(CASES), help='default: %(default)s, all')
  parser.add_argument('--out', type=Path, default=Path('runs/noisy_quadratic'))
  args = parser.parse_args(arguments)
  found = panels(args.runs, args.steps)
  few = max(args.runs // 10, 1)
  results = {
    'held': table(found),
    'sizes': sizes(few, CASES[: args.sizes]),
    'curvatures': curvatures(few, CURVATURES[: args.sizes]),
  }
  for title, each in results.items():
    reporting.show(title, each)
  settings = {name: str(value) for name, value in vars(args).items()}
  reporting.write_json(args.out / 'results.json', settings, results)
  picture(args.out / 'results.png', found)
  print(f'Results: {args.out}/results.json, {args.out}/results.png')
  return results


if __name__ == '__main__':
  main()
