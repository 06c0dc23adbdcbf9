"""What does each part of the rules do? One thing changed at a time, on four tasks of compare.py.

    python examples/ablations.py

Adam, form 1 in front of it, and the exact rule around it are changed in one way each, and
fine-tune the same models on the same examples as in `compare.py`, at learning rates 1e-3 and
3e-3. The table shows the difference of each to the rule that it changes, in points: the mean over
tasks, rates and seeds, ± its standard error over tasks (of the mean over rates and seeds).
"""

import argparse
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax

import compare
import reporting
import spd_optax as spd
from spd_optax import formulas
from suite import choice, jobs
from suite.methods import Method

RATES = (1e-3, 3e-3)
TASKS = ('digits_mlp', 'digits_cnn', 'tumours', 'code_to_prose')
Optimizer = optax.GradientTransformation
Make = Callable[[Any], Optimizer]  # learning rate -> optimizer


def with_formulas(optimizer: Optimizer, **replaced: Callable[..., Any]) -> Optimizer:
  """The optimizer, with other equations in place of the library's of these names."""

  def update(*args: Any) -> Any:
    with mock.patch.multiple(formulas, **replaced):
      return optimizer.update(*args)

  return optax.GradientTransformation(optimizer.init, update)


def from_momentum(decay: Optimizer) -> Optimizer:
  """Form 1's pull, computed from the mean of the gradients (0.9) and not from the last one."""

  def init(params: Any) -> Any:
    return optax.tree.zeros_like(params), decay.init(params)

  def update(updates: Any, state: Any, params: Any = None) -> Any:
    mean = optax.incremental_update(updates, state[0], 0.1)
    pulled, inner = decay.update(mean, state[1], params)
    return optax.tree.add(updates, optax.tree.sub(pulled, mean)), (mean, inner)

  return optax.GradientTransformation(init, update)


def chain(link: Optimizer | None = None, **options: Any) -> Make:
  """Form 1 and Adam."""
  return lambda rate: optax.chain(link or spd.projection_decay(**options), optax.adam(rate))


def exact(**options: Any) -> Make:
  """The exact rule around Adam."""
  return lambda rate: spd.adam_spd(rate, **options)


def replaced(make: Make, **formulas: Callable[..., Any]) -> Make:
  """With other equations."""
  return lambda rate: with_formulas(make(rate), **formulas)


def when(condition: Callable[[jax.Array], jax.Array]) -> dict[str, Callable[..., Any]]:
  """Another condition on ⟨g, d⟩, with a margin or without."""
  return {
    'turned_back': condition,
    'not_clearly_outward': lambda inner, *others: condition(inner),
  }


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


ADAM, CHAIN, EXACT = 'Adam', 'form 1', 'exact'


def variants() -> dict[str, Variant]:
  """All of them, by name; each comes after its base."""
  found = {
    ADAM: Variant(optax.adam, ADAM),
    CHAIN: Variant(chain(), ADAM),
    EXACT: Variant(exact(), ADAM),
  }

  def change(base: str, name: str, make: Make) -> None:
    found[f'{base}: {name}'] = Variant(make, base)

  always, inverted = when(jnp.isfinite), when(lambda inner: inner < 0)
  change(EXACT, 'always held', replaced(exact(), **always))
  change(EXACT, 'condition inverted', replaced(exact(), **inverted))
  absolute = {'pull': lambda cos, margin: jnp.abs(cos)}
  change(CHAIN, 'always held, φ = abs cos', replaced(chain(), **always, **absolute))
  change(CHAIN, 'condition inverted, φ = abs cos', replaced(chain(), **inverted, **absolute))
  change(CHAIN, 'from momentum', chain(from_momentum(spd.projection_decay())))
  for base, make, margins in ((EXACT, exact, (0.05, 0.1)), (CHAIN, chain, (0.0, 0.1))):
    change(base, 'a layer is a module', make(group=module))
    change(base, 'a layer is an output unit', make(stack_axis=lambda path, leaf: leaf.ndim - 1))
    change(base, 'a layer is the model', make(group=model))
    change(base, 'anchor in bfloat16', make(anchor_dtype=jnp.bfloat16))
    for margin in margins:
      change(base, f'm = {margin:g}', make(margin=margin))
  for strength in (0.5, 1.5, 2.0, 3.0):
    change(EXACT, f'λ = {strength:g}', exact(strength=strength))
  for share in (0.01, 0.1):
    constant = lambda before, after, share=share: jnp.full_like(after, share)  # noqa: E731
    change(EXACT, f'r = {share:g} when held', replaced(exact(), projection_ratio=constant))
  for strength in (0.1, 0.3, 3.0, 10.0):
    change(CHAIN, f'λ = {strength:g}', chain(strength=strength))
  root = replaced(chain(), pull=lambda cos, margin: jnp.sqrt(jnp.maximum(cos + margin, 0)))
  change(CHAIN, 'φ = √(cos + m)', root)
  change(CHAIN, 'φ = 1', replaced(chain(), pull=lambda cos, margin: jnp.ones_like(cos)))
  for batch in (4, 64):
    for name in (ADAM, CHAIN, EXACT):
      title = f'batch of {batch}: {name}'
      found[title] = Variant(found[name].make, f'batch of {batch}: {ADAM}', batch)
  return found


def method_of(variant: Variant) -> Method:
  """The variant as compare.py's methods are written."""

  def optimizer(learning_rate: Any, blocks: Any) -> Optimizer:
    return variant.make(learning_rate)

  return Method(optimizer)


def run_task(name: str, args: argparse.Namespace) -> dict[str, list[Any]]:
  """Records of each variant on a task."""
  task = compare.scaled(compare.TASKS[name](), args.quick)
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
