"""Reports of audit logs: tables and pictures that say what the logs say."""

import html
import itertools
import json
import re
import time

import matplotlib.image
import numpy as np
import optax
import pytest
from audited import made_up, names, run, states, write

import spd_optax as spd
from spd_optax import audit
from spd_optax.audit import format, pictures, report


@pytest.fixture(scope='module')
def logs(tmp_path_factory):
  """Two runs of 12 layers, and two of 400."""
  folder = tmp_path_factory.mktemp('logs')
  return {
    f'{run}{count}': made_up(folder / f'{run}{count}.jsonl', names(count), seed=seed)
    for count in (12, 400)
    for seed, run in enumerate('ab')
  }


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch):
  monkeypatch.setenv('COLUMNS', '200')


def test_report_prints_every_layer_of_a_small_model_and_writes_the_pictures(logs, tmp_path, capsys):
  assert run('report', logs['a12'], '--out', tmp_path) == 0
  printed = capsys.readouterr().out
  for name in names(12):
    assert name in printed
  for part in ('adam_spd', '"lr": 0.001', 'OOD accuracy', audit.read(logs['a12']).hash):
    assert part in printed
  for picture in ('held', 'distance', 'relative_distance', 'metrics'):
    pixels = matplotlib.image.imread(tmp_path / f'{picture}.png')
    assert pixels.shape[0] > 300
    assert len(np.unique(pixels[::7, ::7, :3].reshape(-1, 3), axis=0)) > 20


def test_report_of_a_large_model_is_short_and_with_all_shows_every_layer(logs, tmp_path, capsys):
  # Would catch: a report of 400 lines in which nothing can be found, or layers that never show.
  assert run('report', logs['a400'], '--out', tmp_path) == 0
  lines = capsys.readouterr().out.splitlines()
  assert len(lines) < 120
  log = audit.read(logs['a400'])
  every = report._tables([report.Series(log)], every=True)
  assert [row[0] for row in every[-1].rows] == log.layers


def test_the_table_says_what_the_log_says(logs):
  log = audit.read(logs['a12'])
  table = report.layers_table([report.Series(log)])
  last = log.records[-1]
  for i, row in enumerate(table.rows):
    assert row[0] == log.layers[i]
    assert row[1] == ('yes' if last.condition[i] else '')
    assert row[2] == f'{100 * last.constrained[i] / 30:.1f}'
    assert float(row[4]) == pytest.approx(float(last.distance[i]), rel=1e-3)
    norm = 2 * (names(12).index(row[0]) % 3)
    assert row[5] == (f'{100 * last.distance[i] / norm:.1f}' if norm else '–')


def test_the_heat_map_shows_the_share_of_the_updates_between_its_columns(logs):
  # Would catch: a map of the logged conditions alone, which a log of every 100th step aliases.
  log = audit.read(logs['a12'])
  every = report.Series(log)
  assert every.edges.tolist() == list(range(1, 31))
  np.testing.assert_array_equal(every.held, [record.condition for record in log.records[1:]])
  few = report.Series(log, most=3)
  first, second, _ = few.edges
  between = np.mean([r.condition for r in log.records if first < r.step <= second], axis=0)
  np.testing.assert_allclose(few.held[0], between)
  (axes, _) = pictures.held([every]).axes
  assert axes.collections[0].get_array().shape == (12, 29)


@pytest.mark.parametrize('count', [12, 400])
def test_names_in_the_heat_map_do_not_overlap(logs, count):
  figure = pictures.held([report.Series(audit.read(logs[f'a{count}']))])
  figure.canvas.draw()
  labels = [label for label in figure.axes[0].get_yticklabels() if label.get_text()]
  assert len(labels) >= 12
  boxes = sorted((label.get_window_extent() for label in labels), key=lambda box: box.y0)
  overlaps = [low.y1 - high.y0 for low, high in itertools.pairwise(boxes)]
  assert max(overlaps) < 2  # pixels


def test_every_layer_with_a_color_is_in_the_legend(tmp_path):
  # Would catch: names that begin with '_', which matplotlib leaves out by itself.
  layers = ['_k', 'b', '__c', '$d$', *(f'_far/{i}' for i in range(10))]
  over_time = report.Series(audit.read(made_up(tmp_path / 'run.jsonl', layers, 3)))
  figure = pictures.draw([over_time])['distance']
  shown = [text.get_text().strip() for text in figure.axes[0].get_legend().get_texts()]
  farthest = sorted(zip(-over_time.distance[-1], over_time.layers, strict=True))[: pictures.CURVES]
  assert shown[:2] == ['the other 4 layers', 'median of all layers']
  assert shown[2:] == [name.replace('$', r'\$') for _, name in farthest]


def test_the_table_has_the_numbers_of_the_rule(tmp_path, capsys):
  path = made_up(tmp_path / 'run.jsonl', ['a', 'b'], 3, numbers=('mean', 'square'))
  assert run('report', path) == 0
  printed = capsys.readouterr().out
  assert re.search('mean +square', printed)
  assert re.search('a .* 0.03 +1.03', printed)
  assert re.search('b .* 1.03 +2.03', printed)
  header, rows = report.layers_table([report.Series(audit.read(path))] * 2)[1:]
  assert header[-4:] == ['mean: A', 'B', 'square: A', 'B']
  assert rows[1][-4:] == ['1.03', '1.03', '2.03', '2.03']


def test_a_layer_whose_distance_is_nan_or_zero_does_not_stop_the_report(tmp_path):
  # Would catch: an axis limit of NaN.
  path = tmp_path / 'run.jsonl'
  layers = ['a', 'b']
  anchor, free, none = (
    {name: x for name in layers} for x in (np.ones(1), np.bool_(0), np.int32(0))
  )
  bad = dict(zip(layers, np.float32([np.nan, 0]), strict=True))
  state = spd.ProjectionDecayState(np.int32(1), anchor, free, bad, bad, none, {})
  log = spd.AuditLog(path, transform='x')
  log.record(1, state)
  with pytest.warns(audit.AuditWarning, match='not finite'):
    log.close()
  assert run('report', path, '--html', tmp_path / 'page.html') == 0
  page = (tmp_path / 'page.html').read_text()
  assert 'not finite: layers a' in page


def test_compare_puts_two_runs_side_by_side(logs, tmp_path, capsys):
  count = 400
  a, b = logs[f'a{count}'], logs[f'b{count}']
  page = tmp_path / 'page.html'
  assert run('compare', a, b, '--out', tmp_path, '--html', page) == 0
  printed = capsys.readouterr().out
  assert f'A: a{count}' in printed
  assert f'B: b{count}' in printed
  assert len(pictures.held([report.Series(audit.read(path)) for path in (a, b)]).axes) == 3
  first, second = (report.Series(audit.read(path)).share for path in (a, b))
  (row,) = re.findall(f'^ *{names(count)[-1]} .*', page.read_text(), re.M)
  at = audit.read(a).layers.index(names(count)[-1])
  assert re.search(f' {100 * first[at]:.1f} +{100 * second[at]:.1f} ', row)


def test_compare_of_other_layers_leaves_gaps(logs, tmp_path):
  other = made_up(tmp_path / 'other.jsonl', ['head/0', 'new'])
  table = report.layers_table([report.Series(audit.read(path)) for path in (logs['a400'], other)])
  rows = {row[0]: row[1:] for row in table.rows}
  assert rows['new'][0] == '–'
  assert rows[names(400)[0]][1] == '–'
  assert run('compare', logs['a12'], other, '--out', tmp_path) == 0


def test_reading_does_not_slow_down_with_the_length_of_a_log(tmp_path):
  # Would catch: a reader whose time grows with the square of the records.
  path = made_up(tmp_path / 'long.jsonl', names(200), steps=500)
  begin = time.perf_counter()
  assert len(audit.read(path).records) == 500
  assert time.perf_counter() - begin < 5


def test_the_format_is_as_documented(logs):
  # Would catch: a field that the documentation of the format lacks.
  header, first, *_ = map(json.loads, logs['a12'].read_text().splitlines())
  for name in {*header, *header['anchor'], *first}:
    assert f'`{name}`' in format.__doc__, name


VERDICTS = {
  'some': ((1.0, 1.0, -0.2), 0.1, 'Layers were held in 33 % of 9 updates: from 33 % '),
  'none': (
    (1.0,),
    0.1,
    "No layer was held in 9 updates: this run equals its inner optimizer's. Every",
  ),
  'no step': ((1.0,), 0.0, 'The params have not left their anchor; is the learning rate 0'),
  'all': ((1.0,), None, 'Every layer was held in each of 9 updates, as by a uniform pull.'),
}


@pytest.mark.parametrize('name', VERDICTS)
def test_the_report_begins_with_a_verdict(tmp_path, capsys, name):
  """Catches a verdict that is not of this run; the page has it, too."""
  gradients, rate, words = VERDICTS[name]
  inner = optax.sgd(0.1 if rate is None else rate, momentum=0.9)
  tx = optax.chain(spd.l2_sp(), inner) if rate is None else spd.with_projection_decay(inner)
  path, page = tmp_path / 'run.jsonl', tmp_path / 'page.html'
  with spd.AuditLog(path) as log:
    for step, state in enumerate(states(9, tx, gradient=lambda i: gradients[i % len(gradients)])):
      log.record(step, state)
  assert run('report', path, '--html', page) == 0
  assert words in capsys.readouterr().out.splitlines()[0]
  assert html.escape(words) in page.read_text()


def test_a_run_that_begins_again_in_the_same_file_is_kept_apart(tmp_path, capsys):
  """As a script that is run twice does; catches records of two runs in one curve, unsaid."""
  path = write(tmp_path / 'run.jsonl', 5)
  with pytest.warns(spd.audit.AuditWarning, match='begins again at step 0.*pass another path'):
    write(path, 3)
  assert [record.step for record in audit.read(path).current()] == [0, 1, 2]
  assert run('report', path) == 0
  assert '5 records before the last start at the first step, not shown' in capsys.readouterr().out
