"""Tasks of language: Python's source and its documentation, and a corpus of English."""

import functools
import importlib
import inspect
import pkgutil
import string
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from sklearn import datasets

import checkpoints
import finetune_t5
import prose
import spd_optax as spd
import t5
from suite import corpora, models, packages
from suite.classifiers import initializer, split
from suite.tasks import Data, Params, Stage, Task, cosine

CONTEXT = 32  # bytes that a decoder sees
PACKAGES = ('asyncio', 'email', 'multiprocessing')  # their code is never trained on
GENRES = {'press': 'abc', 'science': 'j', 'fiction': 'klmnp'}  # letters of the Brown corpus


def windows(texts: Sequence[str], most: int, seed: int = 0, size: int = CONTEXT + 1) -> np.ndarray:
  """Random pieces of a text's ASCII bytes: int32[most, size]."""
  joined = '\n'.join(texts).encode('ascii', 'replace')
  pieces = np.frombuffer(joined, np.uint8)
  pieces = pieces[: len(pieces) // size * size].reshape(-1, size)
  chosen = np.random.default_rng(seed).permutation(len(pieces))[:most]
  return pieces[chosen].astype(np.int32)


def sources(modules: Sequence[str]) -> list[str]:
  """The code of the modules, without docstrings and comments."""
  return [prose.bare(inspect.getsource(importlib.import_module(module))) for module in modules]


def docstrings(modules: Sequence[str]) -> list[str]:
  """What the modules' functions and classes say of themselves."""
  found = []
  for name in modules:
    module = importlib.import_module(name)
    members = (
      value for _, value in sorted(vars(module).items()) if inspect.getmodule(value) == module
    )
    found += [' '.join(text.split()) for value in members if (text := inspect.getdoc(value))]
  return found


def submodules(package: str) -> list[str]:
  """The modules of a package that every platform can import."""
  path = importlib.import_module(package).__path__
  skip = ('windows', 'win32', '__main__', 'popen', 'unix')
  names = sorted(info.name for info in pkgutil.iter_modules(path) if not info.ispkg)
  return [f'{package}.{name}' for name in names if not any(word in name for word in skip)]


@functools.cache
def english() -> tuple[list[str], list[str], list[str]]:
  """Paragraphs of the language reference: many, a few, and some to test on."""
  parts = prose.paragraphs()
  return tuple(
    [parts[i] for i in at] for at in split(len(parts), len(parts) * 6 // 8, len(parts) // 8)
  )


def english_tests() -> dict[str, np.ndarray]:
  """English of three kinds; the first is of the kind that is trained on."""
  described = ' '.join(
    getattr(datasets, f'load_{name}')().DESCR for name in ('iris', 'wine', 'diabetes', 'linnerud')
  )
  return {
    'reference': windows(english()[2], 200),
    'docstrings': windows(docstrings(prose.TEST), 200),
    'data sets': windows([' '.join(described.split())], 200),
  }


def code_tests() -> dict[str, np.ndarray]:
  """Code of several kinds; the first is of the kind that is trained on."""
  return {'library': windows(sources(prose.TEST), 200)} | {
    name: windows(sources(submodules(name)), 200) for name in PACKAGES
  }


def decoder(title: str, old: np.ndarray, stage: Stage, ood: dict[str, np.ndarray]) -> Task:
  """A decoder reads byte after byte; its score is 100 exp(−nats per byte)."""
  module = models.Decoder(32, 1)

  def logits(params: Params, batch: Data) -> jax.Array:
    return module.apply({'params': params}, batch[:, :-1]).astype(jnp.float32)

  def loss(params: Params, batch: Data) -> jax.Array:
    losses = optax.softmax_cross_entropy_with_integer_labels(logits(params, batch), batch[:, 1:])
    return losses.mean()

  return Task(
    title=title,
    init=initializer(module, old[:, :-1]),
    loss=loss,
    score=lambda params, data: 100 * jnp.exp(-loss(params, data)),
    old=old,
    stages=(stage,),
    ood=ood,
    blocks=('embedding', 'position', 'block_0', 'norm', 'head'),
    batch=8,
    logits=logits,
  )


def code_to_prose() -> Task:
  """A decoder that knows code learns English."""
  return decoder(
    'text: code → prose (byte-level decoder)',
    windows(sources(prose.FINETUNE), 20_000),
    Stage(windows(english()[1], 300), english_tests()['reference']),
    code_tests(),
  )


def prose_to_code() -> Task:
  """A decoder that knows English learns code."""
  return decoder(
    'text: prose → code (byte-level decoder)',
    windows(english()[0], 20_000),
    Stage(windows(sources(prose.FINETUNE), 300), code_tests()['library']),
    english_tests(),
  )


def fill_in(
  title: str,
  config: dict[str, int],
  old: prose.Examples,
  ood: dict[str, prose.Examples],
  examples: int = 300,
) -> Task:
  """A T5 that knows English, by span corruption, learns to fill in Python's keywords."""
  tokenizer = t5.Bytes()
  config = {'vocab_size': tokenizer.get_vocab_size()} | config

  def init(key: jax.Array) -> checkpoints.Model:
    return checkpoints.split(t5.T5(config, nnx.Rngs(key)), config)

  model = init(jax.random.key(0))
  loss = finetune_t5.loss_of(model)
  pool, test = prose.new(tokenizer, tests=300)
  return Task(
    title=title,
    init=lambda key: init(key).params,
    loss=loss,
    score=lambda params, data: 100 * jnp.exp(-loss(params, data)),
    old=old,
    stages=(Stage(jax.tree.map(lambda x: x[:: len(x) // examples][:examples], pool), test),),
    ood=ood,
    blocks=('shared', 'encoder', 'decoder'),
    logits=functools.partial(finetune_t5.logits_of, model),
    drift=lambda logits, base, batch: spd.kl_from_base(logits, base, where=batch.weights > 0),
  )


def keywords() -> Task:
  """A T5 that knows the prose of Python's documentation."""
  tokenizer = t5.Bytes()
  old, reference = prose.old(tokenizer)
  return fill_in(
    'text: spans of prose → keywords of code (T5)',
    {'d_model': 32, 'd_kv': 8, 'd_ff': 64, 'num_layers': 1, 'num_heads': 4},
    old,
    {'reference': jax.tree.map(lambda x: x[:300], reference)} | corrupted(tokenizer),
  )._replace(pretrain_steps=800, batch=8)


def keywords_t5() -> Task:
  """A T5 of millions of weights that knows the Brown corpus; the texts tested on are others."""
  arrays = packages.cached('brown', build_brown)
  fields = prose.Examples._fields
  sets = {
    name: prose.Examples(*(arrays[f'{name}/{field}'] for field in fields))
    for name in ('old', *GENRES)
  }
  return fill_in(
    'text: spans of the Brown corpus → keywords of code (T5 of 3 million weights, trained here)',
    {'d_model': 192, 'd_kv': 48, 'd_ff': 768, 'num_layers': 3, 'num_heads': 4},
    sets.pop('old'),
    sets,
    examples=600,
  )._replace(
    pretrain_steps=1200,
    pretrain_rate=3e-2,
    pretrain_optimizer=optax.adafactor,  # scales a step by its weights, as T5's embedding needs
    shots=400,
    pace=cosine(),
    rates=(1e-4, 3e-4, 1e-3, 3e-3),
    by_layer=True,
  )


def build_brown() -> dict[str, np.ndarray]:
  """Span corruption of the Brown corpus: much to pre-train on, and a test set of each genre."""
  tokenizer, rng = t5.Bytes(), np.random.default_rng(0)
  sentences = corpora.brown()

  def of(genres: str, odd: int, most: int) -> prose.Examples:
    text = ' '.join(
      each.text
      for each in sentences
      if each.source[1] in genres and int(each.source[2:]) % 2 == odd
    )
    return spans(windows([text], most, size=prose.LENGTH), tokenizer, rng)

  sets = {name: of(genres, 0, 300) for name, genres in GENRES.items()}
  sets['old'] = of(string.ascii_lowercase, 1, 40_000)
  return {
    f'{name}/{field}': array
    for name, examples in sets.items()
    for field, array in examples._asdict().items()
  }


def corrupted(tokenizer: t5.Bytes) -> dict[str, prose.Examples]:
  """English of other kinds, by span corruption."""
  rng, tests = np.random.default_rng(0), english_tests()
  return {name: spans(tests[name], tokenizer, rng) for name in ('docstrings', 'data sets')}


def spans(pieces: np.ndarray, tokenizer: t5.Bytes, rng: np.random.Generator) -> prose.Examples:
  """Span corruption of pieces of bytes, int32[n, length]."""
  tokens = pieces[:, : prose.LENGTH] + 3  # ByT5's ids of bytes
  return prose.pack([prose.corrupt(x, tokenizer, rng) for x in tokens], tokenizer)
