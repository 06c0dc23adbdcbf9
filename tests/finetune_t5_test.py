"""The T5 example runs at tiny sizes, its data are what they say, and checkpoints load."""

import dataclasses
import functools
import inspect
import json
import re
import shutil
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import pytorch_models
import smoke
from safetensors.numpy import load_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors

import checkpoints
import comparison
import finetune_t5
import prose
import t5

pytestmark = pytest.mark.examples

DATA = Path(__file__).parent / 'data'  # by pytorch_models.py
TINY = ['--pretrain-steps', '3', '--steps', '2', '--seeds', '2', '--batch', '4', '--shots', '8']


# One block each: it compiles in half the time.
tiny_t5 = functools.partial(finetune_t5.small_t5, blocks=1)


@pytest.fixture(scope='module', autouse=True)
def quick_compiles():
  with smoke.quick_compiles():
    yield


@pytest.fixture(scope='module')
def tokenizer():
  return t5.Bytes()


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  out = tmp_path_factory.mktemp('finetune_t5')
  methods = comparison.methods

  def some_methods(*args):  # examples_test.py runs them all
    return {name: tx for name, tx in methods(*args).items() if name in finetune_t5.SHOWN}

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(comparison, 'methods', some_methods)
    patch.setattr(finetune_t5, 'small_t5', tiny_t5)
    patch.setattr(prose, 'old', functools.partial(prose.old, copies=1))
    patch.setattr(prose, 'new', functools.partial(prose.new, tests=50))
    return out, finetune_t5.main([*TINY, '--out', str(out)])


def test_t5_example_writes_its_results(run):
  """Catches a name in SHOWN that is no method, columns that tables and pictures do not take."""
  out, results = run
  written = json.loads((out / 'results.json').read_text())
  assert written['results'] == results
  assert (out / 'results.png').read_bytes().startswith(b'\x89PNG')
  assert set(results) == {*finetune_t5.SHOWN, 'WiSE-FT, α = 0.5'}
  for name, row in results.items():
    assert {'exact, code', 'loss, code', 'loss, prose', 'moved'} <= set(row), name
    assert all(len(values) == (1 if name == 'pre-trained' else 2) for values in row.values()), name
    assert ('held' in row) == name.startswith(('projection_decay', 'adam_spd')), name


def filled_in(inputs, targets, sentinels, end):
  """The tokens with each sentinel replaced by what the targets say that it stands for."""
  spans = {}
  for token in targets[: targets.index(end)]:
    if token in sentinels:
      spans[token] = current = []
    else:
      current.append(token)
  kept = inputs[: inputs.index(end)]
  return [t for token in kept for t in (spans[token] if token in sentinels else [token])], spans


def test_span_corruption_can_be_undone(tokenizer):
  """Catches tokens lost or doubled at a span's edge, spans under another's sentinel, a target cut
  off by the array."""
  train, test = prose.old(tokenizer, copies=1)
  everything = '\n'.join(prose.paragraphs()).encode()
  sentinels = [tokenizer.token_to_id(f'<extra_id_{i}>') for i in range(9)]
  for examples in (train, test):
    shares, lengths = [], []
    for inputs, labels in zip(examples.inputs.tolist(), examples.labels.tolist(), strict=True):
      tokens, spans = filled_in(inputs, labels, sentinels, tokenizer.token_to_id('</s>'))
      assert len(tokens) == prose.LENGTH
      shares.append(sum(map(len, spans.values())) / prose.LENGTH)
      lengths += map(len, spans.values())
      lines = bytes(token - 3 for token in tokens).split(b'\n')  # ByT5: byte + 3; paragraphs end so
      assert all(line in everything for line in lines)
    np.testing.assert_allclose(np.mean(shares), prose.DENSITY, atol=0.01)
    np.testing.assert_allclose(np.mean(lengths), prose.MEAN_SPAN, atol=0.1)
    assert max(lengths) > min(lengths)


def test_copies_are_masked_anew(tokenizer):
  """Catches a foundation model that only ever sees one mask of each piece; a test set that depends
  on the number of copies."""
  once, test = prose.old(tokenizer, copies=1)
  twice, same = prose.old(tokenizer, copies=2)
  assert len(twice.inputs) == 2 * len(once.inputs)
  jax.tree.map(np.testing.assert_array_equal, test, same)
  assert np.mean(np.any(np.split(twice.inputs, 2)[0] != np.split(twice.inputs, 2)[1], 1)) > 0.95


def test_the_decoder_sees_only_what_it_has_written(tokenizer):
  """Catches labels that leak into the decoder's input; padding that counts in the loss."""
  for examples in (*prose.old(tokenizer, copies=1), *prose.new(tokenizer)):
    assert np.all(examples.decoder_inputs[:, 0] == tokenizer.token_to_id('<pad>'))
    np.testing.assert_array_equal(examples.decoder_inputs[:, 1:], examples.labels[:, :-1])
    ends = np.argmax(examples.labels == tokenizer.token_to_id('</s>'), axis=1)
    np.testing.assert_array_equal(examples.weights.sum(1), ends + 1)
    ends = np.argmax(examples.inputs == tokenizer.token_to_id('</s>'), axis=1)
    np.testing.assert_array_equal(examples.attention.sum(1), ends + 1)


def test_what_is_tested_on_was_not_trained_on(tokenizer):
  """Catches a passage or snippet on both sides of the split; a keyword left unmasked."""
  train, test = prose.snippets()
  assert min(len(train), len(test)) > 3000
  assert not {code for code, _ in train} & {code for code, _ in test}
  assert not set(prose.FINETUNE) & set(prose.TEST)
  assert all(code.count('<extra_id_0>') == 1 for code, _ in train + test)
  sources = '\0'.join(inspect.getsource(__import__(name)) for name in ('uuid', 'typing'))
  assert sum(code.replace('<extra_id_0>', word) in sources for code, word in test) > 500

  def runs_of_words(examples):
    sentinels = [tokenizer.token_to_id(f'<extra_id_{i}>') for i in range(9)]
    tokens = []
    for pair in zip(examples.inputs.tolist(), examples.labels.tolist(), strict=True):
      tokens += filled_in(*pair, sentinels, tokenizer.token_to_id('</s>'))[0]
    lines = [line.split() for line in bytes(token - 3 for token in tokens).split(b'\n')]
    return {tuple(line[i : i + 8]) for line in lines for i in range(len(line) - 7)}

  train, test = (runs_of_words(examples) for examples in prose.old(tokenizer, copies=1))
  assert min(len(train), len(test)) > 1000
  assert not train & test


def test_exact_match_is_that_of_greedy_generation(run, tokenizer):
  """Catches matches counted on padding, or on some tokens of a target only."""
  model, _ = t5.load(str(run[0] / 'foundation'))
  _, test = prose.new(tokenizer, tests=6)
  written = finetune_t5.written(model, {'foundation': model.params}, test)['foundation']
  for i in range(3):  # the first three get the beginning of the model's own words as targets
    test.weights[i] = np.arange(prose.TARGET) < 3 + i
    test.labels[i] = np.where(test.weights[i], written[i], tokenizer.token_to_id('<pad>'))
  test.decoder_inputs[:, 1:] = test.labels[:, :-1]
  by_hand = np.all((written == test.labels) | (test.weights == 0), axis=1)
  assert 3 <= by_hand.sum() < 6
  params = jax.tree.map(lambda x: x[None], model.params)
  _, exact = finetune_t5.scores(model, params, test)
  np.testing.assert_allclose(exact, 100 * by_hand.mean(), rtol=1e-5)


@pytest.mark.parametrize('kind', ['t5_relu', 't5_gated'])
@pytest.mark.parametrize('here', [False, True], ids=['recorded', 'here'])
def test_logits_are_those_of_pytorch(kind, here, tmp_path):
  """Catches weights under another part's name or transposed, buckets, masks or scales that are off;
  files of the version that is here that cannot be read."""
  if here:
    pytest.importorskip('torch')
    pytest.importorskip('transformers')
    pytorch_models.record(kind, tmp_path)
  config, tensors, folder = checkpoints.read(str(tmp_path if here else DATA / kind))
  model = t5.with_weights(config, tensors)
  answers = load_file(folder / 'answers.st')
  inputs = (answers[name] for name in ('input_ids', 'attention_mask', 'decoder_input_ids'))
  logits = jax.jit(model)(*inputs, params=model.params)
  np.testing.assert_allclose(logits, answers['logits'], atol=3e-5)  # they are up to 8


def test_what_is_written_is_what_was_read(tmp_path):
  """Catches files that only this code can read: PyTorch's names and layouts, a head of its own."""
  config, tensors, _ = checkpoints.read(str(DATA / 't5_gated'))
  checkpoints.write(tmp_path, t5.with_weights(config, tensors))
  assert 'lm_head.weight' in tensors
  chex.assert_trees_all_equal(load_file(tmp_path / 'model.safetensors'), tensors)


def test_bytes_are_those_of_byt5():
  """Catches ids that are not those the published ByT5 was trained with: recorded ones."""
  tokenizer = t5.Bytes()
  assert tokenizer.get_vocab_size() == 384
  ids = tokenizer.encode('é<extra_id_0>a').ids
  assert ids == [198, 172, 259, 100, 1]
  assert tokenizer.encode('a', add_special_tokens=False).ids == [100]
  assert tokenizer.token_to_id('<extra_id_124>') == 383
  assert tokenizer.decode(ids, skip_special_tokens=False) == 'é<extra_id_0>a</s>'


def test_a_checkpoint_brings_its_tokenizer(run, tmp_path):
  """Catches a tokenizer that is not the checkpoint's, one that pads, texts without their end."""
  shutil.copytree(run[0] / 'foundation', tmp_path, dirs_exist_ok=True)
  words = {'<pad>': 0, '</s>': 1, '<unk>': 2, 'if': 3, '<extra_id_0>': 4}
  own = Tokenizer(models.WordLevel(words, '<unk>'))
  own.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
  own.post_processor = processors.TemplateProcessing(single='$A </s>', special_tokens=[('</s>', 1)])
  own.enable_padding(length=9)
  own.save(str(tmp_path / 'tokenizer.json'))
  _, tokenizer = t5.load(str(tmp_path))
  assert tokenizer.encode('if <extra_id_0> else').ids == [3, 4, 2, 1]
  pairs = prose.new(tokenizer, tests=4)[1]
  assert set(pairs.labels[:, 0].tolist()) <= {2, 4}
  (tmp_path / 'tokenizer.json').rename(tmp_path / 'spiece.model')
  with pytest.raises(ValueError, match=r'not saved as tokenizer\.json'):
    t5.load(str(tmp_path))


def test_bfloat16_checkpoints_are_trained_in_float32(run, tmp_path):
  """Catches params whose steps round away."""
  foundation, _ = t5.load(str(run[0] / 'foundation'))
  rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16), foundation.params)
  checkpoints.write(tmp_path, dataclasses.replace(foundation, params=rounded))
  model, _ = t5.load(str(tmp_path))
  assert {x.dtype for x in jax.tree.leaves(model.params)} == {np.dtype('float32')}
  jax.tree.map(lambda x, y: np.testing.assert_array_equal(x, y), model.params, rounded)


def test_a_tokenizer_that_does_not_fit_is_an_error():
  """Catches tokens beyond the embedding, which jax reads as its last row."""
  with pytest.raises(ValueError, match=re.escape('20 rows') + '.*384 tokens'):
    t5.load(str(DATA / 't5_relu'))


def test_a_feed_forward_of_another_kind_is_an_error():
  """Catches a model that runs with an activation that is not its own."""
  config, tensors, _ = checkpoints.read(str(DATA / 't5_relu'))
  with pytest.raises(ValueError, match='gated-silu is none of'):
    t5.with_weights(config | {'feed_forward_proj': 'gated-silu'}, tensors)
