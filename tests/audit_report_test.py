"""python -m spd_optax.audit: tables, pictures and a page, and a clear refusal of anything else."""

import html.parser
import itertools
import json
import re
import shutil
import subprocess
import sys
import time

import matplotlib.image
import numpy as np
import pytest

import spd_optax as spd
from spd_optax import audit
from spd_optax.audit import __main__ as command
from spd_optax.audit import pictures, reading, series, tables
from spd_optax.step import ProjectionDecayState


def names(count):
  """Layers as a transformer has them."""
  parts = ('attention/query/kernel', 'attention/query/bias', 'mlp/kernel', 'mlp/bias')
  found = [f'encoder/layer/{i}/{part}' for i in range(count // 4) for part in parts]
  return [*found, *(f'head/{i}' for i in range(count - len(found)))]


def write(path, layers, steps=30, seed=0, **facts):
  """A log of states that were made up: layer i is held with a probability that grows with i."""
  rng = np.random.default_rng(seed)
  anchor = {name: np.full(4, i % 3, np.float32) for i, name in enumerate(layers)}
  constrained = np.zeros(len(layers), np.int32)
  facts = {'transform': 'adam_spd', 'hyperparameters': {'lr': 1e-3}, 'source': 'x', **facts}
  with spd.AuditLog(path, **facts) as log:
    for step in range(1, steps + 1):
      held = rng.random(len(layers)) < np.linspace(0, 0.9, len(layers)) * (step > 1)
      constrained = constrained + held
      far = np.linspace(0.5, 2, len(layers), dtype=np.float32) * np.sqrt(np.float32(step - 1))
      columns = held, rng.random(len(layers), np.float32), far, constrained.astype(np.int32)
      named = [dict(zip(layers, column, strict=True)) for column in columns]
      metrics = {'loss': 1 / step} | ({'OOD accuracy': 0.9 - step / 100} if step % 5 == 0 else {})
      log.record(step, ProjectionDecayState(np.int32(step), anchor, *named), metrics)
  return path


@pytest.fixture(scope='module')
def logs(tmp_path_factory):
  """Two runs of 12 layers, and two of 400."""
  folder = tmp_path_factory.mktemp('logs')
  return {
    f'{run}{count}': write(folder / f'{run}{count}.jsonl', names(count), seed=seed)
    for count in (12, 400)
    for seed, run in enumerate('ab')
  }


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch):
  monkeypatch.setenv('COLUMNS', '200')


def run(*arguments):
  """Runs the command in this process."""
  return command.main([str(argument) for argument in arguments])


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
    assert len(np.unique(pixels[..., :3].reshape(-1, 3), axis=0)) > 20


def test_report_of_a_large_model_shows_blocks_and_with_all_every_layer(logs, tmp_path, capsys):
  # Would catch: a report of 400 lines in which nothing can be found, or layers that never show.
  assert run('report', logs['a400'], '--out', tmp_path) == 0
  lines = capsys.readouterr().out.splitlines()
  assert len(lines) < 120
  assert run('report', logs['a400'], '--out', tmp_path, '--all') == 0
  printed = capsys.readouterr().out
  assert all(name in printed for name in names(400))


def test_the_table_says_what_the_log_says(logs):
  log = audit.read(logs['a12'])
  table = tables.layers(series.of_run(log))
  last = log.records[-1]
  for i, row in enumerate(table.rows):
    assert row[0] == log.layers[i]
    assert row[1] == ('yes' if last.held[i] else '')
    assert row[2] == f'{100 * last.steps[i] / 30:.1f}'
    assert float(row[4]) == pytest.approx(float(last.distance[i]), rel=1e-3)
    norm = 2 * (names(12).index(row[0]) % 3)
    assert row[5] == (f'{100 * last.distance[i] / norm:.1f}' if norm else '–')


def test_the_heat_map_shows_the_share_of_the_updates_between_its_columns(logs):
  # Would catch: a map of the logged conditions alone, which a log of every 100th step aliases.
  log = audit.read(logs['a12'])
  every = series.of_run(log)
  edges, shares = series.held_between(every, 29)
  assert edges.tolist() == list(range(1, 31))
  np.testing.assert_array_equal(shares, [record.held for record in log.records[1:]])
  edges, shares = series.held_between(every, 2)
  between = np.mean([r.held for r in log.records if edges[0] < r.step <= edges[1]], axis=0)
  np.testing.assert_allclose(shares[0], between)
  (axes, _) = pictures.held([every]).axes
  assert axes.collections[0].get_array().shape == (12, 29)


@pytest.mark.parametrize('count', [12, 400])
def test_names_in_the_heat_map_do_not_overlap(logs, count):
  figure = pictures.held([series.of_run(audit.read(logs[f'a{count}']))])
  figure.canvas.draw()
  labels = [label for label in figure.axes[0].get_yticklabels() if label.get_text()]
  assert len(labels) >= 12
  boxes = sorted((label.get_window_extent() for label in labels), key=lambda box: box.y0)
  overlaps = [low.y1 - high.y0 for low, high in itertools.pairwise(boxes)]
  assert max(overlaps) < 2  # pixels


def test_blocks_are_those_of_the_paths():
  layers = [f'{part}/{i}/{leaf}' for part in 'ab' for i in range(10) for leaf in 'xyz']
  layers += ['stack/kernel[0]', 'stack/kernel[1]']
  found = series.blocks(layers, 24)
  assert [block.name for block in found[:2]] == ['a/0', 'a/1']
  assert found[-1] == ('stack', 60, 62)
  assert [block.end for block in found[:-1]] == [block.begin for block in found[1:]]
  flat = series.blocks([f'layer_{i}' for i in range(400)], 48)
  assert len(flat) <= 48
  assert flat[0].name == 'layer_0'
  assert flat[-1].end == 400


def test_a_layer_whose_distance_is_nan_or_zero_does_not_stop_the_report(tmp_path):
  # Would catch: an axis limit of NaN.
  path = tmp_path / 'run.jsonl'
  layers = ['a', 'b']
  anchor, free, none = (
    {name: x for name in layers} for x in (np.ones(1), np.bool_(0), np.int32(0))
  )
  bad = dict(zip(layers, np.float32([np.nan, 0]), strict=True))
  state = ProjectionDecayState(np.int32(1), anchor, free, bad, bad, none)
  log = spd.AuditLog(path, transform='x')
  log.record(1, state)
  with pytest.warns(audit.AuditWarning, match='not finite'):
    log.close()
  assert run('report', path, '--html', tmp_path / 'page.html') == 0
  page = (tmp_path / 'page.html').read_text()
  assert 'not finite: layers a' in page


class Page(html.parser.HTMLParser):
  """Collects what a page refers to, and its text."""

  def __init__(self, text):
    super().__init__()
    self.references, self.text, self.tags, self.images = [], '', [], []
    self.feed(text)

  def handle_starttag(self, tag, attrs):
    self.tags.append(tag)
    for name, value in attrs:
      if name in ('src', 'href', 'srcset', 'data', 'action'):
        self.references.append(value)

  def handle_data(self, data):
    self.text += data


def test_the_page_needs_nothing_but_itself(logs, tmp_path):
  # Would catch: a style sheet, script or picture from elsewhere.
  page = tmp_path / 'page.html'
  assert run('report', logs['a400'], '--out', tmp_path, '--html', page) == 0
  parsed = Page(page.read_text())
  assert len(parsed.references) == 4
  assert all(x.startswith('data:image/png;base64,') for x in parsed.references)
  assert not {'script', 'link', 'iframe'} & {*parsed.tags}
  assert not re.search(r'https?://|url\(|@import', re.sub(r'base64,[^"]*', '', page.read_text()))
  assert all(name in parsed.text for name in names(400))


def test_what_a_log_says_cannot_steer_page_or_terminal(tmp_path, capsys):
  # Would catch: markup or escape sequences in names that come from a file.
  evil = '<script>alert(1)</script>\x1b[31m[bold]'
  path = write(tmp_path / 'run.jsonl', [evil, 'b'], transform=evil, source=evil)
  assert run('report', path, '--html', tmp_path / 'page.html') == 0
  printed = capsys.readouterr().out
  assert '\x1b' not in printed
  assert '[bold]' in printed
  parsed = Page((tmp_path / 'page.html').read_text())
  assert 'script' not in parsed.tags
  assert '<script>alert(1)</script>' in parsed.text


@pytest.mark.skipif(
  not any(map(shutil.which, ('chromium', 'google-chrome'))), reason='needs a browser'
)
def test_a_browser_shows_the_page(logs, tmp_path):
  page = tmp_path / 'page.html'
  assert run('report', logs['a12'], '--out', tmp_path, '--html', page) == 0
  browser = next(filter(None, map(shutil.which, ('chromium', 'google-chrome'))))
  options = ['--headless', '--no-sandbox', '--dump-dom', page.as_uri()]
  found = subprocess.run([browser, *options], capture_output=True, text=True, timeout=120)
  assert names(12)[0] in found.stdout


@pytest.mark.parametrize('count', [12, 400])
def test_compare_puts_two_runs_side_by_side(logs, count, tmp_path, capsys):
  a, b = logs[f'a{count}'], logs[f'b{count}']
  page = tmp_path / 'page.html'
  assert run('compare', a, b, '--out', tmp_path, '--html', page) == 0
  printed = capsys.readouterr().out
  assert f'A: a{count}' in printed
  assert f'B: b{count}' in printed
  assert len(pictures.held([series.of_run(audit.read(path)) for path in (a, b)]).axes) == 3
  first, second = (series.shares(series.of_run(audit.read(path))) for path in (a, b))
  (row,) = [r for r in re.findall(r'<tr>(.*?)</tr>', page.read_text()) if '>head/0<' in r] or [
    r for r in re.findall(r'<tr>(.*?)</tr>', page.read_text()) if f'>{names(count)[-1]}<' in r
  ]
  at = audit.read(a).layers.index(re.search('<td>(.*?)</td>', row)[1])
  assert f'<td>{100 * first[at]:.1f}</td><td>{100 * second[at]:.1f}</td>' in row


def test_compare_of_other_layers_leaves_gaps(logs, tmp_path):
  other = write(tmp_path / 'other.jsonl', ['head/0', 'new'])
  table = tables.compared(*(series.of_run(audit.read(path)) for path in (logs['a400'], other)))
  rows = {row[0]: row[1:] for row in table.rows}
  assert rows['new'][0] == '–'
  assert rows[names(400)[0]][1] == '–'
  assert run('compare', logs['a12'], other, '--out', tmp_path) == 0


def test_verify_says_that_all_is_well_and_where_it_is_not(logs, capsys, tmp_path):
  assert run('verify', logs['a12'], '--hash', audit.read(logs['a12']).hash) == 0
  assert '30 records as they were written' in capsys.readouterr().out
  assert run('verify', logs['a12'], '--hash', 64 * '0') == 1
  assert 'the end was cut off' in capsys.readouterr().err
  lines = logs['a12'].read_text().splitlines(keepends=True)
  (tmp_path / 'edited.jsonl').write_text(''.join([*lines[:5], *lines[6:]]))
  assert run('verify', tmp_path / 'edited.jsonl') == 1
  assert 'line 6: does not continue the line before' in capsys.readouterr().err


def test_a_torn_log_is_reported_with_a_status_of_its_own(logs, tmp_path, capsys):
  # Would catch: a killed run that cannot be looked at, or that looks like a whole one.
  torn = tmp_path / 'torn.jsonl'
  torn.write_bytes(logs['a12'].read_bytes()[:-30])
  before = torn.read_bytes()
  for arguments in (['report', torn, '--out', tmp_path], ['verify', torn]):
    assert run(*arguments) == command.TORN
    captured = capsys.readouterr()
    assert 'the last line is torn' in captured.err
    assert '29' in captured.out
  assert torn.read_bytes() == before


NEWER = reading.seal({'format': reading.FORMAT, 'schema': 99}, '')[0]


@pytest.mark.parametrize(
  ('content', 'message'),
  [
    (b'', 'no audit log'),
    (b'{"loss": 1}\n{"loss": 2}\n', 'no audit log'),
    (b'\0' * 100, 'no audit log'),
    (NEWER, 'has schema 99'),
    (None, 'no such file'),
    ('directory', 'a directory'),
    ('header', 'no records yet'),
    ('edited', 'line 2: its hash does not fit'),
    ('middle', 'line 3'),
  ],
)
@pytest.mark.parametrize('name', ['report', 'verify', 'compare'])
def test_bad_input_is_a_message_and_a_status(logs, name, content, message, tmp_path, capsys):
  # Would catch: a traceback, a report of half a run, or a status that scripts take for success.
  path = tmp_path / 'bad.jsonl'
  whole = logs['a12'].read_bytes()
  match content:
    case bytes():
      path.write_bytes(content)
    case 'directory':
      path.mkdir()
    case 'header':
      path.write_bytes(whole.splitlines(keepends=True)[0])
      if name == 'verify':
        pytest.skip('a header alone is as it was written')
    case 'edited':
      path.write_bytes(whole.replace(b'"step":1,', b'"step":0,', 1))
    case 'middle':
      path.write_bytes(whole[:2000] + whole[3000:])
      message = 'not as it was written'
  arguments = [name, path, path] if name == 'compare' else [name, path]
  assert run(*arguments) == 1
  captured = capsys.readouterr()
  assert message.lower() in captured.err.lower()
  assert 'Traceback' not in captured.err
  assert [entry.name for entry in tmp_path.iterdir()] in ([], ['bad.jsonl'])


def test_an_output_that_cannot_be_written_is_a_message(logs, tmp_path, capsys):
  (tmp_path / 'file').write_text('')
  assert run('report', logs['a12'], '--out', tmp_path / 'file') == 1
  assert 'error:' in capsys.readouterr().err
  assert run('report', logs['a12'], '--out', tmp_path, '--html', tmp_path) == 1


def test_the_module_runs_as_a_command_and_names_the_extra_it_needs(logs, tmp_path):
  code = (
    'import sys; sys.modules["matplotlib.figure"] = None; sys.argv[0] = "audit"; '
    'from spd_optax.audit.__main__ import main; sys.exit(main())'
  )
  found = subprocess.run(
    [sys.executable, '-c', code, 'report', str(logs['a12'])], capture_output=True, text=True
  )
  assert found.returncode == 1
  assert "pip install 'spd_optax[audit]'" in found.stderr
  module = [sys.executable, '-m', 'spd_optax.audit', 'verify', str(logs['a12'])]
  assert subprocess.run(module, capture_output=True).returncode == 0


def test_reading_does_not_slow_down_with_the_length_of_a_log(tmp_path):
  # Would catch: a reader whose time grows with the square of the records.
  path = write(tmp_path / 'long.jsonl', names(200), steps=500)
  begin = time.perf_counter()
  assert len(audit.read(path).records) == 500
  assert time.perf_counter() - begin < 5


def test_the_format_is_as_documented(logs):
  # Would catch: a field that the documentation of the format lacks.
  header, first, *_ = map(json.loads, logs['a12'].read_text().splitlines())
  for name in {*header, *header['anchor'], *first}:
    assert f'`{name}`' in reading.__doc__, name
