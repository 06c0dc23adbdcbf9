"""The methods that the examples compare, and what is said about each; shared by the examples."""

import dataclasses
import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

import spd_optax as spd
import training

Columns = dict[str, list[float]]  # one value per seed


def default_of(transform: Callable[..., Any]) -> dict[str, float]:
  """The library's default strength and margin."""
  options = inspect.signature(transform).parameters
  return {name: options[name].default for name in ('strength', 'margin')}


ADAM_SPD = default_of(spd.adam_spd)
DEFAULT = default_of(spd.projection_decay)
FIRM = {'strength': 10.0, 'margin': 0.1}
SETTINGS = {  # by how the name of a method begins
  'adam_spd': ADAM_SPD,
  'adam_spd, SignificantProjection': {
    'strength': ADAM_SPD['strength'],
    **dataclasses.asdict(spd.SignificantProjection()),
  },
  'projection_decay': DEFAULT,
  'projection_decay, λ = 10, m = 0.1': FIRM,
  'projection_decay, firm': FIRM,
}


def methods(lr: Any, anchor: Any) -> dict[str, optax.GradientTransformation]:
  """The optimizers to compare; each differs from the first in one line."""
  return {
    'Adam': optax.adam(lr),
    'AdamW, 0.01': optax.adamw(lr, weight_decay=0.01),
    'L2-SP, λ = 0.01': optax.chain(spd.l2_sp(anchor, 0.01), optax.adam(lr)),
    'projection_decay': optax.chain(spd.projection_decay(anchor, **DEFAULT), optax.adam(lr)),
    'projection_decay, λ = 10, m = 0.1': optax.chain(
      spd.projection_decay(anchor, **FIRM), optax.adam(lr)
    ),
    'adam_spd': spd.adam_spd(lr, anchor, **ADAM_SPD),
  }


def settings(name: str, lr: float) -> dict[str, Any]:
  """The hyperparameters of a method, for its audit log; empty where it has no SPD."""
  beginnings = [start for start in SETTINGS if name.startswith(start)]
  return {'learning_rate': lr, **SETTINGS[max(beginnings, key=len)]} if beginnings else {}


def run(
  optimizers: Mapping[str, optax.GradientTransformation],
  loss: training.Loss,
  params: Any,
  anchor: Any,
  data: Any,
  order: np.ndarray,
  evaluate: Callable[[Any], Columns],
  bar: Any,
  audit: Path,
  lr: float,
  captured: bool | None = False,
) -> dict[str, Columns]:
  """Fine-tunes the same params with every optimizer; returns the columns of each.

  Args:
    optimizers: by name. The first also gives WiSE-FT, the weights halfway to the anchor.
    loss: as in `training.train`.
    params: as in `training.train`.
    anchor: the pre-trained weights, with None where there are none.
    data: as in `training.train`.
    order: as in `training.train`.
    evaluate: params with a leading seed axis -> columns.
    bar: a `training.progress_bar`.
    audit: directory for the audit logs, one for each optimizer.
    lr: the learning rate, for the logs, and
    captured: likewise, see `AuditLog`.
  """
  steps = order.shape[1]
  results = {'pre-trained': evaluate(jax.tree.map(lambda x: x[None], params))}
  for i, (name, optimizer) in enumerate(optimizers.items()):
    task = bar.add_task(name, total=steps)
    with audit_log(audit, name, settings(name, lr), anchor, captured=captured) as record:
      trained, state = training.train(
        loss,
        optimizer,
        params,
        data,
        order,
        lambda n, task=task: bar.advance(task, n),
        record=record,
      )
    results[name] = evaluate(trained) | held(state, steps)
    if i == 0:
      between = jax.vmap(lambda p: spd.interpolate(anchor, p, 0.5))(trained)
      results['WiSE-FT, α = 0.5'] = evaluate(between)
  return results


@contextmanager
def audit_log(
  directory: Path, name: str, hyperparameters: Mapping[str, Any], anchor: Any, **options: Any
) -> Iterator[Callable[[int, Any, Any], None]]:
  """A new log of a method, by (step, params, state); without SPD it has distances alone."""
  directory.mkdir(parents=True, exist_ok=True)
  path = directory / (re.sub(r'\W+', '_', name).strip('_') + '.jsonl')
  path.unlink(missing_ok=True)
  baseline = not hyperparameters
  facts = {'transform': name, 'hyperparameters': hyperparameters, 'baseline': baseline, **options}
  with spd.AuditLog(path, source='what it was fine-tuned from', **facts) as log:

    def record(step: int, params: Any, state: Any) -> None:
      log.record(step, spd.baseline_state(params, anchor, step) if baseline else state)

    yield record


def show_audit(directory: Path) -> None:
  """Says where the audit logs are, and how to read them."""
  logs = sorted(directory.glob('*.jsonl'))
  if logs:
    print(f'Audit logs (first seed): {directory}/')
    print(f"To read one: python -m spd_optax.audit report '{logs[-1]}'")
    print(f"To compare two: python -m spd_optax.audit compare '{logs[0]}' '{logs[-1]}'")


def columns(values: Mapping[str, Any]) -> Columns:
  """Arrays over seeds as lists of rounded numbers, for JSON."""
  return {name: [round(float(v), 3) for v in array] for name, array in values.items()}


def distance(params: Any, start: Any) -> np.ndarray:
  """‖θ − θ_0‖ / ‖θ_0‖ in %, over all weights: an array over seeds."""
  moved = jax.vmap(lambda p: optax.tree.norm(optax.tree.sub(p, start)))(params)
  return 100 * np.asarray(moved / optax.tree.norm(start))


def held(state: Any, steps: int) -> Columns:
  """Share of steps in %, mean over layers, in which SPD held a layer; empty without SPD."""
  constrained = jax.tree.leaves(optax.tree.get(state, 'constrained', {}))
  if not constrained:
    return {}
  shares = [np.mean(np.reshape(x, (len(x), -1)), axis=1) for x in constrained]  # over slices
  return columns({'held': 100 * np.mean(shares, axis=0) / steps})
