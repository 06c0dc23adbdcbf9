"""Docstrings as the site shows them; in Python, `help` shows them as they are written."""

import re
from typing import Any

import griffe

LINK = re.compile(r'`([^`<]+?)\s+<(https?://[^>]+)>`_')


class Readable(griffe.Extension):
  """Makes an 'Example:' a block of code, and a reStructuredText link one of Markdown."""

  def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
    """Rewrites one docstring before it is parsed."""
    if obj.docstring:
      text = re.sub(r'^Example:$', 'Examples:', obj.docstring.value, flags=re.M)
      obj.docstring.value = LINK.sub(lambda m: f'[{" ".join(m[1].split())}]({m[2]})', text)
