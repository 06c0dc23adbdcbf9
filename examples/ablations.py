"""What does each part of the rules do? One thing changed at a time, on four tasks of compare.py.

    python examples/ablations.py

Adam, `projection_decay` in front of it (with a margin of 0.05), and `adam_spd` are changed in one
way each. They fine-tune the same models on the same examples as in `compare.py`, at learning rates
1e-3 and 3e-3. The table shows the difference of each to what it changes, in points: the mean over
tasks, rates and seeds, ± its standard error over tasks (of the mean over rates and seeds).
"""

import argparse
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import compare
import reporting
import spd_optax as spd
from suite import choice, jobs
from suite.methods import Method

RATES = (1e-3, 3e-3)
TASKS = ('digits_mlp', 'digits_cnn', 'tumours', 'code_to_prose')
Optimizer = optax.GradientTransformation
Make = Callable[[Any], Optimizer]  # learning rate -> optimizer
Condition = Callable[[Any], jax.Array]  # norms of a layer -> whether it is held


def from_momentum(decay: Optimizer) -> Optimizer:
  """The link's pull, computed from the mean of the gradients (0.9) and not from the last one."""

  def init(params: Any) -> Any:
    return optax.tree.zeros_like(params), decay.init(params)

  def update(updates: Any, state: Any, params: Any = None) -> Any:
    mean = optax.incremental_update(updates, state[0], 0.1)
    pulled, inner = decay.update(mean, state[1], params)
    return optax.tree.add(updates, optax.tree.sub(pulled, mean)), (mean, inner)

  return optax.GradientTransformation(init, update)


MARGIN = 0.05  # of `projection_decay` and its changes


def chain(link: Optimizer | None = None, **options: Any) -> Make:
  """`projection_decay` and Adam."""
  if 'rule' not in options:
    options = {'margin': MARGIN, **options}
  return lambda rate: optax.chain(link or spd.projection_decay(**options), optax.adam(rate))


def adam_spd(**options: Any) -> Make:
  """`adam_spd`."""
  return lambda rate: spd.adam_spd(rate, **options)


def inner(norms: Any) -> jax.Array:
  """⟨g, d⟩."""
  return norms['inner']


def always(norms: Any) -> jax.Array:
  """In every step."""
  return jnp.isfinite(inner(norms))


def inverted(norms: Any) -> jax.Array:
  """Where the gradient has not turned."""
  return inner(norms) < 0


def at_random(share: float) -> Condition:
  """In a share of the steps, by the last bits of ⟨g, d⟩; never where it is 0."""

  def condition(norms: Any) -> jax.Array:
    bits = jax.lax.bitcast_convert_type(inner(norms).astype(jnp.float32), jnp.int32) & 1023
    return (bits < share * 1024) & (inner(norms) != 0)

  return condition


def projection(condition: Condition | None = None, ratio: float | None = None) -> Make:
  """The paper's rule with another condition, or with an r that is always the same."""

  class Changed(spd.Projection):
    def decide(self, norms: Any, numbers: Any, strength: Any) -> spd.Decision:
      held, whole, *_ = super().decide(norms, numbers, strength)
      held = held if condition is None else condition(norms)
      whole = whole if ratio is None else jnp.full_like(whole, ratio)
      return spd.Decision(held, whole, strength * whole)

  return adam_spd(rule=Changed())


def turn(
  condition: Condition | None = None, pull: Callable[[jax.Array], jax.Array] | None = None
) -> Make:
  """The chain link's rule with another condition, or with another pull φ(cos)."""

  class Changed(spd.GradientTurn):
    def decide(self, norms: Any, numbers: Any, strength: Any) -> spd.Decision:
      size, distance = norms['gradient_norm'], jnp.maximum(norms['distance'], 1e-30)
      cos = jnp.clip(norms['inner'] / jnp.maximum(size, 1e-30) / distance, -1, 1)
      held, *_ = super().decide(norms, numbers, strength)
      held = held if condition is None else condition(norms)
      size_of = pull or (lambda cos: jnp.maximum(cos + self.margin, 0))
      ratio = jnp.where(held, size_of(cos), 0)
      return spd.Decision(held, ratio, strength * ratio * size / distance)

  return chain(rule=Changed(margin=MARGIN))


def module(path: str) -> str:
  """Kernel and bias are one layer."""
  return path.rpartition('/')[0]


def model(path: str) -> str:
  """All weights are one layer."""
  return 'model'


class Variant(NamedTuple):
  """A change.

  Attributes:
    make: learning rate -> optimizer.
    base: name of the variant that it is a change of.
    batch: of other size than the task's; 0 is the task's.
  """

  make: Make
  base: str
  batch: int = 0


ADAM, CHAIN, ADAM_SPD = 'Adam', 'projection_decay', 'adam_spd'


def root(cos: jax.Array) -> jax.Array:
  """φ = √(cos + m)."""
  return jnp.sqrt(jnp.maximum(cos + MARGIN, 0))


def of_both(make: Callable[..., Make]) -> dict[str, Make]:
  """Changes that either can have."""
  return {
    'a layer is a module': make(group=module),
    'a layer is an output unit': make(stack_axis=lambda path, leaf: leaf.ndim - 1),
    'a layer is the model': make(group=model),
    'anchor in bfloat16': make(anchor_dtype=jnp.bfloat16),
  }


def of_adam_spd() -> dict[str, Make]:
  """Changes of `adam_spd`."""
  return {
    'always held': projection(always),
    'condition inverted': projection(inverted),
    'held at random, 40 %': projection(at_random(0.4)),
    **of_both(adam_spd),
    **{f'm = {m:g}': adam_spd(margin=m) for m in (0.05, 0.1)},
    **{f'λ = {x:g}': adam_spd(strength=x) for x in (0.5, 1.5, 2.0, 3.0)},
    **{f'r = {r:g} when held': projection(ratio=r) for r in (0.01, 0.1)},
  }


def of_projection_decay() -> dict[str, Make]:
  """Changes of `projection_decay`."""
  return {
    'always held, φ = abs cos': turn(always, jnp.abs),
    'condition inverted, φ = abs cos': turn(inverted, jnp.abs),
    'held at random, 55 %, φ = abs cos': turn(at_random(0.55), jnp.abs),
    'from momentum': chain(from_momentum(spd.projection_decay(margin=MARGIN))),
    **of_both(chain),
    **{f'm = {m:g}': chain(margin=m) for m in (0.0, 0.1)},
    **{f'λ = {x:g}': chain(strength=x) for x in (0.1, 0.3, 3.0, 10.0)},
    'φ = √(cos + m)': turn(pull=root),
    'φ = 1': turn(pull=jnp.ones_like),
  }


def variants() -> dict[str, Variant]:
  """All of them, by name; each comes after its base."""
  whole = {ADAM: optax.adam, CHAIN: chain(), ADAM_SPD: adam_spd()}
  found = {name: Variant(make, ADAM) for name, make in whole.items()}
  for base, changes in ((ADAM_SPD, of_adam_spd()), (CHAIN, of_projection_decay())):
    found |= {f'{base}: {name}': Variant(make, base) for name, make in changes.items()}
  for batch in (4, 64):
    base = f'batch of {batch}: {ADAM}'
    found |= {f'batch of {batch}: {name}': Variant(m, base, batch) for name, m in whole.items()}
  return found


def method_of(variant: Variant) -> Method:
  """The variant as compare.py's methods are written."""

  def optimizer(learning_rate: Any, blocks: Any) -> Optimizer:
    return variant.make(learning_rate)

  return Method(optimizer)


def run_task(name: str, args: argparse.Namespace) -> dict[str, list[Any]]:
  """Records of each variant on a task."""
  task = compare.scaled(compare.maker(name)(), args.quick)
  foundation = compare.foundation(name, task, args)
  found = {}
  for title, variant in variants().items():
    varied = task._replace(batch=variant.batch or task.batch)
    records = jobs.run(varied, title, method_of(variant), RATES, foundation, args.seeds, task.steps)
    found[title] = [choice.without_diverged(record) for record in records]
    print(f'{name}: {title}', flush=True)
  return found


def table(records: dict[str, dict[str, list[Any]]]) -> dict[str, dict[str, Any]]:
  """A row for each variant: its scores, and their difference to those of its base."""

  def scores(variant: str, column: str) -> np.ndarray:
    """[tasks], means over rates and seeds."""
    return np.array([np.mean([r[column] for r in by[variant]]) for by in records.values()])

  rows = {}
  for name, variant in variants().items():
    row = rows[name] = {'ID': f'{scores(name, "id").mean():.1f}'}
    row['OOD'] = f'{scores(name, "ood").mean():.1f}'
    row['compared to'] = variant.base
    for column in ('id', 'ood'):
      difference = scores(name, column) - scores(variant.base, column)
      row[f'{column.upper()}, difference'] = [round(float(x), 3) for x in difference]
    if 'held' in next(iter(records.values()))[name][0]:
      row['held'] = f'{scores(name, "held").mean():.0f}'
  return rows


def main(arguments: Sequence[str] | None = None) -> dict[str, dict[str, Any]]:
  """Writes results.json."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--quick', action='store_true', help='a few steps, two seeds')
  parser.add_argument('--tasks', nargs='+', choices=compare.TASKS, default=list(TASKS))
  parser.add_argument('--seeds', type=int, help='default: 5')
  parser.add_argument('--workers', type=int, default=os.cpu_count(), help='tasks at a time')
  parser.add_argument(
    '--out', type=Path, default=Path('runs/ablations'), help='default: %(default)s'
  )
  args = parser.parse_args(arguments)
  args.seeds = args.seeds or (2 if args.quick else 5)
  results = table(compare.each_task(run_task, args))
  reporting.publish(args, 'One change at a time', results)
  print(f'Results: {args.out}/results.json')
  return results


if __name__ == '__main__':
  main()
