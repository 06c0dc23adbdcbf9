"""examples/compare.py and ablations.py at tiny sizes, and the cache of their results."""

import argparse
import json
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import ablations
import compare
import spd_optax as spd
from suite import cache, jobs, methods
from suite.tasks import Task

pytestmark = pytest.mark.examples

ARGUMENTS = ['--quick', '--tasks', 'tumours', '--out']
SPD = {'strength': 1.0, 'margin': 0.0}


@pytest.fixture(scope='module')
def run(tmp_path_factory: pytest.TempPathFactory) -> Any:
  """Two methods on one task, run in this process: the folder, the results, and what a rerun finds.

  One run of SPD at the higher rate is made one that diverged.
  """
  out = tmp_path_factory.mktemp('compare')
  some = {
    'Adam': methods.Method(methods.adam),
    'projection_decay': methods.Method(methods.chained, (SPD,)),
  }
  again, run_part = [], jobs.run_part

  def diverging(*args: Any) -> Any:
    records = run_part(*args)
    if args[1] == 'projection_decay':
      records[-1] |= {'id': [70.0, math.nan], 'moved': [1.0, math.nan]}
    return records

  def each_task(run: Any, args: Any) -> dict[str, Any]:
    first = {name: run(name, args) for name in args.tasks}
    with pytest.MonkeyPatch.context() as patch:
      patch.setattr(jobs, 'run_part', pytest.fail)
      again.append({name: run(name, args) for name in args.tasks})
    return first

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(methods, 'METHODS', some)
    patch.setattr(jobs, 'run_part', diverging)
    patch.setattr(compare, 'DEFAULTS', {'projection_decay': SPD})
    patch.setattr(compare, 'each_task', each_task)
    return out, compare.main([*ARGUMENTS, str(out)]), again[0]


def test_a_run_goes_on_from_its_cache(run: Any) -> None:
  """Catches work that is done again: here it would fail."""
  _, first, again = run
  assert first == again


def test_records_are_whole_and_valid_json(run: Any) -> None:
  """Catches lost configurations, NaN in the file, and a diverged run that is scored."""
  out, _, _ = run

  def refuse(constant: str) -> None:
    raise AssertionError(constant)

  lines = (out / 'records.jsonl').read_text().splitlines()
  records = [json.loads(line, parse_constant=refuse) for line in lines]
  counts: dict[str, int] = {}
  for record in records:
    counts[record['method']] = counts.get(record['method'], 0) + 1
    assert record['task'] == 'tumours'
    assert len(record['sets']) == 5
    for column in ('validation', 'id', 'ood', 'moved'):
      assert len(record[column]) == 2, column
    means = np.mean([*record['sets'].values()], axis=0)
    np.testing.assert_allclose(record['ood'], means, atol=0.011)
  assert counts == {'Adam': 2, 'projection_decay': 2}
  diverged = records[-1]
  assert diverged['id'] == [70, 0]
  assert diverged['moved'] == [1, None]
  assert diverged['validation'][1] == diverged['ood'][1] == 0 < diverged['ood'][0]


def test_results_have_all_tables_and_pictures(run: Any) -> None:
  """Catches a method or column that is lost on the way to the tables."""
  out, _, _ = run
  written = json.loads((out / 'results.json').read_text())
  assert written['settings']['protocols']['tumours']['seeds'] == 2
  assert written['settings']['friedman'] is None  # of one task it says nothing
  rows = ['Adam', 'projection_decay', 'projection_decay, default']
  table = written['results']['tumours']
  assert list(table) == ['pre-trained', *rows]
  columns = ['setting', 'rate', 'ID', 'OOD', 'moved', 'held', 'oracle ID', 'oracle OOD']
  assert list(table['projection_decay']) == columns
  assert list(table['Adam']) == [column for column in columns if column != 'held']
  assert table['projection_decay, default']['setting'] == 'λ = 1, m = 0'
  assert sorted(written['results']['overall']) == sorted(rows)
  assert list(written['results']['rates']) == ['Adam', 'projection_decay λ = 1, m = 0']
  for name in ('pareto.png', 'ranks.png'):
    assert (out / name).read_bytes().startswith(b'\x89PNG')


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    (['--tasks', 'handwriting'], '--real'),
    (['--real', '--tasks', 'handwriting', 'tumours'], '--real'),
    (['--real', '--bfloat16'], 'pictures'),
    (['--methods', 'L2-SP'], 'Adam'),
    (['--methods', 'Adam', 'L2SP'], 'invalid choice'),
    (['--steps', '0'], 'at least 1'),
    (['--from', 'runs/real'], '--out'),
    (['--from', 'runs/real', '--out', 'runs/all', '--seeds', '2'], 'no other options'),
    (['--from', 'runs/real', '--out', 'runs/all', '--workers', '2'], 'no other options'),
    (['--from', 'runs/real', '--out', 'runs/all', '--bfloat16'], 'no other options'),
  ],
  ids=[
    *('real without --real', 'mixed', 'pictures in bfloat16', 'without Adam', 'typing error'),
    *('no steps', 'over other results', 'seeds', 'workers', 'a width'),
  ],
)
def test_what_cannot_be_compared(
  arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
  """Catches hours of training before a table that cannot be made."""
  with pytest.raises(SystemExit):
    compare.main(arguments)
  assert message in capsys.readouterr().err


def test_bfloat16_reaches_the_training_and_no_other(
  monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
  """Catches an option that changes nothing, a foundation in bfloat16, and a page that is silent."""
  seen: dict[str, Task] = {}
  scores = {'id': np.zeros(1), 'ood': {'old': np.zeros(1)}}
  monkeypatch.setattr(compare, 'foundation', lambda name, task, args: seen.update(foundation=task))
  monkeypatch.setattr(jobs, 'run', lambda task, *args: seen.update(trained=task) or [])
  monkeypatch.setattr(jobs, 'measure', lambda *args: scores)
  args = argparse.Namespace(real=False, quick=True, methods=['Adam'], seeds=1, rates=(1e-3,))
  args.no_warmup, args.steps, args.out, args.at_once = False, None, tmp_path, None
  for narrow in (True, False):
    args.bfloat16 = narrow
    found = compare.run_task('tumours', args)
    assert ('bfloat16' in compare.title({'tumours': found})) == narrow
    for name, task in seen.items():
      batch = jax.tree.map(lambda x: x[:2], task.old)
      program = str(jax.make_jaxpr(task.loss)(task.init(jax.random.key(0)), batch))
      assert ('bf16' in program) == (narrow and name == 'trained'), name


# The cache.


def test_cache_makes_what_it_lacks_and_nothing_else(tmp_path: Path) -> None:
  """Catches results kept under another key, and results that are made again."""
  path, made = tmp_path / 'task' / 'method.json', []

  def make(value: int) -> Any:
    made.append(value)
    return [{'id': [value]}]

  for key, value in (('a', 1), ('a', 2), ('b', 3), ('b', 4)):
    found = cache.records(path, key, lambda value=value: make(value))
    assert found == [{'id': [{'a': 1, 'b': 3}[key]]}]
  assert made == [1, 3]
  weights = {'head': {'w': np.arange(3, dtype=np.float32)}}
  for expected in (weights, weights):
    found = cache.params(tmp_path / 'foundation', 'key', lambda: weights)
    np.testing.assert_array_equal(found['head']['w'], expected['head']['w'])


def test_a_killed_write_leaves_what_there_was(
  tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  """Catches half a file that is taken for results."""
  path = tmp_path / 'method.json'
  write = Path.write_bytes

  def killed(self: Path, content: bytes) -> None:
    write(self, content[: len(content) // 2])
    raise KeyboardInterrupt

  cache.records(path, 'a', lambda: [{'id': [1]}])
  monkeypatch.setattr(Path, 'write_bytes', killed)
  with pytest.raises(KeyboardInterrupt):
    cache.records(path, 'b', lambda: [{'id': [2]}])
  with pytest.raises(KeyboardInterrupt):
    cache.records(tmp_path / 'new.json', 'b', lambda: [{'id': [2]}])
  assert not (tmp_path / 'new.json').exists()
  assert cache.records(path, 'a', lambda: []) == [{'id': [1]}]


def test_a_key_follows_all_that_changes_a_result() -> None:
  """Catches a key without the optimizer inside, what a method calls, or what goes on from it."""
  inner = [cache.digest(methods.around(each)) for each in (methods.adam, methods.sgd, methods.lion)]
  assert len(set(inner)) == 3
  assert methods.thaw in cache.calls(methods.freezing)
  adam = methods.METHODS['Adam']
  keys = [cache.digest(adam.optimizer, method=m[1:]) for m in (adam, adam._replace(ends=()))]
  assert keys[0] != keys[1]
  assert cache.digest(adam.optimizer, method=adam[1:]) == keys[0]


# Ablations.


def test_a_variant_acts_by_its_own_equation() -> None:
  """Catches a change that does not reach the optimizer: φ = 1 pulls by all of ‖g‖."""
  tx, adam = ablations.variants()[f'{ablations.CHAIN}: φ = 1'].make(0.1), optax.adam(0.1)
  start, theta, gradient = jnp.array([1.0, 1.0]), jnp.array([2.0, 1.0]), jnp.array([0.6, 0.8])
  _, state = tx.update(gradient, tx.init(start), start)
  found, _ = tx.update(gradient, state, theta)
  _, state = adam.update(gradient, adam.init(start))
  expected, _ = adam.update(gradient + jnp.array([1.0, 0.0]), state)
  np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_a_pull_from_momentum_by_hand() -> None:
  """Catches momentum that replaces the gradient, or does not decide."""
  start, theta = np.array([1.0, 1.0]), np.array([4.0, 5.0])  # d = (3, 4), of norm 5
  tx = ablations.from_momentum(spd.projection_decay(jnp.array(start), 0.5, margin=0.0))
  state = tx.init(jnp.array(theta))
  mean = np.zeros(2)
  d = (theta - start) / 5
  for gradient, turned in (([1.0, 1.0], True), ([-0.5, -0.5], True), ([-9.0, 0.0], False)):
    found, state = tx.update(jnp.array(gradient), state, jnp.array(theta))
    mean = 0.9 * mean + 0.1 * np.array(gradient)
    assert (mean @ d > 0) == turned
    expected = np.array(gradient) + 0.5 * max(0, mean @ d) * d
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_every_variant_differs_from_its_base() -> None:
  """Catches an option that does not reach the optimizer; and layers of the wrong grain."""
  rng = np.random.default_rng(0)
  shapes = {'hidden': {'kernel': (3, 2), 'bias': (2,)}}

  def draw(shape: tuple[int, ...], *more: int) -> jax.Array:
    return jnp.float32(rng.normal(size=(*more, *shape)))

  def is_shape(x: Any) -> bool:
    return isinstance(x, tuple)

  params = jax.tree.map(draw, shapes, is_leaf=is_shape)
  gradients = jax.tree.map(lambda shape: draw(shape, 100), shapes, is_leaf=is_shape)

  def trained(make: ablations.Make) -> Any:
    tx = make(0.1)

    def step(carry: Any, gradient: Any) -> Any:
      updates, state = tx.update(gradient, carry[1], carry[0])
      return (optax.apply_updates(carry[0], updates), state), None

    (after, state), _ = jax.lax.scan(step, (params, tx.init(params)), gradients)
    return jax.flatten_util.ravel_pytree(after)[0], optax.tree.get(state, 'condition', {})

  variants = ablations.variants()
  whole = {name: each for name, each in variants.items() if not each.batch}
  options = {'xla_backend_optimization_level': 0}  # compiles sooner
  found = jax.jit(
    lambda: {name: trained(each.make) for name, each in whole.items()}, compiler_options=options
  )()
  for name, each in variants.items():
    if name != ablations.ADAM and not each.batch:
      assert np.max(np.abs(found[name][0] - found[each.base][0])) > 1e-4, name
    if each.batch:
      assert each.make is variants[name.rpartition(': ')[2]].make
      assert variants[each.base].batch == each.batch
  for form in (ablations.ADAM_SPD, ablations.CHAIN):
    assert sorted(found[f'{form}: a layer is a module'][1]) == ['hidden']
    assert sorted(found[f'{form}: a layer is the model'][1]) == ['model']
    units = found[f'{form}: a layer is an output unit'][1]
    assert {name: x.shape for name, x in units.items()} == {
      'hidden~bias': (2,),
      'hidden~kernel': (2,),
    }


def test_ablations_tabulate_differences_to_the_base() -> None:
  """Catches a difference to another variant, or of the wrong sign."""
  names = list(ablations.variants())
  records = {
    task: {name: [{'id': [10.0 * i + up, 10.0 * i], 'ood': [i, i]}] for i, name in enumerate(names)}
    for task, up in (('one', 2), ('two', 4))
  }
  rows = ablations.table(records)
  assert rows['projection_decay']['ID'] == f'{10 + 1.5:.1f}'
  for i, name in enumerate(names):
    base = names.index(rows[name]['compared to'])
    assert rows[name]['ID, difference'] == [10 * (i - base)] * 2
    assert rows[name]['OOD, difference'] == [i - base] * 2
