"""What examples/compare.py chooses, tests, tabulates and draws, against hand-made cases."""

import json
import math
from typing import Any

import numpy as np
import pytest

from suite import choice, pictures, tables

pytestmark = pytest.mark.examples


def record(method: str, values: Any, setting: Any = None, rate: float = 1e-3) -> dict[str, Any]:
  """A configuration whose scores are (validation, id, ood), each a list over seeds."""
  scores = dict(zip(('validation', 'id', 'ood'), values, strict=True))
  moved = {'sets': {'old': list(values[2])}, 'moved': [1.0] * len(values[0])}
  return {'method': method, 'setting': setting or {}, 'rate': rate} | scores | moved


# Choice.


def test_validation_alone_chooses() -> None:
  """Catches a choice that has seen test scores; of equals the first is taken."""
  one = record('a', ([80, 82], [10, 10], [10, 10]))
  other = record('a', ([80, 81], [99, 99], [99, 99]))
  assert choice.by_validation([other, one, one | {'rate': 7}]) is one
  assert choice.by_oracle([one, other]) is other


def test_a_default_has_one_setting_and_the_best_rate_for_it() -> None:
  """Catches a default that is swept, and a rate chosen for another setting."""
  default, firm = {'strength': 0.3}, {'strength': 3.0}
  records = [
    record('SPD', ([50], [1], [1]), default, 1e-3),
    record('SPD', ([60], [2], [2]), default, 1e-2),
    record('SPD', ([70], [3], [3]), firm, 1e-3),
    record('Adam', ([40], [4], [4])),
  ]
  found = choice.chosen(records, {'SPD': default})
  assert {name: each['id'] for name, each in found.items()} == {
    'SPD': [3],
    'SPD, default': [2],
    'Adam': [4],
  }


def test_holm_by_hand() -> None:
  """Catches Bonferroni's factors, corrected p that fall again, and p above 1."""
  np.testing.assert_allclose(choice.holm([0.04, 0.01, 0.03]), [0.06, 0.03, 0.06])
  np.testing.assert_allclose(choice.holm([0.9, 0.5]), [1, 1])


def test_ranks_and_their_tests_by_hand() -> None:
  """Catches ranks that begin with the worst, and tests over methods instead of tasks."""
  np.testing.assert_array_equal(
    choice.ranks(np.array([[3, 1, 3], [1, 2, 3]])), [[1.5, 3, 1.5], [3, 2, 1]]
  )
  # Rank sums 11, 8, 5: the statistic is 12/(4·3·4) (121 + 64 + 25) − 3·4·4 = 4.5, of χ²(2).
  values = np.array([[3, 2, 1], [3, 1, 2], [3, 2, 1], [2, 3, 1]])
  assert choice.friedman(values) == pytest.approx(math.exp(-4.5 / 2))
  # Five wins out of five: 2 of 32 sign patterns are as extreme; Holm doubles it. No difference: 1.
  peer = np.array([5.0, 6, 7, 8, 9])
  values = np.stack([peer, peer + np.arange(1, 6), peer], axis=1)
  assert choice.against(values, ['Adam', 'b', 'c'], 'Adam') == {'b': 0.125, 'c': 1.0}


def test_a_diverged_run_scores_0() -> None:
  """Catches NaN that wins a choice or is written, and chance level for weights that are NaN."""
  nan = math.nan
  diverged = record('SGD', ([nan, 80], [nan, 70], [nan, 60]), rate=1e-2)
  silent = record('SGD', ([10, 80], [10, 70], [10, 60])) | {'moved': [nan, 2.0]}
  huge = record('SGD', ([10, 80], [10, 70], [10, 60])) | {'moved': [math.inf, 2.0]}
  for each in (diverged, silent, huge):
    found = choice.without_diverged(each)
    assert [found[c] for c in ('validation', 'id', 'ood')] == [[0, 80], [0, 70], [0, 60]]
    assert found['sets'] == {'old': [0, 60]}
    assert found['moved'] == [None, each['moved'][1]]
    json.dumps(found, allow_nan=False)
  fine = record('SGD', ([45, 45], [1, 1], [1, 1]))
  assert choice.without_diverged(fine) == fine
  assert choice.by_validation([choice.without_diverged(diverged), fine]) is fine


# Tables and pictures.

DEFAULTS = {'projection_decay': {'strength': 0.3}}


def two_tasks() -> dict[str, list[dict[str, Any]]]:
  """SPD is 2 better in distribution and 6 out of it on one task, 4 and 10 on the other."""
  found = {}
  for task, more in (('one', (2, 6)), ('two', (4, 10))):
    found[task] = [record('Adam', ([70, 70], [80, 82], [50, 50]), rate=rate) for rate in (1, 2)]
    for strength, up in ((0.3, 0), (3.0, 1)):
      values = ([70 + up] * 2, [80 + up * more[0], 82 + up * more[0]], [50 + up * more[1]] * 2)
      found[task] += [record('projection_decay', values, {'strength': strength}, r) for r in (1, 2)]
  return found


def test_tables_say_what_the_records_do() -> None:
  """Catches differences of the wrong sign, column or method, and rates that are mixed up."""
  records = two_tasks()
  best = {task: choice.chosen(found, DEFAULTS) for task, found in records.items()}
  overall = tables.overall(best)
  assert next(iter(overall)) == 'projection_decay'
  assert overall['projection_decay']['ID − Adam'] == [2, 4]
  assert overall['projection_decay']['OOD − Adam'] == [6, 10]
  assert overall['projection_decay, default']['OOD − Adam'] == [0, 0]
  assert overall['projection_decay']['rank'] == [1, 1]
  assert overall['Adam']['rank'] == [2.5, 2.5]
  assert (overall['Adam']['ID'], overall['projection_decay']['OOD']) == ('81.0', '58.0')

  records['one'][0]['moved'] = [None, None]
  row = tables.of_task(records['one'], DEFAULTS)
  assert row['projection_decay']['setting'] == 'λ = 3'
  assert row['projection_decay']['OOD'] == row['projection_decay']['oracle OOD'] == [56, 56]
  assert row['Adam']['moved'] == '–'

  records['two'][1]['id'] = [90, 90]
  assert tables.by_rate(records, {'Adam': {}})['Adam'] == {
    'ID, 1': '81.0',
    'ID, 2': '85.5',
    'OOD, 1': '50.0',
    'OOD, 2': '50.0',
  }


def test_pictures_are_drawn(tmp_path: Any) -> None:
  """Catches a picture that fails where a task lacks a method, or is not written."""
  records = two_tasks()
  best = {task: choice.chosen(found, DEFAULTS) for task, found in records.items()}
  before = {task: {'id': [30.0], 'ood': [70.0]} for task in records}
  pictures.pareto(tmp_path / 'a.png', {t: t for t in records}, records, before, best)
  names, values = choice.scores(best, choice.both)
  pictures.ranks(tmp_path / 'b.png', names, choice.ranks(values))
  for name in ('a.png', 'b.png'):
    assert (tmp_path / name).read_bytes().startswith(b'\x89PNG')


@pytest.fixture
def figure(monkeypatch: pytest.MonkeyPatch) -> Any:
  """What closes a figure; gives the one that was drawn."""
  close, drawn = pictures.plt.close, []
  monkeypatch.setattr(pictures.plt, 'close', drawn.append)
  yield lambda: drawn[0]
  for each in drawn:
    close(each)


def positions(points: Any, axis: int) -> list[float]:
  return points.get_offsets()[:, axis].tolist()


def test_a_point_for_each_kind_of_layer_and_method(tmp_path: Any, figure: Any) -> None:
  """Catches shares of another row or method, and settings that look alike."""
  methods = ('adam_spd', 'projection_decay, m = 0', 'projection_decay, m = 1', 'of no color')
  rows = {
    'up': [[10.0, 20.0], [30.0], [40.0], [0.0]],
    'down': [[50.0], [60.0, 80.0], [90.0], [5.0]],
  }
  kinds = {
    f't, {kind}': {'weights of each': '8'}
    | {f'held by {name}': each for name, each in zip(methods, values, strict=True)}
    for kind, values in rows.items()
  }
  pictures.held(tmp_path / 'held.png', 'title', kinds)
  (axes,), (legend,) = figure().axes, figure().legends
  assert [label.get_text() for label in axes.get_yticklabels()] == ['up  (8)', 'down  (8)']
  shares = [positions(points, 0) for points in axes.collections]
  assert shares == [[15, 50], [30, 70], [40, 90], [0, 5]]
  assert [np.round(positions(points, 1)).tolist() for points in axes.collections] == [[0, 1]] * 4
  assert tuple(text.get_text() for text in legend.get_texts()) == methods
  shapes = {points.get_paths()[0].vertices.tobytes() for points in axes.collections}
  assert len(shapes) == 4


def test_front_curves_stop_where_a_method_does(tmp_path: Any, figure: Any) -> None:
  """Catches another setting than the default, a curve too long, a mean over too few tasks."""

  def made(method: str, of_id: float, ood: float, setting: Any) -> dict[str, Any]:
    return {'method': method, 'setting': setting, 'id': [of_id], 'ood': [ood], 'validation': [0]}

  adam = made('Adam', 90, 50, {})
  records = {
    'a': [adam, made('A', 91, 53, {'m': 0}), made('A', 95, 99, {'m': 1})],
    'b': [adam, made('A', 88, 55, {'m': 0})],
    'c': [adam, made('A', 90, 50, {'m': 0}), made('B', 90, 50, {})],
  }
  titles = {task: f'task {task}' for task in records}
  pictures.front_curves(tmp_path / 'fronts.png', titles, records, {'A': {'m': 0}})
  *panels, mean = figure().axes[:4]
  assert [axes.get_title() for axes in panels] == ['a\ntask a', 'b\ntask b', 'c\ntask c']
  (legend,) = figure().legends
  assert [text.get_text() for text in legend.get_texts()] == ['Adam', 'A, default', 'B']

  def ends(axes: Any, label: str) -> tuple[float, float]:
    (line,) = (line for line in axes.lines if line.get_label() == label)
    x, y = line.get_data()
    known = ~np.isnan(y)
    return (x[known].min().round(1), x[known].max().round(1), *np.unique(y[known]))

  assert [ends(axes, 'Adam') for axes in panels] == [(82, 90, 50)] * 3
  assert [ends(axes, 'A, default') for axes in panels] == [(82, 91, 53), (82, 88, 55), (82, 90, 50)]
  assert ends(mean, 'A, default') == (2, 8, (3 + 5 + 0) / 3)
  (line,) = (line for line in mean.lines if line.get_label() == 'B')
  assert np.isnan(line.get_ydata()).all()


def test_the_headline_shows_each_task_and_the_mean(tmp_path: Any, figure: Any) -> None:
  """Catches points under another task's name, a task too many for the marks, swapped scores."""
  tasks = [f'task {i}' for i in range(9)]
  gains = {
    'Adam': ([0.0] * 9, [0.0] * 9),
    'L2-SP': ([-4.0, *range(1, 9)], [*range(9)]),
    'adam_spd': ([9.0] * 9, [*range(30, 39)]),
  }
  table = {name: {'ID − Adam': a, 'old − Adam': b} for name, (a, b) in gains.items()}
  pictures.headline(tmp_path / 'headline.png', table, tasks)
  panels = figure().axes
  labels = panels[0].get_yticklabels()
  assert [label.get_text() for label in labels] == ['L2-SP', 'adam_spd']
  assert [label.get_fontweight() for label in labels] == ['normal', 'bold']
  assert 'new task' in panels[0].get_xlabel()
  assert 'before' in panels[1].get_xlabel()
  for i, axes in enumerate(panels):
    found = {
      points.get_label(): points for points in axes.collections if points.get_label()[0] != '_'
    }
    assert [*found] == tasks
    for at, points in enumerate(found.values()):
      assert positions(points, 0) == [gains['L2-SP'][i][at], gains['adam_spd'][i][at]]
      assert np.round(positions(points, 1)).tolist() == [0, 1]
    (bars,) = axes.containers
    np.testing.assert_allclose(bars.lines[0].get_xdata(), [[32 / 9, 9], [4, 34]][i])
    (errors,) = bars.lines[2]
    ends = np.array(errors.get_segments())[:, :, 0]
    spread = [np.std(gains[name][i], ddof=1) / 3 for name in ('L2-SP', 'adam_spd')]
    np.testing.assert_allclose(np.diff(ends, axis=1)[:, 0] / 2, spread, atol=1e-6)
