"""The examples run, at tiny sizes, and their data are what they say."""

import json
from pathlib import Path

import chex
import jax
import numpy as np
import optax
import pytest
import smoke
from flax import nnx
from safetensors import safe_open
from safetensors.numpy import load_file

import checkpoints
import comparison
import digits
import finetune_vit
import spd_optax as spd
import training
import vit

pytestmark = pytest.mark.examples

VIT = Path(__file__).parent / 'data/vit'  # by pytorch_models.py
PROJECTION = 'vit.embeddings.patch_embeddings.projection.weight'
TINY = ['--pretrain-steps', '3', '--steps', '4', '--seeds', '2', '--batch', '4', '--shots', '8']
TINY += ['--lr', '0.01']  # AdamW shows beside Adam


@pytest.fixture(scope='module', autouse=True)
def quick_compiles():
  with smoke.quick_compiles():
    yield


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  out = tmp_path_factory.mktemp('finetune_vit')
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(finetune_vit, 'small_vit', smoke.tiny_vit)
    return out, finetune_vit.main([*TINY, '--out', str(out)])


def test_vit_example_writes_its_results(run):
  """Catches a file that says something else than the script."""
  out, results = run
  written = json.loads((out / 'results.json').read_text())
  assert written['results'] == results
  assert written['settings']['style'] == 'striped'
  assert (out / 'results.png').read_bytes().startswith(b'\x89PNG')
  assert len(results) == 9
  assert {len(values) for row in results.values() for values in row.values()} == {2}


def test_vit_example_measures_each_method(run):
  """Catches parameters of one method reported under another, seeds that are copies."""
  _, results = run
  moved = {name: tuple(row['moved']) for name, row in results.items()}
  assert moved.pop('pre-trained') == (0, 0)
  # In four steps no layer gets 20 steps away, so that none is held.
  assert moved.pop('adam_spd, SignificantProjection') == moved['Adam']
  assert len(set(moved.values())) == len(moved)
  assert all(first != second for first, second in moved.values())
  halfway = np.array(moved['WiSE-FT, α = 0.5'])
  np.testing.assert_allclose(halfway, np.array(moved['Adam']) / 2, rtol=1e-3, atol=2e-3)


def test_each_seed_has_a_model_of_its_own(run):
  """Catches copies of one pre-trained model, and a seed that starts from another's."""
  loaded = [finetune_vit.load(str(run[0] / 'foundation' / name)) for name in '01']
  for model, anchor in loaded:
    chex.assert_trees_all_equal(anchor, model.params)  # the head has an anchor, too
  first, second = (anchor for _, anchor in loaded)
  assert not np.array_equal(first['classifier']['kernel'], second['classifier']['kernel'])
  assert max(x for row in run[1].values() for x in row['moved']) < 50


def test_a_checkpoint_serves_all_seeds(run, tmp_path):
  """Catches seeds that are left out where only one checkpoint was given."""
  make = comparison.methods
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(finetune_vit, 'small_vit', smoke.tiny_vit)
    patch.setattr(comparison, 'methods', lambda *args: {'Adam': make(*args)['Adam']})
    own = ['--checkpoint', str(run[0] / 'foundation' / '1'), '--out', str(tmp_path)]
    results = finetune_vit.main([*TINY, *own])
  for name, row in results.items():
    assert all(len(values) == (1 if name == 'pre-trained' else 2) for values in row.values()), name
  # The second seed has its own batches there, too.
  first, second = results['Adam']['moved']
  assert second == pytest.approx(run[1]['Adam']['moved'][1], rel=1e-3)
  assert first != pytest.approx(second, rel=3e-3)


@pytest.fixture(scope='module')
def recorded():
  config, tensors, _ = checkpoints.read(str(VIT))
  abstract = nnx.eval_shape(lambda: vit.ViT(config, 7, nnx.Rngs(0)))
  return checkpoints.filled(checkpoints.split(abstract, config), tensors), tensors


def test_a_vit_says_what_pytorch_says(recorded):
  """Catches weights under another part's name, transposed, or under another norm or activation."""
  model, _ = recorded
  answers = load_file(VIT / 'answers.st')
  logits = jax.jit(model)(answers['pixel_values'].transpose(0, 2, 3, 1), params=model.params)
  np.testing.assert_allclose(logits, answers['logits'], atol=1e-5)


def test_what_is_written_is_what_was_read(recorded, tmp_path):
  """Catches files that only this code can read: PyTorch's names, layouts and metadata."""
  model, tensors = recorded
  checkpoints.write(tmp_path, model)
  chex.assert_trees_all_equal(load_file(tmp_path / 'model.safetensors'), tensors)
  assert json.loads((tmp_path / 'config.json').read_text()) == model.config
  with safe_open(tmp_path / 'model.safetensors', 'numpy') as file:
    assert file.metadata() == {'format': 'pt'}


def test_a_checkpoint_that_does_not_fit_is_an_error(recorded):
  """Catches weights that stay random as their names or shapes are others; another activation."""
  model, tensors = recorded
  name = 'vit.layernorm.weight'
  with pytest.raises(ValueError, match=r'no safetensors with "vit\.layernorm\.weight"'):
    checkpoints.filled(model, {key: x for key, x in tensors.items() if key != name})
  with pytest.raises(ValueError, match=r'vit\.layernorm\.weight: the shape \(1,\)'):
    checkpoints.filled(model, tensors | {name: tensors[name][:1]})
  with pytest.raises(ValueError, match='quick_gelu is not gelu'):
    vit.ViT(model.config | {'hidden_act': 'quick_gelu'}, 7, nnx.Rngs(0))


def test_a_head_with_other_classes_is_new_and_free():
  """Catches an anchor that holds a new head to its random initialization."""
  model, anchor = finetune_vit.load(str(VIT))
  assert model.params['classifier']['kernel'].shape == (12, digits.CLASSES)
  assert anchor['classifier'] is None
  kernel = np.transpose(load_file(VIT / 'model.safetensors')[PROJECTION], (2, 3, 1, 0))
  for params in (model.params, anchor):
    embeddings = params['vit']['embeddings']['patch_embeddings']
    np.testing.assert_array_equal(embeddings['projection']['kernel'], kernel)
  state = spd.adam_spd(1e-3, anchor).init(model.params)
  names = optax.tree.get(state, 'condition')
  assert 'vit~layernorm~scale' in names
  assert not any(name.startswith('classifier') for name in names)


def test_a_pytorch_file_is_no_anchor_by_itself():
  """Catches weights that are read transposed; only the biases have Flax's names."""
  model, _ = finetune_vit.load(str(VIT))
  with pytest.raises(ValueError, match=r"a PyTorch model's names and layouts \(classifier/weight"):
    spd.load_anchor(VIT / 'model.safetensors', model.params)


def test_a_checkpoint_of_transformers_flax_models_is_an_anchor(recorded):
  """Catches a file by transformers' Flax ViT that load_anchor reads otherwise than it was meant."""
  model, _ = recorded
  anchor = spd.load_anchor(VIT / 'flax_model.msgpack', model.params, strict=True)
  chex.assert_trees_all_equal(anchor, model.params)


def test_progress_shows_without_a_terminal(capsys):
  """Catches a run of minutes that says nothing where its output goes to a file."""
  with training.progress_bar() as bar:
    task = bar.add_task('train', total=40)
    bar.advance(task, 10)
    assert capsys.readouterr().out == ''  # so soon
    bar.said -= 100  # seconds
    bar.advance(task, 10)
    assert capsys.readouterr().out == 'train: 20 of 40\n'
    bar.advance(task, 10)
    assert capsys.readouterr().out == ''
    bar.advance(task, 10)
  assert capsys.readouterr().out == 'train: 40 of 40\n'


def test_every_seed_draws_its_own_images_once_an_epoch():
  """Catches an image that is drawn twice, and seeds that see the same order."""
  order = training.batch_order(seeds=2, steps=4, batch=4, size=100, shots=8)
  assert order.shape == (2, 4, 4)
  for seed in order:
    first, second = np.split(seed.ravel(), 2)
    assert len(set(first)) == 8
    assert set(first) == set(second)
  assert set(order[0].ravel()) != set(order[1].ravel())


def test_the_splits_are_disjoint_and_the_styles_differ():
  """Catches test digits that were trained on; a style that does nothing."""
  splits = digits.load()
  seen = [{image.tobytes() for image in split.images} for split in splits]
  assert not seen[0] & seen[1]
  assert not (seen[0] | seen[1]) & seen[2]
  assert sum(len(split.labels) for split in splits) == 1797
  styled = {style: digits.in_style(splits[2], style).images for style in digits.STYLES}
  for style, images in styled.items():
    assert images.shape == (497, 16, 16)
    assert images.min() >= 0
    assert images.max() <= 1
    assert style == 'plain' or np.abs(images - styled['plain']).mean() > 0.02, style
