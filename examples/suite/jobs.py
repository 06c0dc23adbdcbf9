"""A job: one method on one task, with all its settings, learning rates and seeds at once."""

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import comparison
import spd_optax as spd
import training
from suite import adapters
from suite.methods import ALPHAS, EARLY, WISE_FT, Method, Setting
from suite.tasks import Data, Params, Task, size, take

SEGMENTS = 10  # times at which early stopping looks at the validation data

Record = dict[str, Any]


class Case(NamedTuple):
  """One run."""

  setting: Setting
  rate: float
  seed: int


def pretrain(task: Task, seeds: int, steps: int) -> Params:
  """A pre-trained model for each seed: params with a leading axis."""
  starts = jax.vmap(task.init)(jax.random.split(jax.random.key(0), seeds))
  schedule = optax.warmup_cosine_decay_schedule(0, task.pretrain_rate, steps // 10 + 1, steps)
  optimizer = optax.adamw(schedule)
  order = training.batch_order(seeds, steps, min(64, size(task.old)), size(task.old))
  state = jax.vmap(optimizer.init)(starts)
  return training.train(task.loss, optimizer, starts, task.old, order, state=state)[0]


class Split(NamedTuple):
  """A stage's examples for each seed: batches to train on, and rows of the rest."""

  order: np.ndarray  # int32[seeds, steps, batch]
  validation: np.ndarray  # int32[seeds, rows]


def split(task: Task, pool: Data, seeds: int, steps: int) -> Split:
  """Every seed has its own training examples; what it does not train on is for validation."""
  rows, batch = size(pool), min(task.batch, task.shots)
  order = training.batch_order(seeds, steps, batch, rows, task.shots)
  trained = [np.random.default_rng(seed).permutation(rows)[: task.shots] for seed in range(seeds)]
  return Split(order, np.stack([np.setdiff1d(np.arange(rows), at) for at in trained]))


def fine_tune(
  task: Task, method: Method, cases: Sequence[Case], foundation: Params, seeds: int, steps: int
) -> Iterator[tuple[str, Params, Any]]:
  """All cases, which differ in numbers alone.

  Yields:
    The method's name where it has another, the trained weights, and the optimizer's state.
  """
  at = np.array([case.seed for case in cases])
  rank = int(cases[0].setting.get('rank', task.rank))
  base = jax.tree.map(lambda x: jnp.asarray(x)[at], foundation)
  params, loss, optimizer = base, task.loss, injected(task, method, cases[0])
  if rank:
    keys = jax.vmap(jax.random.key)(at)
    params = jax.vmap(functools.partial(adapters.wrap, rank=rank))(base, key=keys)
    loss = lambda params, batch: task.loss(adapters.merge(params), batch)  # noqa: E731
    optimizer = adapters.alone(optimizer)
  best = Best(task, at) if EARLY in method.ends else None
  for i, stage in enumerate(task.stages):
    parts = split(task, stage.pool, seeds, steps)
    state = with_numbers(jax.vmap(optimizer.init)(params), cases)
    for segment in np.array_split(parts.order[at], SEGMENTS, axis=1):
      params, state = training.train(
        loss, optimizer, params, stage.pool, segment, state=state, chunk=segment.shape[1] or 1
      )
      if best and i == len(task.stages) - 1:
        best.see(merged(params, rank), stage.pool, parts.validation[at])
  yield '', merged(params, rank), state
  if WISE_FT in method.ends:
    yield WISE_FT, merged(params, rank), None
  if best:
    yield EARLY, best.params, None


def merged(params: Params, rank: int) -> Params:
  """The weights that the model computes with."""
  return jax.vmap(adapters.merge)(params) if rank else params


def injected(task: Task, method: Method, case: Case) -> optax.GradientTransformation:
  """The method's optimizer, whose numbers are in its state."""
  numbers = {name: float(x) for name, x in case.setting.items() if name != 'rank'}
  make = optax.inject_hyperparams(method.optimizer, static_args='blocks')
  return make(learning_rate=case.rate, blocks=task.blocks, **numbers)


def with_numbers(state: Any, cases: Sequence[Case]) -> Any:
  """The state, each case with its own learning rate and setting."""
  names = [name for name in cases[0].setting if name != 'rank']
  numbers = {name: jnp.array([float(case.setting[name]) for case in cases]) for name in names}
  return optax.tree.set(
    state,
    lambda path, value: 'hyperparams' in jax.tree_util.keystr(path),
    learning_rate=jnp.array([case.rate for case in cases]),
    **numbers,
  )


class Best:
  """The weights of each run when they did best on its validation data."""

  def __init__(self, task: Task, at: np.ndarray) -> None:
    self.task, self.scores, self.params = task, np.full(len(at), -np.inf), None

  def see(self, params: Params, pool: Data, rows: np.ndarray) -> None:
    scores = np.asarray(scores_on(self.task, params, pool, rows))
    better = scores > self.scores
    if self.params is None:
      self.params = jax.tree.map(jnp.copy, params)
    self.scores = np.maximum(scores, self.scores)

    def chosen(new: jax.Array, old: jax.Array) -> jax.Array:
      return jnp.where(better.reshape(-1, *[1] * (new.ndim - 1)), new, old)

    self.params = jax.tree.map(chosen, params, self.params)


@functools.partial(jax.jit, static_argnums=0)
def _scores(score: Callable[..., jax.Array], params: Params, data: Data, rows: Any) -> jax.Array:
  def one(each: tuple[Params, Any]) -> jax.Array:
    params, rows = each
    return score(params, data if rows is None else jax.tree.map(lambda x: x[rows], data))

  return jax.lax.map(one, (params, rows), batch_size=4)


def scores_on(task: Task, params: Params, data: Data, rows: np.ndarray | None = None) -> np.ndarray:
  """The score of each run on the data, or on its own rows of them."""
  return np.asarray(_scores(task.score, params, jax.tree.map(jnp.asarray, data), rows))


def measure(task: Task, params: Params, at: np.ndarray, seeds: int) -> dict[str, Any]:
  """Scores of each run: on validation data, in distribution and on each set out of it."""
  last = task.stages[-1]
  rows = split(task, last.pool, seeds, 1).validation[at]
  return {
    'validation': scores_on(task, params, last.pool, rows),
    'id': scores_on(task, params, last.test),
    'ood': {name: scores_on(task, params, data) for name, data in task.ood.items()},
  }


def records(
  name: str, cases: Sequence[Case], found: dict[str, Any], more: dict[str, np.ndarray]
) -> list[Record]:
  """A record for each setting and rate, with one value per seed."""
  made: dict[Any, Record] = {}
  for i, case in enumerate(cases):
    key = (tuple(case.setting.items()), case.rate)
    columns = ('validation', 'id', 'ood', *more)
    record = made.setdefault(
      key,
      {'method': name, 'setting': dict(case.setting), 'rate': case.rate, 'sets': {}}
      | {column: [] for column in columns},
    )
    sets = {name: float(values[i]) for name, values in found['ood'].items()}
    for column in ('validation', 'id'):
      record[column].append(round(float(found[column][i]), 2))
    record['ood'].append(round(float(np.mean(list(sets.values()))), 2))
    for column, values in more.items():
      record[column].append(round(float(values[i]), 2))
    for set_name, value in sets.items():
      record['sets'].setdefault(set_name, []).append(round(value, 2))
  return list(made.values())


def run(
  task: Task,
  name: str,
  method: Method,
  rates: Sequence[float],
  foundation: Params,
  seeds: int,
  steps: int,
) -> list[Record]:
  """Fine-tunes and measures: the records of the method, and of those that go on from it."""
  found: list[Record] = []
  for _, settings in itertools.groupby(method.settings, lambda setting: setting.get('rank')):
    cases = [
      Case(setting, rate, seed) for setting in settings for rate in rates for seed in range(seeds)
    ]
    at = np.array([case.seed for case in cases])
    scaled = [case._replace(rate=case.rate * method.rate) for case in cases]
    for end, params, state in fine_tune(task, method, scaled, foundation, seeds, steps):
      if end != WISE_FT:
        held = comparison.held(state, steps) if state is not None else {}
        moved = {'moved': moved_by(params, foundation, at)}
        found += records(end or name, cases, measure(task, params, at, seeds), moved | held)
        continue
      for setting in ALPHAS:
        mix = functools.partial(spd.interpolate, alpha=setting['alpha'])
        between = jax.vmap(mix)(take(foundation, at), params)
        relabeled = [case._replace(setting=setting) for case in cases]
        moved = {'moved': moved_by(between, foundation, at)}
        found += records(end, relabeled, measure(task, between, at, seeds), moved)
  return found


def moved_by(params: Params, foundation: Params, at: np.ndarray) -> np.ndarray:
  """‖θ − θ_0‖ / ‖θ_0‖ in % of each run."""

  def one(params: Params, start: Params) -> jax.Array:
    return 100 * optax.tree.norm(optax.tree.sub(params, start)) / optax.tree.norm(start)

  return np.asarray(jax.vmap(one)(params, take(foundation, at)))
