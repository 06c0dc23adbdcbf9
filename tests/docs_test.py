"""Everything that the documentation claims executes, and every table is a committed result."""

import re
from pathlib import Path

import pytest

import reporting

ROOT = Path(__file__).parent.parent
DOCUMENTS = ['README.md', 'examples/README.md', 'examples/benchmarks/README.md']


def test_readme_snippets_run():
  """Catches an example in the README that a user cannot paste."""
  blocks = re.findall(r'^```python\n(.*?)^```', (ROOT / 'README.md').read_text(), re.S | re.M)
  assert len(blocks) >= 7
  namespace: dict = {}
  for block in blocks:
    exec(compile(block, 'README.md', 'exec'), namespace)  # one session, in reading order
  assert set(namespace['held']) == {'layers', 'head'}
  assert namespace['held']['layers'].shape == (12,)


@pytest.mark.parametrize('document', DOCUMENTS)
def test_tables_are_the_committed_results(document):
  """Catches a number that was edited, or is older than its results file."""
  text = (ROOT / document).read_text()
  assert reporting.BLOCK.search(text)
  assert reporting.with_tables(text, ROOT) == text


@pytest.mark.parametrize('document', DOCUMENTS)
def test_links_to_files_exist(document):
  """Catches a picture or page that was moved."""
  path = ROOT / document
  for link in re.findall(r'\]\(([^)#]+)\)', path.read_text()):
    assert link.startswith('https://') or (path.parent / link).exists(), link
