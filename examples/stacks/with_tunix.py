"""Tunix: a Llama fine-tuned by `PeftTrainer`, whole and by LoRA (qwix), resumed by its checkpoints.

Tried with google-tunix 0.1.7, qwix 0.1.8, flax 0.12.8, jax 0.10.2, optax 0.2.8:

    python -m pip install -e . google-tunix && python examples/stacks/with_tunix.py

The one line that changes is in `trainer`. Make meshes with automatic axes: with the explicit ones
of `jax.make_mesh`, Tunix fails whatever the optimizer. On a mesh it restores no state with a leaf
left out, so keep the default anchor there: no `free`, no `anchor=0` for adapters.
"""

import pathlib
import tempfile

import checks
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import qwix
from flax import nnx
from tunix.models.llama3.model import Llama3, ModelConfig
from tunix.sft import peft_trainer

import spd_optax as spd

SIZES = {'num_layers': 2, 'vocab_size': 32, 'embed_dim': 8, 'hidden_dim': 16, 'num_heads': 4}
SIZES |= {'head_dim': 4, 'num_kv_heads': 4, 'rope_theta': 10_000, 'norm_eps': 1e-5}
TOKENS = np.random.default_rng(0).integers(1, 32, (4, 6))


def inputs(batch):
  """What the model is called with."""
  tokens = batch.input_tokens
  positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
  mask = jnp.broadcast_to(jnp.tril(jnp.ones((tokens.shape[1],) * 2, bool)), (*tokens.shape, 6))
  return {
    'input_tokens': tokens,
    'input_mask': batch.input_mask,
    'positions': positions,
    'attention_mask': mask,
  }


def trainer(model, steps, folder=None):
  """A trainer that saves every step, and goes on where the folder's last one stopped."""
  config = peft_trainer.TrainingConfig(
    eval_every_n_steps=100,
    max_steps=steps,
    gradient_accumulation_steps=2,
    checkpoint_root_directory=folder,
    checkpointing_options=ocp.CheckpointManagerOptions(save_interval_steps=1),
  )
  # made = peft_trainer.PeftTrainer(model, optax.adam(1e-2), config)
  made = peft_trainer.PeftTrainer(model, spd.adam_spd(1e-2), config)
  return made.with_gen_model_input_fn(inputs)


def train(made):
  """All steps that are left."""
  data = [peft_trainer.TrainingInput(TOKENS + i % 3, TOKENS > 0) for i in range(12)]
  made.train(data)
  return made


def main() -> None:
  """Trains from loaded weights, once in one go and once in two; then adapters."""
  mesh = checks.mesh(fsdp=4, tp=1)
  # Tunix makes its models of zeros; these weights stand for those of a checkpoint.
  random = np.random.default_rng(0)
  shapes = nnx.state(Llama3(ModelConfig(**SIZES), rngs=nnx.Rngs(0)), nnx.Param)
  pretrained = jax.tree.map(lambda x: np.float32(random.normal(0, 0.3, x.shape)), shapes)

  def begin():
    model = Llama3(ModelConfig(**SIZES), rngs=nnx.Rngs(1))
    nnx.update(model, jax.device_put(pretrained, nnx.get_named_sharding(pretrained, mesh)))
    return model

  def adapted():
    provider = qwix.LoraProvider(module_path='.*mlp.*', rank=2, alpha=2.0)
    example = {**inputs(peft_trainer.TrainingInput(TOKENS, TOKENS > 0)), 'cache': None}
    del example['input_mask']
    return qwix.apply_lora_to_model(begin(), provider, **example, rngs=nnx.Rngs(2))

  parts = ['attn/k_proj/w', 'attn/o_proj/w', 'attn/q_proj/w', 'attn/v_proj/w']
  parts += ['input_layernorm/w', 'post_attention_layernorm/w']
  mlp = [f'mlp/{name}_proj/kernel' for name in ('down', 'gate', 'up')]
  full = ['embedder/input_embedding', 'final_norm/w', 'lm_head/w']
  full += [f'layers/{i}/{part}' for i in range(2) for part in parts + mlp]
  adapters = [f'layers/{i}/{part}_lora_{x}' for i in range(2) for part in mlp for x in 'ab']
  with jax.set_mesh(mesh):
    for make, kind, layers in ((begin, nnx.Param, full), (adapted, nnx.LoRAParam, adapters)):
      folder = str(pathlib.Path(tempfile.mkdtemp()) / 'run')
      whole = train(trainer(make(), 6))
      train(trainer(make(), 3, folder))
      resumed = trainer(make(), 6, folder)
      assert resumed.train_steps == 3
      train(resumed)

      checks.assert_equal(nnx.state(resumed.optimizer), nnx.state(whole.optimizer))
      checks.assert_equal(nnx.state(resumed.model), nnx.state(whole.model))
      state = whole.optimizer.opt_state
      checks.assert_anchor(state, nnx.state(make(), kind), nnx.state(whole.model, kind))
      checks.assert_layers(state, layers)


if __name__ == '__main__':
  main()
