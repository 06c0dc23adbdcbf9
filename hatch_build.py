"""The project's address, and a README whose links work on a package index.

The release workflow says where the repository is (GITHUB_SERVER_URL, GITHUB_REPOSITORY) and which
tag it builds (GITHUB_REF_NAME). Elsewhere nothing is known of it, and the README stays as it is.
"""

import os
import re
from pathlib import Path

from hatchling.metadata.plugin.interface import MetadataHookInterface

PAPER = 'https://arxiv.org/abs/2411.01713'
LINK = re.compile(r'(!?)(\[[^\]]*\])\((?!https?:|#)([^)]+)\)')


class CustomMetadataHook(MetadataHookInterface):
  """Sets `readme` and `urls`, which pyproject.toml names as dynamic."""

  def update(self, metadata: dict) -> None:
    """Writes both into the metadata."""
    text = (Path(self.root) / 'README.md').read_text(encoding='utf-8')
    urls = {'Paper': PAPER}
    if repository := os.environ.get('GITHUB_REPOSITORY'):
      home = f'{os.environ.get("GITHUB_SERVER_URL", "https://github.com")}/{repository}'
      at = os.environ.get('GITHUB_REF_NAME', 'main')
      text = LINK.sub(lambda link: absolute(link, home, at), text)
      urls |= {
        'Repository': home,
        'Documentation': f'{home}/blob/{at}/docs/index.md',
        'Changelog': f'{home}/blob/{at}/CHANGELOG.md',
        'Issues': f'{home}/issues',
      }
    metadata['readme'] = {'content-type': 'text/markdown', 'text': text}
    metadata['urls'] = urls


def absolute(link: re.Match[str], home: str, at: str) -> str:
  """A link or picture of the README with its whole address."""
  picture, words, path = link.groups()
  return f'{picture}{words}({home}/{"raw" if picture else "blob"}/{at}/{path})'
