"""gemma: a tiny Gemma 3, whole and by LoRA, from params that `gm.ckpts.load_params` reads.

Tried with gemma 4.0.1, flax 0.12.12, jax 0.12.0.1, optax 0.2.8 on Python 3.12, which it needs:

    python -m pip install -e . gemma 'sentencepiece<=0.2.0' && python examples/stacks/with_gemma.py

The one line that changes is marked below. Adapters train alone, with `anchor=0`, which stores
nothing. gemma 4.0.1 does not import a newer sentencepiece with the protobuf that it asks for.

The step has `out_shardings`. Without them, the compiler splits the adapters at the first step, and
a run that is resumed where `init` had put them is another program. With jax 0.10.2 that one adds up
norms in another order: it ended 2e-7 apart. Adam alone has no norms, and ended equal.
"""

import pathlib
import tempfile

import checks
import jax
import jax.numpy as jnp
import numpy as np
import optax
from gemma import gm, peft
from orbax import checkpoint as ocp

import spd_optax as spd

CONFIG = gm.nn.config.TransformerConfig(
  num_embed=32,
  embed_dim=8,
  hidden_dim=16,
  num_heads=4,
  head_dim=8,
  num_kv_heads=4,
  final_logit_softcap=None,
  use_post_attn_norm=True,
  use_post_ffw_norm=True,
  attention_types=[gm.nn.AttentionType.GLOBAL] * 2,
)
TOKENS = np.random.default_rng(0).integers(1, 32, (4, 6))


def begin(model, key, mesh):
  """Random params as float32: gemma makes them bfloat16, in which small steps are lost."""
  params = model.init(jax.random.key(key), TOKENS)['params']
  return checks.split(jax.tree.map(lambda x: x.astype(jnp.float32), params), mesh)


def trainer(model, tx, frozen, fresh):
  """A function that takes steps; `frozen` is what is not trained."""

  def step(params, state, tokens):
    def loss(params):
      both = peft.merge_params(frozen, params) if frozen else params
      logits = model.apply({'params': both}, tokens).logits[:, :-1]
      return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

    updates, state = tx.update(jax.grad(loss)(params), state, params)
    return optax.apply_updates(params, updates), state

  step = jax.jit(step, out_shardings=jax.tree.map(lambda x: x.sharding, fresh))

  def train(params, state, start, stop):
    for i in range(start, stop):
      params, state = step(params, state, jnp.asarray((TOKENS + i) % 32))
    return params, state

  return train


def main() -> None:
  """Trains from loaded weights, once in one go and once in two; then adapters."""
  mesh = checks.mesh(fsdp=4)
  folder = pathlib.Path(tempfile.mkdtemp())
  model = gm.nn.Transformer(config=CONFIG)
  pretrained = begin(model, 0, mesh)
  with ocp.StandardCheckpointer() as writer:
    writer.save(folder / 'pretrained', pretrained)
  loaded = gm.ckpts.load_params(folder / 'pretrained', params=begin(model, 1, mesh))
  adapted = gm.nn.LoRA(rank=2, model=model)
  adapters = peft.split_params(begin(adapted, 2, mesh)).lora

  # tx = optax.adam(1e-2)
  full, lora = spd.adam_spd(1e-2), spd.adam_spd(1e-2, anchor=0)
  runs = []
  for net, tx, start, frozen in ((model, full, loaded, {}), (adapted, lora, adapters, loaded)):
    fresh = (start, tx.init(start))
    fresh = checks.put_like(fresh, fresh, mesh)  # counts, too
    train = trainer(net, tx, frozen, fresh)
    whole = train(*fresh, 0, 6)
    with ocp.StandardCheckpointer() as writer:
      writer.save(folder / type(net).__name__, train(*fresh, 0, 3))
    with ocp.StandardCheckpointer() as reader:
      stopped = reader.restore(folder / type(net).__name__, fresh)
    checks.assert_equal(train(*stopped, 3, 6), whole)
    runs.append(whole)

  (params, state), (_, adapting) = runs
  checks.assert_anchor(state, pretrained, params)
  parts = ['attn/attn_vec_einsum/w', 'attn/qkv_einsum/w', 'mlp/gating_einsum', 'mlp/linear']
  parts += [f'{at}_norm/scale' for at in ('pre_attention', 'pre_ffw', 'post_attention', 'post_ffw')]
  layers = [f'layer_{i}/{part}' for i in range(2) for part in parts]
  checks.assert_layers(state, ['embedder/input_embedding', 'final_norm/scale', *layers])

  assert not jax.tree.leaves(optax.tree.get(adapting, 'anchor'))
  parts = [f'attn/{x}_einsum/_LoRAEinsum_0' for x in ('attn_vec', 'qkv')]
  parts += [f'mlp/_LoRAEinsum_{x}' for x in ('gating_einsum', 'linear')]
  layers = [f'layer_{i}/{part}/lora/{x}' for i in range(2) for part in parts for x in 'ab']
  checks.assert_layers(adapting, layers)


if __name__ == '__main__':
  main()
