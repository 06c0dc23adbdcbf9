"""Runs with a budget: the drift of a model from its base, measured and told to the optimizer."""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import spd_optax as spd
import training
from suite import adapters, jobs
from suite.choice import ID, OOD, Record
from suite.methods import WISE_FT
from suite.tasks import Data, Params, Task, take

DIALS = (0.1, 1.0, 10.0)  # a budget's first strength
TRACED = ('Adam', 'projection_decay, budget')  # whose drift is kept over the steps
BISECTIONS = 20

ADAM, FIXED, WISE = 'Adam', 'projection_decay', WISE_FT
MARGIN = 0.05  # of `projection_decay`
LINK, AROUND, L2 = 'projection_decay, budget', 'adam_spd, budget', 'L2-SP, budget'

Numbers = dict[str, Any]


def adam(rate: Any) -> optax.GradientTransformation:
  """Adam."""
  return optax.adam(rate)


def fixed(rate: Any, strength: Any) -> optax.GradientTransformation:
  """`projection_decay` in front of Adam, with one strength."""
  return optax.chain(spd.projection_decay(strength=strength, margin=MARGIN), optax.adam(rate))


def link(rate: Any, budget: Any, init: Any) -> optax.GradientTransformation:
  """`projection_decay` in front of Adam, with a budget."""
  strength = spd.within_budget(budget, init=init)
  return optax.chain(spd.projection_decay(strength=strength, margin=MARGIN), optax.adam(rate))


def around(rate: Any, budget: Any, init: Any) -> optax.GradientTransformation:
  """`adam_spd` with a budget."""
  return spd.adam_spd(rate, strength=spd.within_budget(budget, init=init))


def l2_sp(rate: Any, budget: Any, init: Any) -> optax.GradientTransformation:
  """L2-SP in front of Adam, with a budget; its strengths are smaller."""
  strength = spd.within_budget(budget, init=init, bounds=(1e-4, 100.0))
  return optax.chain(spd.l2_sp(strength=strength), optax.adam(rate))


BUDGETED: dict[str, tuple[Callable[..., Any], tuple[float, ...]]] = {  # and first strengths
  LINK: (link, DIALS),
  AROUND: (around, (1.0,)),
  L2: (l2_sp, (0.01,)),
}


class Measured(NamedTuple):
  """State of `measured`.

  Attributes:
    numbers: of the optimizer: its learning rate, strength, budget.
    inputs: on which the drift is measured.
    base: the base model's logits on them.
    inner: the optimizer's state.
  """

  numbers: Numbers
  inputs: Data
  base: jax.Array
  inner: Any


def measured(
  task: Task,
  make: Callable[..., optax.GradientTransformation],
  merged: Callable[[Params], Params],
  every_step: bool,
) -> optax.GradientTransformation:
  """The optimizer, which is told the drift in every step or never."""

  def init(params: Params, numbers: Numbers, inputs: Data) -> Measured:
    base = task.logits(merged(params), inputs) if every_step else jnp.zeros([])
    own, inputs = jax.tree.map(jnp.copy, (numbers, inputs))  # training takes the state over
    inner = make(**jax.tree.map(jnp.copy, numbers)).init(params)
    return Measured(own, inputs, base, inner)

  def update(gradients: Params, state: Measured, params: Params) -> tuple[Params, Measured]:
    more = {}
    if every_step:
      logits = task.logits(merged(params), state.inputs)
      more = {'drift': task.drift(logits, state.base, state.inputs)}
    updates, inner = make(**state.numbers).update(gradients, state.inner, params, **more)
    return updates, state._replace(inner=inner)

  return optax.GradientTransformation(init, update)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _drifts(
  logits: Callable[..., Any], drift: Callable[..., Any], params: Params, base: Params, data: Data
) -> jax.Array:
  def one(each: tuple[Params, Params, Data]) -> jax.Array:
    params, base, data = each
    return drift(logits(params, data), logits(base, data), data)

  return jax.lax.map(one, (params, base, data), batch_size=4)


def drifts(task: Task, params: Params, base: Params, data: Data) -> np.ndarray:
  """The drift of each run on its own data."""
  return np.asarray(_drifts(task.logits, task.drift, params, base, data))


def mixed(
  task: Task, params: Params, base: Params, inputs: Data, budgets: np.ndarray
) -> tuple[Params, np.ndarray]:
  """The weights between the base's and each run's whose drift is its budget, and their α."""
  mix = jax.jit(jax.vmap(spd.interpolate))
  low, high = np.zeros_like(budgets), np.ones_like(budgets)
  for _ in range(BISECTIONS):
    alpha = (low + high) / 2
    above = drifts(task, mix(base, params, alpha), base, inputs) > budgets
    low, high = np.where(above, low, alpha), np.where(above, alpha, high)
  return mix(base, params, low), low


def run(
  task: Task,
  name: str,
  make: Callable[..., optax.GradientTransformation],
  rate: float,
  settings: Sequence[Mapping[str, float]],
  foundation: Params,
  seeds: int,
  most: int,
) -> list[Record]:
  """The records of one method, one for each setting, with a value per seed.

  The drift is measured on so many inputs at `most`.
  """
  of = [dict(setting) for setting in settings for _ in range(seeds)]
  at = np.tile(np.arange(seeds), len(settings))
  numbers = {
    key: jnp.array([setting[key] for setting in of]) for key in of[0] if name not in (ADAM, WISE)
  }
  budgets = np.array([setting.get('budget', math.nan) for setting in of], np.float32)
  wrap, merged, loss, build = lambda params: params, lambda params: params, task.loss, make
  if task.rank:

    def wrap(params: Params) -> Params:
      keys = jax.vmap(jax.random.key)(at)
      return jax.vmap(functools.partial(adapters.wrap, rank=task.rank))(params, key=keys)

    def loss(params: Params, batch: Data) -> jax.Array:
      return task.loss(adapters.merge(params), batch)

    def build(**numbers: Any) -> optax.GradientTransformation:
      return adapters.alone(make(**numbers))

    merged = adapters.merge
  optimizer = measured(task, build, merged, name in BUDGETED)
  whole = jax.jit(jax.vmap(merged))
  params, trace = jax.tree.map(lambda x: jnp.asarray(x)[at], foundation), []
  for stage in task.stages:
    order = jobs.split(task, stage.pool, seeds, task.steps).order[at]
    rows = [jobs.rows_of(task, len(jax.tree.leaves(stage.pool)[0]), seed)[0] for seed in at]
    inputs = jax.tree.map(jnp.asarray, take(stage.pool, np.stack(rows)[:, :most]))
    base, params = params, wrap(jax.tree.map(jnp.copy, params))
    rates = jnp.full(len(of), rate)
    state = jax.vmap(optimizer.init)(params, numbers | {'rate': rates}, inputs)
    for pace, segment in zip(task.pace, np.array_split(order, len(task.pace), axis=1), strict=True):
      state = state._replace(numbers=state.numbers | {'rate': rates * pace})
      chunk = segment.shape[1] or 1
      params, state = training.train(
        loss, optimizer, params, stage.pool, segment, state=state, chunk=chunk
      )
      if name in TRACED:
        trace.append(drifts(task, whole(params), base, inputs))
    strengths = np.asarray(optax.tree.get(state, 'strength', np.full(len(of), math.nan)))
    params = whole(params)
    if name == WISE:
      params, strengths = mixed(task, params, base, inputs, budgets)
  test = task.stages[-1].test
  tests = jax.tree.map(lambda x: jnp.broadcast_to(x, (len(of), *x.shape)), test)
  found = jobs.measure(task, params, at, seeds)
  columns = {
    'validation': found['validation'],
    ID: found['id'],
    OOD: np.mean(list(found['ood'].values()), 0),
    'drift': drifts(task, params, base, inputs),
    'drift, test': drifts(task, params, base, tests),
    'last': strengths,
  }
  records = []
  for i, setting in enumerate(settings):
    here = slice(i * seeds, (i + 1) * seeds)
    record = {'method': name, 'setting': dict(setting), 'rate': rate}
    record |= {column: _short(values[here]) for column, values in columns.items()}
    if trace:
      record['trace'] = _short(np.array(trace)[:, here].mean(1))
    records.append(record)
  return records


def _short(values: np.ndarray) -> list[float | None]:
  """Four digits of each."""
  return [float(f'{value:.4g}') if np.isfinite(value) else None for value in values]
