"""The LoRA example runs, at tiny sizes, and trains and stores what it says."""

import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import smoke
from flax import nnx

import digits
import finetune_lora
import training

pytestmark = pytest.mark.examples

TINY = ['--pretrain-steps', '3', '--steps', '3', '--seeds', '2', '--batch', '4', '--shots', '8']
LR = 1e-2
# Each method takes seconds to compile; these are one of each kind.
LORA = ('Adam', 'projection_decay, firm, anchor 0 for B')
WHOLE = ('adam_spd, frozen embedding',)
WITH_SPD = tuple(name for name in LORA + WHOLE if name != 'Adam')


@pytest.fixture(scope='module', autouse=True)
def small():
  """A model of one block, compiled quickly."""
  with pytest.MonkeyPatch.context() as patch, smoke.quick_compiles():
    patch.setattr(finetune_lora, 'BLOCKS', 1)
    yield


@pytest.fixture(scope='module')
def run(small, tmp_path_factory):
  out = tmp_path_factory.mktemp('finetune_lora')
  lora, whole = finetune_lora.lora_methods, finetune_lora.all_methods
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(finetune_lora, 'lora_methods', lambda *a: {k: lora(*a)[k] for k in LORA})
    patch.setattr(finetune_lora, 'all_methods', lambda *a: {k: whole(*a)[k] for k in WHOLE})
    return out, finetune_lora.main([*TINY, '--out', str(out)])


@pytest.fixture(scope='module')
def problem(small):
  """The model, its adapters, data, and batches for two seeds."""
  model = finetune_lora.ViT(nnx.Rngs(0))
  adapted = finetune_lora.with_adapters(model, 2)
  data = digits.in_style(digits.load()[1], 'striped')
  return model, adapted, data, training.batch_order(2, 6, 8, len(data.labels))


def weights(model):
  return nnx.to_pure_dict(nnx.state(model, nnx.Param))


def base(model):
  return nnx.to_pure_dict(nnx.state(model, nnx.All(nnx.Param, nnx.Not(nnx.LoRAParam))))


def test_it_writes_its_results(run):
  """Catches a method left out, or a row with other columns or seeds than its own."""
  out, results = run
  written = json.loads((out / 'results.json').read_text())
  assert written['results'] == results
  assert written['settings']['rank'] == 4
  assert (out / 'results.png').read_bytes().startswith(b'\x89PNG')
  assert [*results][:3] == ['pre-trained', 'LoRA: Adam', 'LoRA: WiSE-FT, α = 0.5']
  assert len(results) == 3 + len(LORA) - 1 + len(WHOLE) + 1
  for name, row in results.items():
    seeds = 1 if name == 'pre-trained' else 2
    assert {len(row[c]) for c in ('new style', 'old, mean', 'old, worst', 'moved')} == {seeds}
    assert ('held' in row) == ('anchor, bytes/param' in row) == name.endswith(WITH_SPD), name
  moved = {name: tuple(row['moved']) for name, row in results.items()}
  assert moved.pop('pre-trained') == (0,)
  assert all(0 < first != second for first, second in moved.values())
  halfway = np.array(moved['LoRA: WiSE-FT, α = 0.5'])
  np.testing.assert_allclose(halfway, np.array(moved['LoRA: Adam']) / 2, rtol=1e-3, atol=2e-3)


def test_the_zero_anchor_stores_nothing(problem):
  """Catches zeros that are stored, and an anchor for a free A or a frozen embedding."""
  model, adapted, _, _ = problem
  adapters = finetune_lora.trained(adapted, nnx.LoRAParam).start
  methods = finetune_lora.lora_methods(LR, adapters)
  assert len(methods) == 10
  for name, optimizer in methods.items():
    expected = [] if name == 'Adam' else [4] if 'A₀' in name else [0]
    found = finetune_lora.anchor_bytes(optimizer, adapters)
    assert found.get('anchor, bytes/param', []) == expected, name
    held = optax.tree.get(jax.eval_shape(optimizer.init, adapters), 'condition', {})
    assert {path.rpartition('~')[2] for path in held} == (
      set() if name == 'Adam' else {'lora_b'} if '0 for B' in name else {'lora_a', 'lora_b'}
    ), name
  whole = weights(model)
  sizes = {name: sum(x.size for x in jax.tree.leaves(part)) for name, part in whole.items()}
  frozen = sizes['embedding'] / sum(sizes.values())
  for name in WHOLE:
    found = finetune_lora.anchor_bytes(finetune_lora.all_methods(LR)[name], whole)
    assert found['anchor, bytes/param'] == [pytest.approx(4 * (1 - frozen), abs=1e-3)]


def test_adapters_start_as_the_model_itself(problem):
  """Catches a linear layer without an adapter, an adapter that starts the model elsewhere,
  and a copy that shares its layers with the model."""
  model, adapted, data, _ = problem
  chex.assert_trees_all_equal(adapted(data.images[:4]), model(data.images[:4]))
  linear = [m for _, m in nnx.iter_modules(model) if isinstance(m, nnx.Linear)]
  adapters = [m for _, m in nnx.iter_modules(adapted) if isinstance(m, nnx.LoRA)]
  assert len(adapters) == len(linear) == 6
  assert not {id(m) for m in linear} & {id(m.base_module) for m in adapters}


def test_the_template_is_the_shared_loop(problem):
  """Catches a template that trains other weights, or in another way, than the table says."""
  _, adapted, data, order = problem
  before = base(adapted)
  part = finetune_lora.trained(adapted, nnx.LoRAParam)
  optimizer = finetune_lora.lora_methods(LR, part.start)['adam_spd, anchor 0']
  shared, state = training.train(part.loss, optimizer, part.start, data, order)
  assert sum(np.sum(n) for n in optax.tree.get(state, 'constrained').values()) > 0
  for seed in range(2):
    model = nnx.clone(adapted)
    batches = (jax.tree.map(lambda x, at=at: x[at], data) for at in order[seed])
    finetune_lora.finetune(model, batches, LR)
    found = nnx.to_pure_dict(nnx.state(model, nnx.LoRAParam))
    expected = jax.tree.map(lambda x, seed=seed: x[seed], shared)
    chex.assert_trees_all_close(found, expected, rtol=1e-4, atol=1e-5)
    away = max(jnp.abs(x).max() for x in jax.tree.leaves(optax.tree.sub(found, part.start)))
    assert away > LR
    chex.assert_trees_all_equal(base(model), before)  # the template leaves the rest alone
  chex.assert_trees_all_equal(base(adapted), before)


def test_the_frozen_part_keeps_every_bit(problem):
  """Catches an optimizer that moves frozen weights by decay, rounding or projection."""
  model, _, data, order = problem
  part = finetune_lora.trained(model, nnx.Param)
  methods = finetune_lora.all_methods(LR)
  for name in ('adam_spd, frozen embedding', 'projection_decay, frozen embedding'):
    optimizer = methods[name]
    end, state = training.train(part.loss, optimizer, part.start, data, order[:1])
    assert sum(np.sum(n) for n in optax.tree.get(state, 'constrained').values()) > 0
    for layer, start in part.start.items():
      same = [
        np.asarray(x[0]).tobytes() == np.asarray(y).tobytes()
        for x, y in zip(jax.tree.leaves(end[layer]), jax.tree.leaves(start), strict=True)
      ]
      assert all(same) if layer == 'embedding' else not any(same), (name, layer)
