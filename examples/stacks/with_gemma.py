"""gemma: a tiny Gemma 3, whole and by LoRA, from params that Orbax saved.

Tried with gemma 3.3.0, flax 0.12.8, jax 0.10.2, optax 0.2.8, orbax-checkpoint 0.12.8:

    pip install spd_optax gemma 'sentencepiece<=0.2.0' && python examples/stacks/with_gemma.py

The one line that changes is marked below. Adapters train alone and start at zero: `anchor=0`.
gemma 3.3.0 does not import a newer sentencepiece, and its `gm.ckpts` not Kauldron 1.4.2.
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


def wide(params):
  """The params as float32: gemma makes them bfloat16, in which small steps are lost."""
  return jax.tree.map(lambda x: x.astype(jnp.float32), params)


def trainer(model, tx, frozen):
  """A function that takes steps; `frozen` is what is not trained."""

  @jax.jit
  def step(params, state, tokens):
    def loss(params):
      both = peft.merge_params(frozen, params) if frozen else params
      logits = model.apply({'params': both}, tokens).logits[:, :-1]
      return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

    updates, state = tx.update(jax.grad(loss)(params), state, params)
    return optax.apply_updates(params, updates), state

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
  pretrained = wide(model.init(jax.random.key(0), TOKENS)['params'])
  with ocp.StandardCheckpointer() as writer:
    writer.save(folder / 'pretrained', pretrained)
  with ocp.StandardCheckpointer() as reader:
    loaded = checks.split(reader.restore(folder / 'pretrained', pretrained), mesh)
  adapted = gm.nn.LoRA(rank=2, model=model)
  _, adapters = peft.split_params(adapted.init(jax.random.key(1), TOKENS)['params'])
  adapters = checks.split(wide(adapters), mesh)

  # tx = optax.adam(1e-2)
  full, lora = spd.adam_spd(1e-2), spd.adam_spd(1e-2, anchor=0)
  for net, tx, start, frozen in ((model, full, loaded, {}), (adapted, lora, adapters, loaded)):
    train = trainer(net, tx, frozen)
    fresh = (start, tx.init(start))
    fresh = checks.put_like(fresh, fresh, mesh)  # counts, too: one program then runs both
    whole = train(*fresh, 0, 6)
    file = folder / net.__class__.__name__
    with ocp.StandardCheckpointer() as writer:
      writer.save(file, train(*fresh, 0, 3))
    with ocp.StandardCheckpointer() as reader:
      stopped = reader.restore(file, fresh)
    checks.assert_equal(train(*stopped, 3, 6), whole)
    names = [record.name for record in spd.layer_report(whole[1])]
    part = 'layer_1/mlp/_LoRAEinsum_linear/lora/b' if frozen else 'layer_1/mlp/linear'
    assert part in names, names
    if not frozen:
      checks.assert_anchor(whole[1], pretrained, whole[0])


if __name__ == '__main__':
  main()
