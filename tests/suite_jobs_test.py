"""The jobs of examples/compare.py: least squares with SGD, in two stages, step by step in NumPy."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from suite import jobs, methods
from suite.tasks import Stage, Task, in_bfloat16

pytestmark = pytest.mark.examples

SEEDS, SHOTS, ROWS = 2, 6, 14
RATES, DECAYS = (0.02, 0.08), (0.0, 0.5)


def least_squares() -> Task:
  rng = np.random.default_rng(1)

  def data(n: int, seed: int) -> Any:
    x = rng.normal(size=(n, 3)).astype(np.float32)
    return x, (x @ [[1.0], [seed], [-1]] + rng.normal(size=(n, 1))).astype(np.float32)

  def loss(params: Any, batch: Any) -> jax.Array:
    return jnp.mean((batch[0] @ params['head']['w'] - batch[1]) ** 2)

  return Task(
    *('least squares', lambda key: {'head': {'w': jax.random.normal(key, (3, 1))}}, loss),
    score=lambda params, data: 100 - loss(params, data),
    old=data(30, 0),
    stages=(Stage(data(ROWS, 1), data(20, 1)), Stage(data(ROWS, 2), data(20, 2))),
    ood={'old': data(20, 0), 'older': data(20, -1)},
    blocks=('head',),
    batch=2,
    shots=SHOTS,
  )


def sgd(learning_rate: Any, blocks: Any, decay: Any) -> optax.GradientTransformation:
  return optax.chain(optax.add_decayed_weights(decay), optax.sgd(learning_rate, momentum=0.5))


STEPS_OF_STAGE = 10  # as many as early stopping looks
SETTINGS = tuple({'decay': decay} for decay in DECAYS)


def score(w: np.ndarray, data: Any) -> float:
  return float(100 - np.mean((data[0] @ w - data[1]) ** 2))


def alone(task: Task, w: np.ndarray, case: jobs.Case) -> tuple[np.ndarray, np.ndarray, list[float]]:
  """The case in NumPy: the last weights, the best on validation data, and all it scored there."""
  best, seen = w, []
  for stage in task.stages:
    parts = jobs.split(task, stage.pool, SEEDS, STEPS_OF_STAGE)
    rest = [x[parts.validation[case.seed]] for x in stage.pool]
    trace, seen = np.zeros_like(w), []
    for rows in parts.order[case.seed]:
      x, y = stage.pool[0][rows], stage.pool[1][rows]
      g = 2 / len(rows) * x.T @ (x @ w - y) + case.setting['decay'] * w
      trace = g + 0.5 * trace
      w = w - case.rate * trace
      seen.append(score(w, rest))
      best = w if seen[-1] == max(seen) else best
  return w, best, seen


def test_split_is_disjoint() -> None:
  """Catches validation on examples that were trained on, and seeds with the same examples."""
  task = least_squares()
  parts = jobs.split(task, task.stages[0].pool, SEEDS, STEPS_OF_STAGE)
  trained = [set(order.ravel().tolist()) for order in parts.order]
  for rows, held_out in zip(trained, parts.validation.tolist(), strict=True):
    assert len(rows) == SHOTS
    assert sorted([*rows, *held_out]) == list(range(ROWS))
  assert trained[0] != trained[1]
  again = jobs.split(task, task.stages[0].pool, SEEDS, 1)
  np.testing.assert_array_equal(again.validation, parts.validation)


def test_each_case_is_trained_as_if_it_were_alone() -> None:
  """Catches rates, settings, start, examples or momentum of one case or stage in another.

  And WiSE-FT with α and 1 − α swapped, early stopping that keeps the last or the first weights.
  """
  task = least_squares()
  start = np.random.default_rng(5).normal(size=(SEEDS, 3, 1))
  foundation = {'head': {'w': start.astype(np.float32)}}
  method = methods.Method(sgd, SETTINGS[:1], ends=(methods.WISE_FT, methods.EARLY))
  many = methods.Method(sgd, SETTINGS, rate=2.0)
  records = jobs.run(task, 'SGD', method, RATES, foundation, SEEDS, STEPS_OF_STAGE)
  doubled = jobs.run(task, 'twice', many, RATES, foundation, SEEDS, STEPS_OF_STAGE)
  assert len(doubled) == len(RATES) * len(DECAYS)
  early = 0

  def check(found: Any, seed: int, w: np.ndarray) -> None:
    expected = {'id': score(w, task.stages[1].test)}
    old = [score(w, data) for data in task.ood.values()]
    expected['ood'] = np.mean(old)
    moved = 100 * np.linalg.norm(w - start[seed]) / np.linalg.norm(start[seed])
    np.testing.assert_allclose(found['moved'][seed], moved, rtol=1e-4, atol=0.006)
    for column, value in expected.items():
      np.testing.assert_allclose(found[column][seed], value, atol=0.006)
    sets = [values[seed] for values in found['sets'].values()]
    np.testing.assert_allclose(sets, old, atol=0.006)

  for each in doubled:
    for seed in range(SEEDS):
      case = jobs.Case(each['setting'], 2 * each['rate'], seed)
      check(each, seed, alone(task, start[seed], case)[0])
  for each in records:
    for seed in range(SEEDS):
      last, best, seen = alone(task, start[seed], jobs.Case(SETTINGS[0], each['rate'], seed))
      alpha = each['setting'].get('alpha')
      early += np.argmax(seen) not in (0, STEPS_OF_STAGE - 1)
      mixed = last if alpha is None else (1 - alpha) * start[seed] + alpha * last
      check(each, seed, best if each['method'] == methods.EARLY else mixed)
      if each['method'] == methods.EARLY:
        np.testing.assert_allclose(each['validation'][seed], max(seen), atol=0.006)
  assert early, 'no case is best on the way'
  assert {each['method'] for each in records} == {'SGD', f'SGD + {methods.WISE_FT}', methods.EARLY}


def test_adapters_have_their_own_rates_too() -> None:
  """Catches numbers that do not reach an optimizer which sees the adapters alone."""
  task = least_squares()
  foundation = {'head': {'w': np.ones((SEEDS, 3, 1), np.float32)}}
  method = methods.Method(methods.adam, ({'rank': 1},))
  records = jobs.run(task, 'LoRA', method, (0.0, 0.01, 0.1), foundation, SEEDS, 10)
  still, slow, fast = (each['moved'] for each in records)
  assert still == [0, 0]
  assert 0 < max(slow) < min(fast)


def test_bfloat16_rounds_weights_and_inputs_but_no_labels() -> None:
  """Catches a loss in float32, from rounded weights or not, and rounded labels."""
  narrow = in_bfloat16(least_squares())

  def arguments(x: float, w: float, label: float) -> Any:
    x, w, label = np.float32([x, w, label])
    return {'head': {'w': np.full((1, 1), w)}}, (np.full((1, 1), x), np.full(1, label))

  program = jax.make_jaxpr(narrow.loss)(*arguments(1, 1, 1))
  products = [each for each in program.eqns if each.primitive.name == 'dot_general']
  assert [each.outvars[0].aval.dtype for each in products] == [jnp.bfloat16]
  ulp = 2**-7  # bfloat16 has 7 bits after the point
  assert narrow.loss(*arguments(1 + ulp / 2, 1 + ulp / 2, 3)) == 4  # both are 1
  assert narrow.loss(*arguments(1, 1, 3 + ulp / 8)) == (2 + ulp / 8) ** 2
