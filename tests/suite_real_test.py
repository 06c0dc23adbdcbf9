"""compare.py on loaded models: probes, the decay of the rate, fronts, shares by size."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import compare
from suite import choice, defaults, earlier_runs, fronts, jobs, methods, real, tables, tasks
from suite.tasks import Stage, Task

pytestmark = pytest.mark.examples

SEEDS, SHOTS, STEPS = 2, 30, 20
ROOT = Path(__file__).parents[1]


def rotated(params: Any, x: jax.Array) -> jax.Array:
  return x @ params['body']


def logits(params: Any, batch: Any) -> jax.Array:
  return rotated(params, batch[0]) @ params['head']['kernel'] + params['head']['bias']


def loss(params: Any, batch: Any) -> jax.Array:
  return optax.softmax_cross_entropy_with_integer_labels(logits(params, batch), batch[1]).mean()


def score(params: Any, data: Any) -> jax.Array:
  found = data[0] @ params['head']['kernel'] + params['head']['bias']
  return 100 * jnp.mean(jnp.argmax(found, -1) == data[1])


def task(classes: int, **options: Any) -> Task:
  """Points around as many centres; the last class never occurs among the examples of three."""
  rng = np.random.default_rng(0)
  centres = 6 * rng.normal(size=(3, 4))

  def data(n: int, kinds: int) -> Any:
    labels = np.arange(n) % kinds
    return (centres[labels] + rng.normal(size=(n, 4))).astype(np.float32), labels.astype(np.int32)

  zeros = {'kernel': np.zeros((4, classes), np.float32), 'bias': np.zeros(classes, np.float32)}
  return Task(
    *('points', lambda key: None, loss, score, ()),
    stages=(Stage(data(200, min(classes, 3)), data(150, min(classes, 3))),),
    ood={'two': data(130, 2)},
    blocks=('body', 'head'),
    shots=SHOTS,
    pretrained=lambda: {'body': np.eye(4, dtype=np.float32)[::-1], 'head': zeros},
    features=rotated,
    logits=logits,
    **options,
  )


@pytest.mark.parametrize('classes', [2, 3, 4], ids=['two', 'all', 'one that never occurs'])
def test_a_probe_is_fitted_to_the_examples_of_its_seed(classes: int) -> None:
  """Catches a head with swapped classes, on unscaled features, and one head for all seeds."""
  made = task(classes)
  start = jobs.load(made, SEEDS)
  found = jobs.measure(made, start, np.arange(SEEDS), SEEDS)
  assert (found['id'] > 90).all()
  assert (found['validation'] > 90).all()
  assert (found['ood']['two'] > 90).all()
  first, second = start['head']['kernel']
  assert not np.allclose(first, second)
  np.testing.assert_array_equal(start['body'][0], start['body'][1])


def test_scores_of_chunks_are_those_of_the_whole() -> None:
  """Catches padding that is scored, and rows of another run."""
  made = task(3)
  params = jax.tree.map(jnp.asarray, jobs.load(made, SEEDS))
  params['body'] *= jnp.array([1.0, -1.0])[:, None, None]  # features of its own for each run
  x, labels = made.stages[0].pool  # 200, no multiple of a chunk
  rows = np.array([np.arange(0, 200, 2), np.arange(100, 200)])
  found = jobs.scores_on(made, params, (x, labels), rows)
  for run in range(SEEDS):
    one = jax.tree.map(lambda leaf, run=run: leaf[run], params)
    right = np.argmax(logits(one, (x[rows[run]], None)), -1) == labels[rows[run]]
    assert found[run] == pytest.approx(100 * right.mean())


def test_the_pace_of_a_cosine() -> None:
  """Catches a warm-up of another length, and one that is left out."""
  paces = tasks.cosine(0.2, 10)
  decay = [np.cos(np.pi / 2 * (k + 0.5) / 8) ** 2 for k in range(8)]
  np.testing.assert_allclose(paces, [0.25, 0.75, *decay], rtol=1e-5)
  assert tasks.cosine(0, 10)[0] > 0.99


def test_the_rate_has_a_pace() -> None:
  """Catches a pace that does not reach the optimizer: SGD goes as far as the rates sum to."""
  made = task(3, pace=(0.25, 1.0, 0.25, 0.5))._replace(
    loss=lambda params, batch: params['body'].sum()
  )
  still = made._replace(pace=(1.0,) * 10)
  method = methods.Method(lambda learning_rate, blocks: optax.sgd(learning_rate))
  start = jobs.load(made, SEEDS)
  for each, share in ((made, 0.5), (still, 1.0)):
    (_, params, _), *_ = jobs.fine_tune(
      *(each, method, jobs.program(each, method, jobs.Case({}, 0.1, 0))),
      *([jobs.Case({}, 0.1, seed) for seed in range(SEEDS)], start, SEEDS, STEPS),
    )
    went = np.asarray(start['body']) - np.asarray(params['body'])
    np.testing.assert_allclose(went, 0.1 * STEPS * share, rtol=1e-4)


def test_kl_holds_the_answers_of_the_base_model() -> None:
  """Catches a strength, or a base, that is trained or does not count."""
  made = task(3)._replace(loss=lambda params, batch: -logits(params, batch)[:, 0].mean())
  method = methods.Method(real.towards_base, tuple({methods.KL: k} for k in (0.0, 100.0)))
  free, held = jobs.run(made, 'KL', method, (0.01,), jobs.load(made, SEEDS), SEEDS, STEPS)
  assert np.mean(held['moved']) < 0.5 * np.mean(free['moved'])
  assert held['setting'] == {'kl': 100.0}


def record(method: str, id_score: float, ood: float, **more: Any) -> dict[str, Any]:
  scores = {'validation': [id_score], 'id': [id_score], 'ood': [ood], 'old': [ood]}
  return {'method': method, 'setting': {}, 'rate': 1.0, 'sets': {}, **scores, **more}


def test_fronts_by_hand() -> None:
  """Catches α left out, a front that may fall short in ID, and the wrong sign."""
  adam = [record('Adam', 90, 50), record('WiSE-FT', 89, 55, setting={'alpha': 0.8})]
  own = [record('A', 89.5, 52), record('A + WiSE-FT', 85, 60, setting={'alpha': 0.8})]
  expected = [np.nan, 2, 52 - 55, 52 - 55, 52 - 55, 60 - 55]
  found = [fronts.points(adam + own, method) for method in ('A', 'Adam')]
  np.testing.assert_allclose(fronts.differences(*found), expected)
  table = fronts.table({'task': adam + own})
  assert table['A'] == {
    'configurations': '2',
    'best ID − Adam': [-0.5],
    'OOD − Adam': [np.mean(expected[1:])],
    'levels': '5 of 6',
  }
  assert table['Adam']['OOD − Adam'] == [0]
  assert table['Adam']['levels'] == '6 of 6'


def test_the_front_of_a_default() -> None:
  """Catches other settings of it, its WiSE-FT left out, and a row that says the same again."""
  adam = record('Adam', 90, 50)
  own = [record('A', 89.5, 52, setting={'m': 0}), record('A', 90, 99, setting={'m': 1})]
  mixed = record('A + WiSE-FT', 89, 60, setting={'m': 0, 'alpha': 0.8})
  table = fronts.table({'task': [adam, *own, mixed]}, {'A': {'m': 0}})
  assert table['A']['configurations'] == '3'
  assert table['A, default']['configurations'] == '2'
  assert table['A, default']['OOD − Adam'] == [np.mean([2, 10, 10, 10, 10])]
  assert [*fronts.table({'task': [adam, own[0], mixed]}, {'A': {'m': 0}})] == ['Adam', 'A']


def test_fronts_of_several_tasks_by_hand() -> None:
  """Catches a mean over the tasks that a method fails on, and one of another order."""
  adam, good, poor = record('Adam', 90, 50), record('A', 91, 53), record('A', 20, 99)
  table = fronts.table({'a': [adam, good], 'b': [adam, record('A', 89, 52)]})
  assert table['A'] == {
    'configurations': '2',
    'best ID − Adam': [1, -1],
    'OOD − Adam': [3, 2],
    'levels': '10 of 12',
    'a': '+1.0 / +3.0 (6)',
    'b': '-1.0 / +2.0 (4)',
  }
  fails = fronts.table({'a': [adam, good], 'b': [adam, poor]})['A']
  assert 'OOD − Adam' not in fails
  assert fails['b'] == '-70.0 / –'
  assert fails['best ID − Adam'] == [1, -70]
  absent = fronts.table({'a': [adam, good], 'b': [adam]})['A']
  assert {'best ID − Adam', 'OOD − Adam', 'b'}.isdisjoint(absent)
  assert absent['levels'] == '6 of 6'


def test_shares_by_size_and_kind() -> None:
  """Catches layers in the wrong class, the shares of another rate, and a peer's."""
  one, two, deep = 'block_0/norm_1/bias', 'block_12/norm_2/bias', 'decoder/block/0/layer/1/norm'
  shares = {one: [10.0, 30.0], two: [40.0], deep: [0.0]}
  sizes = {'task': {one: 8, two: 1600, deep: 8}}
  records = {
    'task': [
      record('Adam', 90, 50, rate=0.1),
      record('Adam', 80, 50, rate=0.2),
      record('adam_spd', 80, 50, rate=0.1, layers=shares),
      record('adam_spd', 90, 50, rate=0.2, layers={key: [100.0] for key in shares}),
      record('L2-SP', 90, 50, rate=0.1, layers={key: [100.0] for key in shares}),
    ]
  }
  assert tables.by_size(records, sizes) == {
    'task, up to 100 weights': {'layers': '2', 'held by adam_spd': [20.0, 0.0]},
    'task, up to 10,000 weights': {'layers': '1', 'held by adam_spd': [40.0]},
  }
  assert tables.by_kind(records, sizes) == {
    'task, norm/bias': {
      'layers': '2',
      'weights of each': '8 to 1,600',
      'held by adam_spd': [20.0, 40.0],
    },
    'task, decoder/norm': {
      'layers': '1',
      'weights of each': '8',
      'held by adam_spd': [0.0],
    },
  }


def test_the_choice_among_rules_by_hand() -> None:
  """Catches a choice that sees the task it is scored on, and candidates that are no SPD."""
  adam, wise = record('Adam', 50, 50), record('adam_spd + WiSE-FT', 60, 60)
  peer = record('L2-SP', 70, 70)
  tasks = {
    name: [adam, wise, peer, record('adam_spd', 50, x), record('projection_decay', 50, y)]
    for name, (x, y) in {'a': (59, 50), 'b': (52, 54), 'c': (52, 54)}.items()
  }
  table = defaults.among_rules(tasks)
  assert list(table) == ['adam_spd', 'projection_decay', 'by the rule, on the other tasks']
  assert table['adam_spd']['OOD − Adam'] == [9, 2, 2]
  assert table['by the rule, on the other tasks']['OOD − Adam'] == [0, 2, 2]


def folder(path: Path, name: str, records: list[Any], **settings: Any) -> Path:
  """What compare.py leaves of a run on one task."""
  documents = {
    'tasks': {name: name},
    'protocols': {name: {'steps': 60}},
    'layers': {name: {'a': 8}},
  }
  results = {name: {'pre-trained': {'ID': [1], 'OOD': [2]}}}
  path.mkdir()
  text = json.dumps({'settings': documents | settings, 'results': results, 'versions': {}})
  (path / 'results.json').write_text(text)
  lines = (json.dumps({'task': name, 'moved': [1.0], **each}) + '\n' for each in records)
  (path / 'records.jsonl').write_text(''.join(lines))
  return path


def test_tables_of_earlier_runs(tmp_path: Path) -> None:
  """Catches a task of two folders that is read once, and an equal configuration read twice."""
  adam, held = record('Adam', 50, 50), record('adam_spd', 60, 61, layers={'a': [30.0]}, held=[30.0])
  held |= {'setting': {'strength': 1.0, 'margin': 0.0}}
  a = folder(tmp_path / 'a', 'digits_by_hand', [adam, held])
  more = [record('Adam', 40, 40), record('L2-SP', 70, 70, setting={'strength': 0.1})]
  b = folder(tmp_path / 'b', 'digits_by_hand', more)
  c = folder(tmp_path / 'c', 'handwriting', [adam, held])
  compare.main(['--from', *map(str, (a, b, c)), '--out', str(tmp_path / 'all')])
  found = json.loads((tmp_path / 'all/results.json').read_text())['results']
  assert list(found['digits_by_hand']) == ['pre-trained', 'Adam', 'adam_spd', 'L2-SP']
  assert found['digits_by_hand']['Adam']['ID'] == [50]
  assert list(found['overall']) == ['adam_spd', 'Adam']  # what both tasks have
  assert found['overall']['adam_spd']['OOD − Adam'] == [11, 11]
  assert found['kinds']['handwriting, a']['held by adam_spd'] == [30]
  assert (tmp_path / 'all/pareto.png').exists()
  assert (tmp_path / 'all/headline.png').exists()
  assert (tmp_path / 'all/fronts.png').exists()
  compare.main(['--from', str(c), '--out', str(tmp_path / 'one')])
  assert (tmp_path / 'one/held.png').exists()


@pytest.mark.parametrize(
  ('records', 'settings', 'message'),
  [
    ([('Adam', 1, 1)], {'protocols': {'task': {'steps': 150}}}, r"b: task differs .*'protocol'"),
    ([('Adam', 1, 1)], {'layers': {'task': {'b': 8}}}, r"b: task differs .*'sizes'"),
  ],
  ids=['other steps', 'another model'],
)
def test_runs_that_cannot_be_in_one_table(
  records: list[Any], settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
  """Catches a mean over runs of two protocols."""
  a = folder(tmp_path / 'a', 'task', [record('Adam', 1, 1)])
  b = folder(tmp_path / 'b', 'task', [record(*each) for each in records], **settings)
  with pytest.raises(ValueError, match=message):
    earlier_runs.read([a, b])


@pytest.mark.parametrize('order', ['ab', 'ba'])
def test_a_run_without_the_score_of_the_old_task_joins_one_that_has_it(
  order: str, tmp_path: Path
) -> None:
  """Catches an earlier run that is refused, and a score that is lost."""
  for name, method in zip('ab', ('Adam', 'L2-SP'), strict=True):
    folder(tmp_path / name, 'handwriting', [record(method, 1, 1)])
  path = tmp_path / 'b/results.json'
  document = json.loads(path.read_text())
  document['results']['handwriting']['pre-trained']['old'] = [7]
  path.write_text(json.dumps(document))
  found = earlier_runs.read([tmp_path / name for name in order])['handwriting']
  assert found['before'] == {'id': [1], 'ood': [2], 'old': [7]}
  document['results']['handwriting']['pre-trained']['OOD'] = [3]
  path.write_text(json.dumps(document))
  with pytest.raises(ValueError, match=r"handwriting differs .*'before'"):
    earlier_runs.read([tmp_path / name for name in order])


def test_earlier_runs_need_adam(tmp_path: Path) -> None:
  """Catches an error about a list where a method is missing."""
  path = folder(tmp_path / 'a', 'task', [record('L2-SP', 1, 1)])
  with pytest.raises(ValueError, match='task: all are compared with Adam'):
    earlier_runs.read([path])


def test_all_tasks_can_be_named() -> None:
  """Catches a task whose module has no function of its name."""
  for name in compare.ALL:
    assert callable(compare.maker(name))
  assert choice.PEER in real.METHODS


def test_differences_at_the_rate_of_adam() -> None:
  """Catches another rate, WiSE-FT after a method, and a mean over seeds that are not paired."""

  def task(shift: float) -> list[dict[str, Any]]:
    return [
      record('Adam', 0, 0, rate=1.0)
      | {'id': [50, 60], 'ood': [30, 30], 'old': [70, 80], 'validation': [9]},
      record('Adam', 0, 0, rate=2.0),
      record('adam_spd', 0, 0, rate=1.0)
      | {'id': [51, 59 + shift], 'ood': [33, 35], 'old': [76, 82]},
      record('adam_spd', 0, 0, rate=2.0),
      record('adam_spd + WiSE-FT', 0, 0, rate=1.0),
    ]

  one = tables.at_adams_rate({'a': task(0)})
  assert list(one) == ['Adam', 'adam_spd']
  assert one['adam_spd'] == {'ID − Adam': [1, -1], 'old − Adam': [6, 2], 'OOD − Adam': [3, 5]}
  only_old = [r | {'old': r['ood']} for r in task(0)]
  assert [*tables.at_adams_rate({'a': only_old})['adam_spd']] == ['ID − Adam', 'OOD − Adam']
  other = record('L2-SP', 1, 1, rate=1.0) | {'id': [50, 60], 'ood': [30, 30], 'old': [0, 0]}
  some = tables.like_adam({'a': [*task(0), other], 'b': task(2)}, {})
  assert [[*each] for each in some.values()] == [['Adam', 'adam_spd']] * 2
  starts = {name: {'id': [1, 2], 'ood': [0, 0], 'old': [90, 91]} for name in 'ab'}
  assert tables.scores(some, starts) == {
    'pre-trained': dict.fromkeys('ab', '1.5 / 90.5'),
    'Adam': dict.fromkeys('ab', '55.0 / 75.0'),
    'adam_spd': {'a': '55.0 / 79.0', 'b': '56.0 / 79.0'},
  }
  two = tables.at_adams_rate({'a': [*task(0), other], 'b': task(2)})
  assert two['L2-SP']['OOD − Adam'] == [0]
  assert two['adam_spd'] == {
    'a': '+0.0 / +4.0',
    'b': '+1.0 / +4.0',
    'ID − Adam': [0, 1],
    'old − Adam': [4, 4],
    'OOD − Adam': [4, 4],
  }


def test_differences_by_test_set() -> None:
  """Catches a set of another task, and seeds that are not paired."""
  adam = record('Adam', 0, 0) | {'sets': {'x': [50, 60], 'y': [0, 0]}}
  peer = record('L2-SP', 0, 0) | {'sets': {'x': [51, 59], 'y': [3, 3]}}
  assert tables.each_set({'a': {'Adam': adam, 'L2-SP': peer}}) == {
    'a: x': {'Adam': [50, 60], 'L2-SP − Adam': [1, -1]},
    'a: y': {'Adam': [0, 0], 'L2-SP − Adam': [3, 3]},
  }


def test_sets_of_what_a_model_could_before() -> None:
  """Catches a set of the new task among them, or one that exists no more."""
  sets = {'serif': [1, 2], 'emoji turned': [60.0, 80.0], 'emoji by another': [40.0, 41.0]}
  assert real.on_old('handwriting', sets) == [50, 60.5]
  np.testing.assert_allclose(real.on_old('letters_vit', sets), [101 / 3, 41])
  lines = (ROOT / 'examples/results/real/records.jsonl').read_text().splitlines()
  sets = {record['task']: set(record['sets']) for record in map(json.loads, lines)}
  assert {name: set(others) < sets[name] for name, others in real.OTHER_DATA.items()} == {
    'handwriting': True,
    'minilm_tense': True,
    'minilm_voice': True,
  }


def test_a_method_has_one_row_with_the_setting_of_validation() -> None:
  """Catches a setting that is chosen on test scores or at another rate, and a swept default."""

  def at(method: str, validation: float, score: float, rate: float = 1.0, **setting: float) -> Any:
    both = {'id': [score], 'ood': [score], 'validation': [validation]}
    return record(method, 0, 0, rate=rate) | both | {'setting': setting}

  records = [
    *(at('Adam', 5, 0), at('Adam', 4, 0, rate=2.0)),
    *(at('L2-SP', 3, 1, strength=0.1), at('L2-SP', 2, 7, strength=0.01)),
    at('L2-SP', 9, 8, rate=2.0, strength=0.01),
    *(at('projection_decay', 1, 2, margin=0), at('projection_decay', 2, 7, margin=0.05)),
  ]
  found = tables.like_adam({'a': records}, {'projection_decay': {'margin': 0}})['a']
  assert {name: each['id'] for name, each in found.items()} == {
    'Adam': [0],
    'L2-SP': [1],
    'projection_decay': [2],
  }


def test_scores_at_each_rate() -> None:
  """Catches a column of another rate, and WiSE-FT after every method."""

  def record(method: str, rate: float, value: float, **setting: float) -> dict[str, Any]:
    return {'method': method, 'rate': rate, 'setting': setting, 'id': [value], 'ood': [-value]}

  records = [
    *(record('Adam', rate, 1 + rate) for rate in (1.0, 2.0)),
    record('WiSE-FT', 2.0, 5, alpha=0.8),
    record('WiSE-FT', 2.0, 4, alpha=0.6),
    record('L2-SP', 1.0, 6, strength=0.1),
    record('L2-SP + WiSE-FT', 1.0, 7, strength=0.1, alpha=0.8),
    record('L2-SP', 1.0, 5, strength=0.01),
  ]
  before = {'task': {'id': [8], 'ood': [9]}}
  found = tables.each_rate({'task': records}, before)
  assert found == {
    'pre-trained': {'ID, 1': [8], 'OOD, 1': [9], 'ID, 2': [8], 'OOD, 2': [9]},
    'Adam': {'ID, 1': [2], 'OOD, 1': [-2], 'ID, 2': [3], 'OOD, 2': [-3]},
    'WiSE-FT, α = 0.8': {'ID, 2': [5], 'OOD, 2': [-5]},
    'WiSE-FT, α = 0.6': {'ID, 2': [4], 'OOD, 2': [-4]},
    'L2-SP, λ = 0.1': {'ID, 1': [6], 'OOD, 1': [-6]},
    'L2-SP, λ = 0.01': {'ID, 1': [5], 'OOD, 1': [-5]},
  }
