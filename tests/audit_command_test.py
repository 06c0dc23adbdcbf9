"""python -m spd_optax.audit: its page, its exit status, and a clear refusal of anything else."""

import html.parser
import re
import shutil
import subprocess
import sys

import pytest
from audited import made_up, names, run

from spd_optax import audit
from spd_optax.audit import __main__ as command
from spd_optax.audit import format

NEWER = format.START + b'99}\n'


@pytest.fixture(scope='module')
def log(tmp_path_factory):
  """The log of a run of 12 layers."""
  return made_up(tmp_path_factory.mktemp('log') / 'a12.jsonl', names(12))


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch):
  monkeypatch.setenv('COLUMNS', '200')


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


def test_the_page_needs_nothing_but_itself(log, tmp_path):
  # Would catch: a style sheet, script or picture from elsewhere.
  page = tmp_path / 'page.html'
  path = made_up(tmp_path / 'run.jsonl', names(400), 3)
  assert run('report', path, '--out', tmp_path, '--html', page) == 0
  parsed = Page(page.read_text())
  assert len(parsed.references) == 4
  assert all(x.startswith('data:image/png;base64,') for x in parsed.references)
  assert not {'script', 'link', 'iframe'} & {*parsed.tags}
  assert not re.search(r'https?://|url\(|@import', re.sub(r'base64,[^"]*', '', page.read_text()))
  assert all(name in parsed.text for name in names(400))


def test_what_a_log_says_cannot_steer_page_or_terminal(tmp_path, capsys):
  # Would catch: markup or escape sequences in names that come from a file.
  evil = '<script>alert(1)</script>\x1b[31m[bold]'
  path = made_up(tmp_path / 'run.jsonl', [evil, 'b'], transform=evil, source=evil)
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
def test_a_browser_shows_the_page(log, tmp_path):
  page = tmp_path / 'page.html'
  assert run('report', log, '--out', tmp_path, '--html', page) == 0
  browser = next(filter(None, map(shutil.which, ('chromium', 'google-chrome'))))
  options = ['--headless', '--no-sandbox', '--dump-dom', page.as_uri()]
  found = subprocess.run([browser, *options], capture_output=True, text=True, timeout=120)
  assert names(12)[0] in found.stdout


def test_verify_says_that_all_is_well_and_where_it_is_not(log, capsys, tmp_path):
  assert run('verify', log, '--hash', audit.read(log).hash) == 0
  assert '30 records as they were written' in capsys.readouterr().out
  assert run('verify', log, '--hash', 64 * '0') == 1
  assert 'the end was cut off' in capsys.readouterr().err
  lines = log.read_text().splitlines(keepends=True)
  (tmp_path / 'edited.jsonl').write_text(''.join([*lines[:5], *lines[6:]]))
  assert run('verify', tmp_path / 'edited.jsonl') == 1
  assert 'line 6: does not continue the line before' in capsys.readouterr().err


def test_a_torn_log_is_reported_with_a_status_of_its_own(log, tmp_path, capsys):
  # Would catch: a killed run that cannot be looked at, or that looks like a whole one.
  torn = tmp_path / 'torn.jsonl'
  torn.write_bytes(log.read_bytes()[:-30])
  before = torn.read_bytes()
  for arguments in (['report', torn, '--out', tmp_path], ['verify', torn]):
    assert run(*arguments) == command.TORN
    captured = capsys.readouterr()
    assert 'the last line is torn' in captured.err
    assert '29' in captured.out
  assert torn.read_bytes() == before


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
def test_bad_input_is_a_message_and_a_status(log, name, content, message, tmp_path, capsys):
  # Would catch: a traceback, a report of half a run, or a status that scripts take for success.
  path = tmp_path / 'bad.jsonl'
  whole = log.read_bytes()
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


def test_the_page_makes_its_directory(log, tmp_path):
  page = tmp_path / 'new/deep/page.html'
  assert run('report', log, '--out', tmp_path, '--html', page) == 0
  assert page.exists()


def test_an_output_that_cannot_be_written_is_a_message(log, tmp_path, capsys):
  (tmp_path / 'file').write_text('')
  assert run('report', log, '--out', tmp_path / 'file') == 1
  assert 'error:' in capsys.readouterr().err
  assert run('report', log, '--out', tmp_path, '--html', tmp_path) == 1


EVIL = ['$\\notacommand$', '$x^{$', 'a$', r'\$', '_under', '\n', '# %', '{{ 7 * 7 }}']


def test_names_are_no_mathematics(tmp_path, capsys):
  # Would catch: a name with a '$' that matplotlib cannot parse, or shows as something else.
  path, page = tmp_path / '$x^{$ _y.jsonl', tmp_path / 'page.html'
  made_up(path, EVIL, 3, numbers=EVIL, metrics=dict.fromkeys(EVIL, 1.0))
  assert run('compare', path, path, '--out', tmp_path, '--html', page) == 0
  assert 'Traceback' not in capsys.readouterr().err
  for name in (path.name, '$\\notacommand$'):
    assert name in Page(page.read_text()).text


@pytest.mark.parametrize('value', ['x', '1.5', ''])
def test_patience_is_a_number_of_updates(log, value, capsys):
  # Would catch: a traceback.
  for call in (['report', log], ['compare', log, log]):
    with pytest.raises(SystemExit) as error:
      run(*call, f'--patience={value}')
    assert error.value.code == 2
    message = f'--patience: invalid int value: {value!r}'
    assert message in capsys.readouterr().err


def run_without(library, log):
  """The report in a process that cannot import a library."""
  code = (
    f'import sys; sys.modules["{library}"] = None; sys.argv[0] = "audit"; '
    'from spd_optax.audit.__main__ import main; sys.exit(main())'
  )
  call = [sys.executable, '-c', code, 'report', str(log)]
  return subprocess.run(call, capture_output=True, text=True)


def test_the_module_runs_as_a_command_and_names_the_extra_it_needs(log, tmp_path):
  found = run_without('rich.table', log)
  assert found.returncode == 1
  assert "pip install 'spd_optax[audit]'" in found.stderr
  module = [sys.executable, '-m', 'spd_optax.audit', 'verify', str(log)]
  assert subprocess.run(module, capture_output=True).returncode == 0


def test_the_text_needs_no_matplotlib(log):
  found = run_without('matplotlib.figure', log)
  assert found.returncode == 0
  assert "no pictures, which need matplotlib.figure: pip install 'spd_optax[audit]'" in found.stderr
  assert re.search('layer .*held', found.stdout)


def test_a_reader_who_stops_early_loses_no_page(log, tmp_path):
  # As `report RUN --html PAGE | head -1` does.
  page = tmp_path / 'page.html'
  call = [sys.executable, '-m', 'spd_optax.audit', 'report', str(log), '--html', str(page)]
  with subprocess.Popen(call, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
    process.stdout.close()
  assert page.read_text().rstrip().endswith('</pre>')
