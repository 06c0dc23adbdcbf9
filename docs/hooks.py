"""What MkDocs does not do by itself: pages that lie elsewhere, and links into the repository.

A page of docs/ links to a file outside it as on GitHub, '../examples/README.md'. On the site such a
link goes to the page made of that file, to a copy of a picture, or to the repository, if REPO_URL
says where that is. If nothing says so, the words stay and the link goes.
"""

import logging
import os
import re
import tempfile
from pathlib import Path, PurePosixPath
from typing import Any

from mkdocs.structure.files import File, Files
from mkdocs.utils import get_relative_url

ROOT = Path(__file__).parent.parent
ELSEWHERE = {
  'examples/README.md': 'experiments.md',
  'examples/benchmarks/README.md': 'reference/benchmarks.md',
  'CHANGELOG.md': 'changelog.md',
  'README.md': 'index.md',
}
SOURCES = {page: source for source, page in ELSEWHERE.items() if page != 'index.md'}
LINK = re.compile(r'\]\((?!https?:|mailto:|#)([^)#\s]+)(#[^)\s]*)?\)')
COMPILED: list[tempfile.TemporaryDirectory] = []
CODE = re.compile(r'(^```.*?^```|`[^`\n]+`)', re.S | re.M)


LOG = logging.getLogger('mkdocs.hooks')  # strict builds count its warnings
SERVES: list[bool] = []


def on_startup(command: str, dirty: bool) -> None:
  """Lets the notebooks share what JAX has compiled; a server does not run them at each change."""
  SERVES[:] = [command == 'serve']
  os.environ.setdefault('JAX_PLATFORMS', 'cpu')
  os.environ.setdefault('JAX_DISABLE_MOST_OPTIMIZATIONS', '1')  # they compile longer than they run
  if 'JAX_COMPILATION_CACHE_DIR' not in os.environ:
    COMPILED.append(tempfile.TemporaryDirectory(ignore_cleanup_errors=True))
    os.environ['JAX_COMPILATION_CACHE_DIR'] = COMPILED[0].name
    os.environ['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] = '0'


def on_config(config: Any) -> Any:
  """A build executes each notebook, also one that has not changed: the library may have."""
  config.plugins['mkdocs-jupyter'].config['cache'] = SERVES == [True]
  return config


def on_files(files: Files, config: Any) -> Files:
  """Adds the pages that lie elsewhere, and the pictures of the examples."""
  for page, source in SOURCES.items():
    files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
  for picture in sorted((ROOT / 'examples/results').rglob('*.png')):
    uri = picture.relative_to(ROOT).as_posix()
    files.append(File.generated(config, uri, abs_src_path=str(picture)))
  return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
  """Rewrites the links of one page."""
  here = page.file.src_uri
  source = SOURCES.get(here, f'docs/{here}')
  parts = CODE.split(markdown)
  for i in range(0, len(parts), 2):
    parts[i] = _links(parts[i], source, here, config.repo_url, files)
  return ''.join(parts)


def on_page_content(html: str, page: Any, config: Any, files: Files) -> str:
  """Rewrites the links between a notebook and the other pages, and warns of dead ones."""
  here = page.file.src_uri
  if not here.startswith('notebooks/'):
    return html

  def target(match: re.Match[str]) -> str:
    found = files.get_file_from_path(os.path.normpath(f'notebooks/{match[1]}'))
    if found is None:
      LOG.warning("Notebook '%s' contains a link '%s', but there is no such page.", here, match[1])
      return match[0]
    return f'href="{get_relative_url(found.url, page.url)}{match[2] or ""}"'

  return re.sub(r'href="((?!https?:)[^":#]+\.(?:md|py))(#[^"]*)?"', target, html)


def _links(text: str, source: str, here: str, repository: str, files: Files) -> str:
  def target(match: re.Match[str]) -> str:
    path, anchor = match[1], match[2] or ''
    at = PurePosixPath(os.path.normpath(PurePosixPath(source).parent / path)).as_posix()
    page = ELSEWHERE.get(at, at.removeprefix('docs/'))
    if files.get_file_from_path(page):
      return f']({os.path.relpath(page, PurePosixPath(here).parent)}{anchor})'
    if repository:
      return f']({repository.rstrip("/")}/blob/main/{at}{anchor})'
    return '](#)'

  return re.sub(r'\[([^\]\[]+)\]\(#\)', r'\1', LINK.sub(target, text))
