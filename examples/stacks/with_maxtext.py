"""MaxText: continued pre-training of scanned layers on fsdp × tensor, resumed by its checkpoints.

Tried with maxtext 0.2.5, flax 0.12.12, jax 0.12.0.1, optax 0.2.8 on Python 3.12, which it needs:

    python -m pip install -e . 'maxtext[tpu]' && python examples/stacks/with_maxtext.py

The one line that changes is marked below. MaxText chooses its optimizer by name in a config, among
its own, so the recipe replaces the function that does so. It stacks layers on axis 1: see its
`param_scan_axis`. It makes the optimizer state first and puts `load_parameters_path` in afterwards.
"""

import os
import pathlib
import tempfile

os.environ |= {'JAX_PLATFORMS': 'cpu', 'JAX_NUM_CPU_DEVICES': '8'}
os.environ['DECOUPLE_GCLOUD'] = 'TRUE'  # nothing here is sent to Google Cloud

import checks
import maxtext
import optax
from flax import nnx
from maxtext.configs import pyconfig
from maxtext.optimizers import optimizers
from maxtext.trainers.pre_train import train

import spd_optax as spd

CONFIG = pathlib.Path(maxtext.__file__).parent / 'configs' / 'base.yml'
TINY = [
  'base_emb_dim=16',
  'base_num_query_heads=2',
  'base_num_kv_heads=2',
  'base_mlp_dim=32',
  'base_num_decoder_layers=3',
  'head_dim=8',
  'vocab_size=64',
  'max_target_length=16',
  'per_device_batch_size=1',
  'attention=dot_product',
  'dtype=float32',
  'dataset_type=synthetic',
]
HERE = [
  'hardware=cpu',
  'skip_jax_distributed_system=True',
  'enable_goodput_recording=False',
  'monitor_goodput=False',
  'log_config=False',
  'jax_cache_dir=',
]


def get_optimizer(config, schedule, model=None, mesh=None):
  """What MaxText asks for an optimizer."""
  # return optax.adam(schedule)
  return spd.adam_spd(schedule, stack_axis={1: 'decoder/layers'})


optimizers.get_optimizer = get_optimizer


def config(folder, name, steps, *more):
  """The config of a run that saves every third step."""
  args = [f'base_output_directory={folder}', f'dataset_path={folder}', f'run_name={name}']
  args += [f'steps={steps}', 'learning_rate_schedule_steps=6', 'learning_rate=0.01']
  args += ['enable_checkpointing=True', 'checkpoint_period=3', 'async_checkpointing=False']
  args += ['ici_fsdp_parallelism=4', 'ici_tensor_parallelism=2']
  return pyconfig.initialize(['', str(CONFIG), *args, *TINY, *HERE, *more])


def main() -> None:
  """Trains from a checkpoint's weights, once in one go and once in two."""
  folder = tempfile.mkdtemp()
  before = train.train_loop(config(folder, 'before', 2, 'init_weights_seed=1'), None)
  load = f'load_parameters_path={folder}/before/checkpoints/1/items'
  whole = train.train_loop(config(folder, 'whole', 6, load), None)
  train.train_loop(config(folder, 'halves', 3, load), None)
  assert not (pathlib.Path(folder) / 'halves' / 'checkpoints' / '5').exists()
  resumed = train.train_loop(config(folder, 'halves', 6), None)

  checks.assert_equal(resumed, whole)
  kept, trained = (nnx.filter_state(state['model'], nnx.Param) for state in (before, whole))
  checks.assert_anchor(whole['optimizer'], kept, trained)
  embedding = optax.tree.get(whole['optimizer'], 'anchor')['token_embedder']['embedding']
  assert len({str(shard.index) for shard in embedding.addressable_shards}) == 8

  parts = [f'mlp/{x}/kernel' for x in ('wi_0', 'wi_1', 'wo')]
  parts += [f'self_attention/{x}/kernel' for x in ('key', 'out', 'query', 'value')]
  parts += [f'{x}_self_attention_layer_norm/scale' for x in ('pre', 'post')]
  layers = [f'decoder/layers/{part}[{i}]' for part in parts for i in range(3)]
  layers += ['decoder/decoder_norm/scale', 'decoder/logits_dense/kernel']
  checks.assert_layers(whole['optimizer'], [*layers, 'token_embedder/embedding'])


if __name__ == '__main__':
  main()
