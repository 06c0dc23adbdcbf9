"""The examples run, at tiny sizes, and their data are what they say."""

import json

import chex
import flax
import numpy as np
import optax
import pytest
import smoke
from safetensors.numpy import save_file

import digits
import finetune_vit
import spd_optax as spd
import training

pytestmark = pytest.mark.examples

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
  first, second = (finetune_vit.load(str(run[0] / 'foundation' / name))[1] for name in '01')
  assert not np.array_equal(first['classifier']['kernel'], second['classifier']['kernel'])
  assert max(x for row in run[1].values() for x in row['moved']) < 50


def test_a_checkpoint_serves_all_seeds(run, tmp_path):
  """Catches seeds that are left out where only one checkpoint was given."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(finetune_vit, 'small_vit', smoke.tiny_vit)
    own = ['--checkpoint', str(run[0] / 'foundation' / '1'), '--out', str(tmp_path)]
    results = finetune_vit.main([*TINY, *own])
  for name, row in results.items():
    assert all(len(values) == (1 if name == 'pre-trained' else 2) for values in row.values()), name
  # The second seed has its own batches there, too.
  first, second = results['Adam']['moved']
  assert second == pytest.approx(run[1]['Adam']['moved'][1], rel=1e-2)
  assert first != pytest.approx(second, rel=1e-2)


def test_a_head_with_other_classes_is_new_and_free(run, tmp_path):
  """Catches an anchor that holds a new head to its random initialization."""
  config = finetune_vit.small_vit().config
  config.num_labels = 7
  other = type(finetune_vit.small_vit())(config, seed=1)
  other.save_pretrained(tmp_path)
  model, anchor = finetune_vit.load(str(tmp_path))
  assert model.params['classifier']['kernel'].shape == (48, digits.CLASSES)
  assert anchor['classifier'] is None
  state = spd.adam_spd(1e-3, anchor).init(model.params)
  names = optax.tree.get(state, 'condition')
  assert 'vit~layernorm~scale' in names
  assert not any(name.startswith('classifier') for name in names)

  model, anchor = finetune_vit.load(str(run[0] / 'foundation' / '0'))
  assert anchor['classifier'] is not None


def torch_names(params):
  """The weights as transformers' PyTorch ViT names and lays them out."""
  found = {}
  for keys, array in flax.traverse_util.flatten_dict(params).items():
    *module, last = keys
    name = '.'.join([*module, {'kernel': 'weight', 'scale': 'weight'}.get(last, last)])
    if last == 'kernel':
      array = array.transpose(3, 2, 0, 1) if array.ndim == 4 else array.T
    found[name] = np.ascontiguousarray(array)
  return found


@pytest.mark.parametrize('labels', [10, 7])
def test_a_pytorch_checkpoint(labels, tmp_path):
  """Catches an anchor from before the weights were loaded, and one for a head that is new."""
  config = finetune_vit.small_vit().config
  config.num_labels = labels
  other = type(finetune_vit.small_vit())(config, seed=1)
  config.save_pretrained(tmp_path)
  weights = torch_names(other.params)
  save_file(weights, tmp_path / 'model.safetensors', metadata={'format': 'pt'})
  model, anchor = finetune_vit.load(str(tmp_path))
  if labels == 7:
    assert anchor.pop('classifier') is None
    chex.assert_trees_all_equal(anchor, {'vit': other.params['vit']})
  else:
    chex.assert_trees_all_equal(anchor, other.params)
  assert model.params['classifier']['kernel'].shape == (48, digits.CLASSES)
  # The file itself is no anchor for a Flax model; only its biases have the same names.
  with pytest.raises(ValueError, match=r"a PyTorch model's names and layouts \(classifier/weight"):
    spd.load_anchor(tmp_path, model.params)


def test_a_flax_checkpoint_is_an_anchor(tmp_path):
  """Catches a file by transformers that load_anchor reads otherwise than from_pretrained does."""
  finetune_vit.small_vit().save_pretrained(tmp_path)
  model, _ = finetune_vit.load(str(tmp_path))
  anchor = spd.load_anchor(tmp_path / 'flax_model.msgpack', model.params, strict=True)
  chex.assert_trees_all_equal(anchor, model.params)


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
