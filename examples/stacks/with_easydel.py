"""EasyDeL: a Llama from weights that `save_pretrained` wrote, resumed by `load_state`.

Tried with easydel 0.3.0, flax 0.12.3, jax 0.9.2, optax 0.2.8, transformers 5.5.4, torch 2.13.0:

    python -m pip install easydel pillow torch && python -m pip install --no-deps -e .
    python examples/stacks/with_easydel.py

The one line that changes is marked below. EasyDeL pins a jaxlib older than what this library asks
for, so the library is installed without its dependencies. EasyDeL imports torch: without a GPU,
take its CPU build, since EasyDeL does not start where it finds triton and no GPU.
"""

import os
import tempfile

os.environ |= {'JAX_PLATFORMS': 'cpu', 'JAX_NUM_CPU_DEVICES': '4', 'ENABLE_DISTRIBUTED_INIT': '0'}
os.environ['EASYDEL_AUTO'] = '0'  # no flags for XLA: a newer jaxlib does not know them all

import checks
import easydel as ed
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import spd_optax as spd

SIZES = {'vocab_size': 32, 'hidden_size': 16, 'intermediate_size': 32, 'head_dim': 4}
SIZES |= {'num_hidden_layers': 2, 'num_attention_heads': 4, 'num_key_value_heads': 4}
PLACE = {'sharding_axis_dims': (1, 4, 1, 1, 1)}  # dp, fsdp, ep, tp, sp
WIDE = {'dtype': jnp.float32, 'param_dtype': jnp.float32}
TOKENS = np.random.default_rng(0).integers(1, 32, (4, 8))

# tx = optax.adam(1e-2)
tx = spd.adam_spd(1e-2)


def train(state, start, stop):
  """Steps `start` to `stop`."""

  def step(state, tokens):
    def loss(params):
      model = state.merge(params)
      logits = model(input_ids=tokens, attention_mask=jnp.ones_like(tokens)).logits[:, :-1]
      return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

    return state.apply_gradients(grads=jax.grad(loss)(state.graphstate))

  # EasyDeL has the counts on one device, and one as an int: on all, so that one program runs all.
  state = jax.tree.map(jnp.asarray, state)
  state = checks.put_like(state, state, state.mesh)
  step = jax.jit(step, out_shardings=jax.tree.map(lambda x: x.sharding, state))
  with state.mesh:
    for i in range(start, stop):
      state = step(state, jnp.asarray((TOKENS + i) % 32))
  return state


def main() -> None:
  """Trains from loaded weights, once in one go and once in two."""
  weights, run = tempfile.mkdtemp(), tempfile.mkdtemp()
  attention = {'attn_mechanism': ed.AttentionMechanisms.VANILLA}
  config = ed.LlamaConfig(**SIZES, **PLACE, **attention)
  made = ed.LlamaForCausalLM(config=config, **WIDE, rngs=nnx.Rngs(0)).shard_model()
  made.save_pretrained(weights)

  def begin():
    kind = ed.AutoEasyDeLModelForCausalLM
    model = kind.from_pretrained(weights, **WIDE, **PLACE, config_kwargs=attention)
    return ed.EasyDeLState.create(model=model, tx=tx, init_opt_state=True)

  whole = train(begin(), 0, 6)
  train(begin(), 0, 3).save_state(run)
  stopped = ed.EasyDeLState.load_state(
    run, **WIDE, **PLACE, config_kwargs=attention, tx_template=tx
  )
  assert int(stopped.step) == 3
  resumed = train(stopped.replace(tx=tx), 3, 6)

  checks.assert_equal((resumed.graphstate, resumed.opt_state), (whole.graphstate, whole.opt_state))
  checks.assert_anchor(whole.opt_state, nnx.state(made, nnx.Param), whole.graphstate)
  parts = [f'self_attn/{x}_proj/kernel' for x in 'kqvo']
  parts += [f'mlp/{x}_proj/kernel' for x in ('down', 'gate', 'up')]
  parts += ['input_layernorm/kernel', 'post_attention_layernorm/kernel']
  layers = [f'model/layers/{i}/{part}' for i in range(2) for part in parts]
  layers += ['lm_head/kernel', 'model/embed_tokens/embedding', 'model/norm/kernel']
  checks.assert_layers(whole.opt_state, layers)


if __name__ == '__main__':
  main()
