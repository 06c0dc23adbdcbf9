"""The sequence of tasks in examples/continual.py, at a tiny size."""

import json

import numpy as np
import pytest
import smoke

import continual

pytestmark = pytest.mark.examples

TINY = ['--pretrain-steps', '3', '--steps', '4', '--seeds', '2', '--batch', '4', '--lr', '0.01']


@pytest.fixture(scope='module', autouse=True)
def quick_compiles():
  with smoke.quick_compiles():
    yield


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  out = tmp_path_factory.mktemp('continual')
  every = continual.methods
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(continual.finetune_vit, 'small_vit', smoke.tiny_vit)
    patch.setattr(continual, 'methods', lambda *args: dict(list(every(*args).items())[:4]))
    return out, continual.main([*TINY, '--anchor-ema', '0.5', '--out', str(out)])


def test_it_writes_its_results(run):
  """Catches a column or method that is lost."""
  out, results = run
  assert json.loads((out / 'results.json').read_text())['results'] == results
  assert (out / 'results.png').read_bytes().startswith(b'\x89PNG')
  columns = 'thick 1, thick 2, thick 3, striped 2, striped 3, inverted 3, old 1, old 2, old 3'
  for row in results.values():
    assert list(row) == [*columns.split(', '), 'forgotten']
    assert all(len(values) == 2 for values in row.values())


def test_methods_part_where_their_anchors_do(run):
  """Catches a new anchor in the first task, and none in the second; and an anchor that stays."""
  _, results = run
  fixed, moved = results['adam_spd'], results['adam_spd, reanchored']
  assert fixed['thick 1'] == moved['thick 1']
  assert fixed['old 1'] == moved['old 1']
  late = [tuple(row['old 3'] + row['thick 3']) for row in results.values()]
  assert len(set(late)) == len(late) == 4


def test_forgotten_is_what_a_task_loses_after_it_was_learned():
  """Catches accuracies subtracted across tasks or the wrong way round."""
  stages = []
  for j in range(3):
    old = {style: [50.0 - j, 40.0] for style in continual.digits.OLD}
    stages.append(old | {task: [90.0 - 10 * j, 80.0] for task in continual.TASKS})
  found = continual.summary(stages)
  np.testing.assert_allclose(found['forgotten'], [(20 + 10) / 2, 0])
  assert found['striped 2'] == [80.0, 80.0]
  assert found['old 3'] == [48.0, 40.0]


def test_every_task_has_its_own_digits(run):
  """Catches a task that is trained on the images of another."""
  config = continual.finetune_vit.small_vit().config
  tasks = continual.stages(continual.parse(TINY), config)
  assert [task.style for task in tasks] == list(continual.TASKS)
  assert [len(task.data.labels) for task in tasks] == [100, 100, 100]
  assert len({task.data.labels.tobytes() for task in tasks}) == 3
