"""A job: one method on one task, with all its settings, learning rates and seeds at once."""

import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.linear_model import LogisticRegression

import comparison
import spd_optax as spd
import training
from suite import adapters, learned, peers
from suite.choice import PEER
from suite.methods import EARLY, KL, RANK, WISE_FT, Method, Setting
from suite.tasks import Data, Params, Task, size, take

PROBES = (0.003, 0.03, 0.3)  # inverse strengths of a probe's regularization

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
  optimizer = task.pretrain_optimizer(schedule)
  order = training.batch_order(seeds, steps, min(64, size(task.old)), size(task.old))
  state = jax.vmap(optimizer.init)(starts)
  return training.train(task.loss, optimizer, starts, task.old, order, state=state)[0]


def load(task: Task, seeds: int) -> Params:
  """Loaded weights for each seed, whose head is a linear probe of that seed's examples."""
  base = task.pretrained()
  pool = task.stages[0].pool
  inputs, labels = (x[0] for x in seen(task, jax.tree.map(lambda x: x[None], base), pool))
  scale = np.std(inputs)
  heads = []
  for seed in range(seeds):
    trained, rest = rows_of(task, len(labels), seed)
    probes = [
      LogisticRegression(C=c, max_iter=500).fit(inputs[trained] / scale, labels[trained])
      for c in PROBES
    ]
    best = max(probes, key=lambda probe: probe.score(inputs[rest] / scale, labels[rest]))
    kernel, bias = best.coef_.T / scale, best.intercept_
    if len(bias) == 1:  # of two classes it has one
      kernel, bias = kernel * [[-0.5, 0.5]], bias * [-0.5, 0.5]
    head = jax.tree.map(np.array, base[task.blocks[-1]])
    head['kernel'][:, best.classes_], head['bias'][best.classes_] = kernel, bias
    heads.append(head)
  every = jax.tree.map(lambda x: np.broadcast_to(x, (seeds, *x.shape)), base)
  return every | {task.blocks[-1]: jax.tree.map(lambda *x: np.stack(x), *heads)}


def rows_of(task: Task, rows: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
  """The rows of a pool that a seed trains on, and the rest."""
  trained = np.random.default_rng(seed).permutation(rows)[: task.shots]
  return trained, np.setdiff1d(np.arange(rows), trained)


class Split(NamedTuple):
  """A stage's examples for each seed: batches to train on, and rows of the rest."""

  order: np.ndarray  # int32[seeds, steps, batch]
  validation: np.ndarray  # int32[seeds, rows]


def split(task: Task, pool: Data, seeds: int, steps: int, apart: bool = False) -> Split:
  """Every seed has its own training examples; what it does not train on is for validation."""
  rows, batch = size(pool), min(task.batch, task.shots)
  order = training.batch_order(seeds, steps, batch, rows, task.shots)
  trained, rest = zip(*(rows_of(task, rows, seed) for seed in range(seeds)), strict=True)
  if apart:
    order = learned.order(np.stack(trained), steps, batch)
  return Split(order, np.stack(rest))


class Program(NamedTuple):
  """What a method trains: compiled once for all its runs, which differ in numbers alone.

  Attributes:
    loss: of the params that it trains.
    optimizer: for these.
    wrap: (weights of each run, its cases) -> these.
    unwrap: the weights that the model computes with.
  """

  loss: training.Loss
  optimizer: optax.GradientTransformation
  wrap: Callable[[Params, Sequence[Case]], Params] = lambda params, cases: params
  unwrap: Callable[[Params], Params] = lambda params: params


def program(task: Task, method: Method, case: Case) -> Program:
  """The program for all cases like this one."""
  optimizer = injected(task, method, case)
  rank = int(case.setting.get(RANK, task.rank))
  if method.apart:
    if rank:
      raise ValueError('a strength for each layer is not learned with adapters')
    loss = learned.of_both(task.loss)
    return Program(loss, optimizer, learned.twins, lambda params: params['model'])
  if rank:

    def wrap(params: Params, cases: Sequence[Case]) -> Params:
      keys = jax.vmap(jax.random.key)(np.array([case.seed for case in cases]))
      return jax.vmap(functools.partial(adapters.wrap, rank=rank))(params, key=keys)

    return Program(
      lambda params, batch: task.loss(adapters.merge(params), batch),
      adapters.alone(optimizer),
      wrap,
      jax.vmap(adapters.merge),
    )
  if KL in case.setting:

    def with_base(params: Params, cases: Sequence[Case]) -> Params:
      strengths = jnp.array([float(case.setting[KL]) for case in cases])
      return {'model': params, 'base': jax.tree.map(jnp.copy, params), 'kl': strengths}

    return Program(
      peers.with_base(task.loss, task.logits),
      peers.model_alone(optimizer),
      with_base,
      lambda params: params['model'],
    )
  return Program(task.loss, optimizer)


def fine_tune(
  task: Task,
  method: Method,
  made: Program,
  cases: Sequence[Case],
  foundation: Params,
  seeds: int,
  steps: int,
) -> Iterator[tuple[str, Params, Any]]:
  """All cases, which differ in numbers alone.

  Yields:
    The method's name where it has another, the trained weights, and the optimizer's state.
  """
  at = np.array([case.seed for case in cases])
  params = made.wrap(jax.tree.map(lambda x: jnp.asarray(x)[at], foundation), cases)
  best = Best(task, at) if EARLY in method.ends else None
  for i, stage in enumerate(task.stages):
    parts = split(task, stage.pool, seeds, steps, method.apart)
    state = jax.vmap(made.optimizer.init)(params)
    segments = np.array_split(parts.order[at], len(task.pace), axis=1)
    for pace, segment in zip(task.pace, segments, strict=True):
      state = with_numbers(state, cases, pace)
      params, state = training.train(
        made.loss,
        made.optimizer,
        params,
        stage.pool,
        segment,
        state=state,
        chunk=segment.shape[1] or 1,
      )
      if best and i == len(task.stages) - 1:
        best.see(made.unwrap(params), stage.pool, parts.validation[at])
  yield '', made.unwrap(params), state
  if WISE_FT in method.ends:
    yield WISE_FT, made.unwrap(params), None
  if best:
    yield EARLY, best.params, None


def injected(task: Task, method: Method, case: Case) -> optax.GradientTransformation:
  """The method's optimizer, whose numbers are in its state."""
  numbers = {name: float(x) for name, x in case.setting.items() if name not in (RANK, KL)}
  make = optax.inject_hyperparams(method.optimizer, static_args='blocks')
  return make(learning_rate=case.rate, blocks=task.blocks, **numbers)


def with_numbers(state: Any, cases: Sequence[Case], pace: float = 1.0) -> Any:
  """The state, each case with its own learning rate, times the pace, and setting."""
  names = [name for name in cases[0].setting if name not in (RANK, KL)]
  numbers = {name: jnp.array([float(case.setting[name]) for case in cases]) for name in names}
  return optax.tree.set(
    state,
    lambda path, value: 'hyperparams' in jax.tree_util.keystr(path),
    learning_rate=jnp.array([case.rate * pace for case in cases]),
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
    return score(params, data if rows is None else take(data, rows))

  return jax.lax.map(one, (params, rows), batch_size=4)


@functools.partial(jax.jit, static_argnums=0)
def _scores_seen(score: Callable[..., jax.Array], params: Params, data: Data) -> jax.Array:
  return jax.vmap(score)(params, data)


@functools.partial(jax.jit, static_argnums=0)
def _seen(features: Callable[..., jax.Array], params: Params, inputs: jax.Array) -> jax.Array:
  return jax.vmap(features, in_axes=(0, None))(params, inputs)


CHUNK = 128  # inputs at a time where a loaded model is measured: one program for all sets


def seen(task: Task, params: Params, data: Data) -> Data:
  """The data with features in place of inputs, and a leading axis of runs."""
  runs = size(params)

  def of(x: np.ndarray) -> np.ndarray:
    if np.ndim(x) < 2:
      return np.broadcast_to(x, (runs, *x.shape))
    whole = np.concatenate([x, np.repeat(x[-1:], -len(x) % CHUNK, axis=0)])
    parts = whole.reshape(-1, CHUNK, *x.shape[1:])
    return np.concatenate([_seen(task.features, params, part) for part in parts], 1)[:, : len(x)]

  return jax.tree.map(of, data)


def scores_on(task: Task, params: Params, data: Data, rows: np.ndarray | None = None) -> np.ndarray:
  """The score of each run on the data, or on its own rows of them."""
  if task.features is None:
    return np.asarray(_scores(task.score, params, jax.tree.map(jnp.asarray, data), rows))
  data = seen(task, params, data)
  if rows is not None:
    data = jax.tree.map(lambda x: x[np.arange(len(rows))[:, None], rows], data)
  return np.asarray(_scores_seen(task.score, {task.blocks[-1]: params[task.blocks[-1]]}, data))


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
  name: str,
  cases: Sequence[Case],
  found: dict[str, Any],
  more: dict[str, np.ndarray],
  layers: Mapping[str, np.ndarray] = MappingProxyType({}),
) -> list[Record]:
  """A record for each setting and rate, with one value per seed; `layers` has shares held."""
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
    for layer, shares in layers.items():
      shares_of = record.setdefault('layers', {}).setdefault(layer, [])
      shares_of.append(round(float(shares[i]), 1))
  return list(made.values())


def run(
  task: Task,
  name: str,
  method: Method,
  rates: Sequence[float],
  foundation: Params,
  seeds: int,
  steps: int,
  at_once: int | None = None,
  kept: Callable[[int, Callable[[], list[Record]]], list[Record]] = lambda part, make: make(),
) -> list[Record]:
  """Fine-tunes and measures: the records of the method, and of those that go on from it.

  Args:
    task: what is learned.
    name: the method's, for the records.
    method: its optimizer and settings.
    rates: learning rates of Adam.
    foundation: the models to start from, one for each seed.
    seeds: their number.
    steps: of each stage.
    at_once: configurations that are trained at a time; None trains all, which needs most memory.
    kept: (first, make) -> the records of the configurations from this one on, from a cache perhaps.
  """
  found: list[Record] = []
  first = 0
  for _, settings in itertools.groupby(method.settings, lambda setting: setting.get(RANK)):
    each = list(itertools.product(settings, rates))
    made = program(task, method, Case(each[0][0], each[0][1], 0))
    at_a_time = at_once or len(each)
    for start in range(0, len(each), at_a_time):
      part = each[start : start + at_a_time]
      cases = [Case(setting, rate, seed) for setting, rate in part for seed in range(seeds)]
      arguments = (task, name, method, made, cases, foundation, seeds, steps)
      found += kept(first, functools.partial(run_part, *arguments))
      first += len(part)
  return found


def run_part(
  task: Task,
  name: str,
  method: Method,
  made: Program,
  cases: Sequence[Case],
  foundation: Params,
  seeds: int,
  steps: int,
) -> list[Record]:
  """The records of these cases."""
  at = np.array([case.seed for case in cases])
  scaled = [case._replace(rate=case.rate * method.rate) for case in cases]
  found: list[Record] = []
  for end, params, state in fine_tune(task, method, made, scaled, foundation, seeds, steps):
    if end != WISE_FT:
      held = comparison.held(state, steps) if state is not None else {}
      moved = {'moved': moved_by(params, foundation, at)}
      layers = layers_held(state, steps) if task.by_layer else {}
      found += records(end or name, cases, measure(task, params, at, seeds), moved | held, layers)
      continue
    for setting in method.alphas:
      mix = functools.partial(spd.interpolate, alpha=setting['alpha'])
      between = jax.vmap(mix)(take(foundation, at), params)
      relabeled = [case._replace(setting={**case.setting, **setting}) for case in cases]
      title = end if name == PEER else f'{name} + {end}'
      moved = {'moved': moved_by(between, foundation, at)}
      found += records(title, relabeled, measure(task, between, at, seeds), moved)
  return found


def layers_held(state: Any, steps: int) -> dict[str, np.ndarray]:
  """Share of the steps in % in which each layer was held, for each run."""
  constrained = optax.tree.get(state, 'constrained', {})
  return {key.replace('~', '/'): 100 * np.asarray(x) / steps for key, x in constrained.items()}


def moved_by(params: Params, foundation: Params, at: np.ndarray) -> np.ndarray:
  """‖θ − θ_0‖ / ‖θ_0‖ in % of each run."""

  def one(params: Params, start: Params) -> jax.Array:
    return 100 * optax.tree.norm(optax.tree.sub(params, start)) / optax.tree.norm(start)

  return np.asarray(jax.vmap(one)(params, take(foundation, at)))
