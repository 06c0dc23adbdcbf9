"""Docstrings as the site shows them; in Python, `help` shows them as they are written."""

import re
from typing import Any

import griffe

LINK = re.compile(r'`([^`<]+?)\s+<(https?://[^>]+)>`_')
SEVERAL = re.compile(r'^( +)((?:\w+, )+\w+)(:.*(?:\n\1 +.*)*)$', re.M)  # 'init, bounds: …' of Args


class Readable(griffe.Extension):
  """Makes examples code, reStructuredText links Markdown, and an entry of each argument."""

  def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
    """Rewrites one docstring before it is parsed."""
    if not obj.docstring:
      return
    text = re.sub(r'^Example:$', 'Examples:', obj.docstring.value, flags=re.M)
    text = LINK.sub(lambda link: f'[{" ".join(link[1].split())}]({link[2]})', text)
    before, args, after = text.partition('\nArgs:\n')
    parts = re.split(r'(?=\n\n\S)', after, maxsplit=1)
    parts[0] = SEVERAL.sub(_each, parts[0])
    obj.docstring.value = before + args + ''.join(parts)


def _each(entry: re.Match[str]) -> str:
  return '\n'.join(f'{entry[1]}{name}{entry[3]}' for name in entry[2].split(', '))
