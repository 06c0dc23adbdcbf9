"""The T5 example runs at tiny sizes, its data are what they say, and checkpoints load."""

import functools
import inspect
import json
import re

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import smoke
from safetensors.numpy import save_file
from transformers import ByT5Tokenizer, FlaxT5ForConditionalGeneration
from transformers.models.t5 import modeling_flax_t5

import comparison
import finetune_t5
import prose

pytestmark = pytest.mark.examples

TINY = ['--pretrain-steps', '3', '--steps', '2', '--seeds', '2', '--batch', '4', '--shots', '8']


def tiny_t5(tokenizer, small=finetune_t5.small_t5):
  """One block each: it compiles in half the time."""
  config = small(tokenizer).config
  config.num_layers = config.num_decoder_layers = 1
  return FlaxT5ForConditionalGeneration(config, seed=0)


@pytest.fixture(scope='module', autouse=True)
def quick_compiles():
  with smoke.quick_compiles():
    yield


@pytest.fixture(scope='module')
def tokenizer():
  return ByT5Tokenizer()


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
  sentinels = tokenizer.convert_tokens_to_ids([f'<extra_id_{i}>' for i in range(9)])
  for examples in (train, test):
    shares, lengths = [], []
    for inputs, labels in zip(examples.inputs.tolist(), examples.labels.tolist(), strict=True):
      tokens, spans = filled_in(inputs, labels, sentinels, tokenizer.eos_token_id)
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
    assert np.all(examples.decoder_inputs[:, 0] == tokenizer.pad_token_id)
    np.testing.assert_array_equal(examples.decoder_inputs[:, 1:], examples.labels[:, :-1])
    ends = np.argmax(examples.labels == tokenizer.eos_token_id, axis=1)
    np.testing.assert_array_equal(examples.weights.sum(1), ends + 1)
    ends = np.argmax(examples.inputs == tokenizer.eos_token_id, axis=1)
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
    sentinels = tokenizer.convert_tokens_to_ids([f'<extra_id_{i}>' for i in range(9)])
    tokens = []
    for pair in zip(examples.inputs.tolist(), examples.labels.tolist(), strict=True):
      tokens += filled_in(*pair, sentinels, tokenizer.eos_token_id)[0]
    lines = [line.split() for line in bytes(token - 3 for token in tokens).split(b'\n')]
    return {tuple(line[i : i + 8]) for line in lines for i in range(len(line) - 7)}

  train, test = (runs_of_words(examples) for examples in prose.old(tokenizer, copies=1))
  assert min(len(train), len(test)) > 1000
  assert not train & test


def test_exact_match_is_that_of_greedy_generation(run, tokenizer):
  """Catches matches counted on padding, or on some tokens of a target only."""
  model, _ = finetune_t5.load(str(run[0] / 'foundation'))
  _, test = prose.new(tokenizer, tests=6)
  written = finetune_t5.written(model, {'foundation': model.params}, test)['foundation']
  for i in range(3):  # the first three get the beginning of the model's own words as targets
    test.weights[i] = np.arange(prose.TARGET) < 3 + i
    test.labels[i] = np.where(test.weights[i], written[i], tokenizer.pad_token_id)
  test.decoder_inputs[:, 1:] = test.labels[:, :-1]
  by_hand = np.all((written == test.labels) | (test.weights == 0), axis=1)
  assert 3 <= by_hand.sum() < 6
  params = jax.tree.map(lambda x: x[None], model.params)
  _, exact = finetune_t5.scores(model, params, test)
  np.testing.assert_allclose(exact, 100 * by_hand.mean(), rtol=1e-5)


def torch_state(params):
  """The weights as transformers' T5 for torch names and lays them out; no tied copies."""
  state = {}
  for path, array in flax.traverse_util.flatten_dict(params).items():
    *parents, name = path
    array = np.asarray(array)
    state['.'.join([*parents, 'weight'])] = np.ascontiguousarray(
      array.T if name == 'kernel' else array
    )
  return state


@pytest.fixture(scope='module')
def foundation(run):
  model, _ = finetune_t5.load(str(run[0] / 'foundation'))
  return model


@pytest.mark.parametrize('kind', ['torch safetensors', 'flax msgpack'])
def test_checkpoints_load_to_their_weights(foundation, tokenizer, tmp_path, kind):
  """Catches matrices left transposed, a random weight where a name was not found, a tokenizer that
  is not the checkpoint's."""
  if kind == 'flax msgpack':
    foundation.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
  else:
    foundation.config.save_pretrained(tmp_path)
    state = torch_state(foundation.params)
    assert state['encoder.block.0.layer.1.DenseReluDense.wi.weight'].shape == (192, 64)
    save_file(state, tmp_path / 'model.safetensors', metadata={'format': 'pt'})
  model, its_own = finetune_t5.load(str(tmp_path))
  jax.tree.map(np.testing.assert_array_equal, model.params, foundation.params)
  assert its_own('é').input_ids == tokenizer('é').input_ids


def test_bfloat16_checkpoints_are_trained_in_float32(foundation, tmp_path):
  """Catches params whose steps round away."""
  rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16), foundation.params)
  foundation.save_pretrained(tmp_path, params=rounded)
  model, _ = finetune_t5.load(str(tmp_path))
  assert {x.dtype for x in jax.tree.leaves(model.params)} == {np.dtype('float32')}
  jax.tree.map(lambda x, y: np.testing.assert_array_equal(x, y), model.params, rounded)


def test_a_tokenizer_that_does_not_fit_is_an_error(tokenizer, tmp_path):
  """Catches tokens beyond the embedding, which jax reads as its last row."""
  config = tiny_t5(tokenizer).config
  config.vocab_size = 100
  FlaxT5ForConditionalGeneration(config, seed=0).save_pretrained(tmp_path)
  with pytest.raises(ValueError, match=re.escape('100 rows') + '.*384 tokens'):
    finetune_t5.load(str(tmp_path))


def test_jax_numpy_is_replaced_only_where_it_lacks_the_old_names(monkeypatch):
  """Catches a shim where jax still takes them, or a clip with its bounds swapped."""
  monkeypatch.setattr(modeling_flax_t5, 'jnp', jnp)
  with monkeypatch.context() as old_jax:
    old_jax.setattr(jnp, 'clip', lambda x, a_min=None, a_max=None: x)
    finetune_t5.mend_transformers()
    assert modeling_flax_t5.jnp is jnp
  finetune_t5.mend_transformers()
  needed = 'a_max' not in inspect.signature(jnp.clip).parameters
  assert (modeling_flax_t5.jnp is not jnp) == needed
  x = jnp.arange(5)
  clip = finetune_t5.NumpyWithOldClip().clip
  np.testing.assert_array_equal(clip(x, a_max=2), [0, 1, 2, 2, 2])
  np.testing.assert_array_equal(clip(x, a_min=2), [2, 2, 2, 3, 4])
  assert finetune_t5.NumpyWithOldClip().zeros is jnp.zeros
