"""Everything that the documentation claims executes, and every table is a committed result."""

import json
import re
from pathlib import Path

import pytest

import reporting

ROOT = Path(__file__).parent.parent
PAGES = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / 'docs').rglob('*.md'))
DOCUMENTS = [
  'README.md',
  'CHANGELOG.md',
  'examples/README.md',
  'examples/benchmarks/README.md',
  *PAGES,
]
BLOCK = re.compile(r'^```python\n(.*?)^```', re.S | re.M)
LINK = re.compile(r'\]\(([^)\s#]*)(?:#([^)\s]*))?\)')


def text_of(document):
  return (ROOT / document).read_text()


def run(document):
  """Executes the snippets of a page in one session, in reading order."""
  namespace: dict = {'__name__': document}
  text = text_of(document)
  for block in BLOCK.finditer(text):
    lines = '\n' * text.count('\n', 0, block.start(1))  # so that an error names the line
    exec(compile(lines + block[1], ROOT / document, 'exec'), namespace)
  return namespace


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
  """Snippets may write files."""
  monkeypatch.chdir(tmp_path)


def test_readme_snippets_run():
  """Catches an example in the README that a user cannot paste."""
  namespace = run('README.md')
  assert set(namespace['held']) == {'dense~bias', 'dense~kernel'}
  assert Path('run.jsonl').exists()


@pytest.mark.parametrize('document', [page for page in PAGES if BLOCK.search(text_of(page))])
@pytest.mark.filterwarnings('ignore:.*(params that the checkpoint lacks|narrower):UserWarning')
def test_snippets_of_a_page_run(document):
  """Catches an example on the site that a user cannot paste."""
  run(document)


def test_pages_are_short():
  """Catches a page that a busy person does not finish."""
  most = {'README.md': 150} | {page: 100 for page in PAGES if page.startswith('docs/how-to/')}
  long = {page: text_of(page).count('\n') for page in most}
  assert {page: lines for page, lines in long.items() if lines > most[page]} == {}


@pytest.mark.parametrize('document', [x for x in DOCUMENTS if reporting.BLOCK.search(text_of(x))])
def test_tables_are_the_committed_results(document):
  """Catches a number that was edited, or is older than its results file."""
  text = text_of(document)
  assert reporting.with_tables(text, ROOT) == text


def test_pages_have_tables():
  """Catches a page that lost the marks around its tables."""
  for document in ('examples/README.md', 'examples/benchmarks/README.md', 'docs/evidence.md'):
    assert reporting.BLOCK.search(text_of(document)), document


# What sentences say: the folder of the results, the table, its row and column.
LINK_ROW, PAPER_ROW = 'projection_decay, λ = 1, m = 0', 'adam_spd, λ = 1, m = 0'
SAID = {
  'README.md': [
    ('digits_by_hand_seeds', 'at_adams_rate', LINK_ROW, 'OOD − Adam', '13.1 ± 3.0'),
    ('digits_by_hand_seeds', 'at_adams_rate', LINK_ROW, 'ID − Adam', '-0.8 ± 0.7'),
    ('digits_by_hand_seeds', 'at_adams_rate', 'WiSE-FT, α = 0.8', 'OOD − Adam', '8.2 ± 0.7'),
    ('handwriting_seeds', 'at_adams_rate', LINK_ROW, 'old − Adam', '11.9 ± 2.2'),
    ('handwriting_seeds', 'at_adams_rate', LINK_ROW, 'ID − Adam', '0.8 ± 1.0'),
    ('minilm_tense_seeds', 'at_adams_rate', LINK_ROW, 'old − Adam', '3.1 ± 1.4'),
    ('minilm_tense_seeds', 'at_adams_rate', LINK_ROW, 'ID − Adam', '0.4 ± 0.5'),
    ('digits_by_hand_seeds', 'at_adams_rate', PAPER_ROW, 'OOD − Adam', '34.2 ± 2.6'),
    ('digits_by_hand_seeds', 'at_adams_rate', PAPER_ROW, 'ID − Adam', '-2.1 ± 0.7'),
    ('minilm_tense_seeds', 'at_adams_rate', PAPER_ROW, 'old − Adam', '9.6 ± 4.2'),
    ('minilm_tense_seeds', 'at_adams_rate', PAPER_ROW, 'ID − Adam', '-0.7 ± 1.1'),
    ('compare', 'overall', 'projection_decay, default', 'OOD − Adam', '3.2 ± 1.8'),
    ('compare', 'overall', 'projection_decay, default', 'ID − Adam', '-0.5 ± 0.2'),
    ('compare', 'overall', 'adam_spd, default', 'OOD − Adam', '1.1 ± 0.3'),
  ],
  'docs/how-to/choose.md': [
    ('real_models', 'headline', 'projection_decay', 'old − Adam', '5.7 ± 3.0'),
    ('compare', 'overall', 'SignificantProjection, default', 'ID − Adam', '-0.6 ± 0.4'),
  ],
}


@pytest.mark.parametrize('document', SAID)
def test_what_sentences_say_was_measured(document):
  """Catches a sentence whose number is older than the results, or has no source here."""
  listed = {said.lstrip('-') for *_, said in SAID[document]}
  assert set(re.findall(r'\d+\.\d ± \d+\.\d', text_of(document))) == listed
  for folder, table, row, column, said in SAID[document]:
    results = json.loads((ROOT / f'examples/results/{folder}/results.json').read_text())['results']
    assert reporting.cell(results[table][row][column]) == said, (folder, row, column)


@pytest.mark.parametrize('document', DOCUMENTS)
def test_links_to_files_exist(document):
  """Catches a picture, page or heading that was moved."""
  path = ROOT / document
  for link, anchor in LINK.findall(
    re.sub(r'^```.*?^```|`[^`\n]+`', '', path.read_text(), flags=re.S | re.M)
  ):
    if link.startswith(('https://', 'http://')):
      continue
    target = path.parent / link if link else path
    assert target.exists(), link
    if anchor and target.suffix == '.md' and 'api.md' not in link:
      assert anchor in anchors_of(target), f'{link}#{anchor}'


def anchors_of(path):
  """The names of the headings, as a repository's web view and the site make them."""
  headings = re.findall(r'^#+ (.*)$', path.read_text(), re.M)
  plain = (re.sub(r'[^\w\- ]', '', heading.lower()) for heading in headings)
  return {heading.strip().replace(' ', '-') for heading in plain}


def test_the_version_is_the_same_everywhere():
  """Catches a release that says two things."""
  version = re.search(r"__version__ = '(.*)'", text_of('spd_optax/__init__.py'))[1]
  assert f'\nversion: {version}\n' in text_of('CITATION.cff')
  assert f'\n## {version} ' in text_of('CHANGELOG.md')
