"""Real text from Python itself: English that a model knows, and code that is new to it.

The foundation model learns the OLD domain, the prose of the language reference
(`pydoc_data.topics`), by T5's span corruption. The NEW domain is the source of
the standard library: a keyword of the code is masked, and is to be filled in.
Both come with every Python, and differ a little between its versions.
"""

import ast
import importlib
import inspect
import io
import keyword
import re
import tokenize
from collections.abc import Iterator, Sequence
from pydoc_data import topics
from typing import Any, NamedTuple

import numpy as np

LENGTH = 40  # tokens of a piece of prose; also the longest input
TARGET = 10  # the longest target
BEFORE, AFTER = 24, 12  # characters of code around the masked keyword
DENSITY, MEAN_SPAN = 0.15, 3  # T5's: the share of tokens that is masked, tokens per span
FINETUNE = (
  *('argparse', 'ast', 'bdb', 'calendar', 'cmd', 'codecs', 'configparser', 'copy', 'csv'),
  *('dataclasses', 'difflib', 'doctest', 'enum', 'fractions', 'ftplib', 'functools', 'gettext'),
  *('heapq', 'http.client', 'http.cookiejar', 'imaplib', 'inspect', 'ipaddress', 'locale'),
  *('mailbox', 'optparse', 'pdb', 'pickle', 'plistlib', 'shutil', 'smtplib', 'socket'),
)
TEST = (
  *('statistics', 'string', 'subprocess', 'tarfile', 'tempfile', 'textwrap', 'threading'),
  *('tokenize', 'trace', 'traceback', 'typing', 'urllib.parse', 'urllib.request', 'uuid'),
)


class Examples(NamedTuple):
  """What an encoder-decoder reads and is to write.

  Attributes:
    inputs: int32[n, length].
    attention: int32[n, length], 0 on padding.
    decoder_inputs: int32[n, target], the labels one token later.
    labels: int32[n, target].
    weights: float32[n, target], 0 on padding.
  """

  inputs: np.ndarray
  attention: np.ndarray
  decoder_inputs: np.ndarray
  labels: np.ndarray
  weights: np.ndarray


def paragraphs() -> list[str]:
  """The paragraphs of `pydoc_data.topics` that are prose, in a fixed order.

  Topics repeat one another: what has eight words in a row from an earlier paragraph is left out.
  """
  text = '\n\n'.join(topics.topics[name] for name in sorted(topics.topics))
  found, known = [], set()
  for part in re.split(r'\n\s*\n', text):
    words = part.split()
    line = ' '.join(words)
    runs = {tuple(words[i : i + 8]) for i in range(len(words) - 7)}
    letters = sum(c.isalpha() or c == ' ' for c in line)
    if runs and not runs & known and letters > 0.88 * len(line):
      found.append(line)
      known |= runs
  return found


def old(tokenizer: Any, copies: int = 6, seed: int = 0) -> tuple[Examples, Examples]:
  """Span corruption of disjoint paragraphs: to pre-train on, and 1 in 8 of them to test on.

  Each piece that is trained on comes in so many `copies`, masked anew each time.
  """
  parts = paragraphs()
  order = np.random.default_rng(seed).permutation(len(parts))
  test, train = np.split(order, [len(parts) // 8])

  def corrupted(chosen: np.ndarray, copies: int) -> Examples:
    rng = np.random.default_rng(seed)
    text = '\n'.join(parts[i] for i in chosen)
    tokens = tokenizer.encode(text, add_special_tokens=False).ids
    pieces = np.array(tokens[: len(tokens) // LENGTH * LENGTH], np.int32).reshape(-1, LENGTH)
    return pack([corrupt(x, tokenizer, rng) for x in np.tile(pieces, (copies, 1))], tokenizer)

  return corrupted(train, copies), corrupted(test, 1)


def corrupt(tokens: np.ndarray, tokenizer: Any, rng: np.random.Generator) -> tuple[list, list]:
  """T5's span corruption of int[n].

  Returns:
    The tokens with a sentinel for each masked span, and each sentinel with what it stands for.
  """
  noise = max(1, round(DENSITY * len(tokens)))
  spans = max(1, round(noise / MEAN_SPAN))
  lengths = np.stack([_segments(len(tokens) - noise, spans, rng), _segments(noise, spans, rng)])
  pieces = np.split(tokens, np.cumsum(lengths.T.ravel())[:-1])  # kept, masked, kept, …
  inputs: list[int] = []
  targets: list[int] = []
  for i in range(spans):
    sentinel = tokenizer.token_to_id(f'<extra_id_{i}>')
    inputs += [*pieces[2 * i].tolist(), sentinel]
    targets += [sentinel, *pieces[2 * i + 1].tolist()]
  end = tokenizer.token_to_id('</s>')
  return [*inputs, end], [*targets, end]


def _segments(total: int, parts: int, rng: np.random.Generator) -> np.ndarray:
  """Lengths ≥ 1 that add up to the total, all such equally likely."""
  cuts = np.sort(rng.choice(np.arange(1, total), parts - 1, replace=False))
  return np.diff([0, *cuts, total])


def masked_keywords(module: str) -> Iterator[tuple[str, str]]:
  """The code around each keyword of a module, with a sentinel in its place; and the keyword."""
  text = inspect.getsource(importlib.import_module(module))
  starts = np.cumsum([0, *map(len, io.StringIO(text))])
  for token in tokenize.generate_tokens(io.StringIO(text).readline):
    if token.type == tokenize.NAME and keyword.iskeyword(token.string):
      start = starts[token.start[0] - 1] + token.start[1]
      end = start + len(token.string)
      before, after = text[max(0, start - BEFORE) : start], text[end : end + AFTER]
      if before.isascii() and after.isascii():  # a byte per character: it fits into LENGTH
        yield f'{before}<extra_id_0>{after}', token.string


def bare(source: str) -> str:
  """Code without the English in it."""
  tree = ast.parse(source)  # has no comments
  for node in ast.walk(tree):
    documented = isinstance(
      node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    )
    if documented and ast.get_docstring(node) is not None:
      node.body[0] = ast.Pass()
  return ast.unparse(tree)


def snippets() -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
  """Masked code and its keyword, each once: to fine-tune on, and of other modules to test on."""
  train, test = (
    dict.fromkeys(pair for module in modules for pair in masked_keywords(module))
    for modules in (FINETUNE, TEST)
  )
  known = {code for code, _ in train}
  return list(train), [pair for pair in test if pair[0] not in known]


def new(tokenizer: Any, tests: int = 1000, seed: int = 0) -> tuple[Examples, Examples]:
  """Masked keywords of disjoint modules: to fine-tune on, and some to test on."""
  train, test = snippets()
  chosen = np.random.default_rng(seed).permutation(len(test))[:tests]

  def tokens(pairs: Sequence[tuple[str, str]]) -> Examples:
    texts = [(code, f'<extra_id_0>{word}') for code, word in pairs]
    return pack([tuple(tokenizer.encode(x).ids for x in pair) for pair in texts], tokenizer)

  return tokens(train), tokens([test[i] for i in chosen])


def pack(pairs: Sequence[tuple[list, list]], tokenizer: Any) -> Examples:
  """Inputs and targets as arrays of one size, padded."""
  pad = tokenizer.token_to_id('<pad>')
  inputs = np.full((len(pairs), LENGTH), pad, np.int32)
  labels = np.full((len(pairs), TARGET), pad, np.int32)
  for i, (source_ids, target_ids) in enumerate(pairs):
    inputs[i, : len(source_ids)] = source_ids
    labels[i, : len(target_ids)] = target_ids
  decoder_inputs = np.roll(labels, 1, axis=1)
  decoder_inputs[:, 0] = pad  # T5 starts to write from the padding token
  attention, weights = (inputs != pad).astype(np.int32), (labels != pad).astype(np.float32)
  return Examples(inputs, attention, decoder_inputs, labels, weights)
