# %% [markdown]
# # LoRA: adapters with an anchor of zero
#
# A LoRA adapter changes a weight W into W + A B. B starts at 0, so the anchor of an adapter is 0. SPD then stores no
# copy of any weights: `spd.adam_spd(lr, anchor=0)`. The model here is a small Flax nnx ViT on handwritten digits.

# %%
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import spd_optax as spd

here = Path.cwd()
root = next(path for path in (here, *here.parents) if (path / 'examples/digits.py').exists())
sys.path.insert(0, str(root / 'examples'))
import digits
from finetune_lora import ViT, cross_entropy, with_adapters

# %% [markdown]
# ## A pre-trained model
#
# This model takes the place of yours: it learns eight styles of digits in a few seconds.

# %%
pretrain, few, test = digits.load()
known = [digits.in_style(pretrain, style) for style in digits.OLD]
known = digits.Split(*(np.concatenate(part) for part in zip(*known, strict=True)))


def train(model, optimizer, data, kind, steps):
  graph, params, rest = nnx.split(model, kind, ...)
  order = np.random.default_rng(0).integers(0, len(data.labels), (steps, 32))
  images, labels = map(jnp.asarray, data)

  def loss(params, at):
    return cross_entropy(nnx.merge(graph, params, rest)(images[at]), labels[at])

  @jax.jit
  def run(carry, order):
    def step(carry, at):
      params, state = carry
      updates, state = optimizer.update(jax.grad(loss)(params, at), state, params)
      return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(step, carry, order)[0]

  params, state = run((params, optimizer.init(params)), order)
  return nnx.merge(graph, params, rest), state


base, _ = train(ViT(nnx.Rngs(0)), optax.adam(3e-3), known, nnx.Param, 300)

# %% [markdown]
# ## Adapters around every linear layer

# %%
model = with_adapters(base, rank=4)
adapters = nnx.state(model, nnx.LoRAParam)
print(
  f'{sum(x.size for x in jax.tree.leaves(adapters)):,} of {sum(x.size for x in jax.tree.leaves(nnx.state(model))):,} weights are trained'
)

# %% [markdown]
# ## Train the adapters alone
#
# With `nnx.Optimizer` this is `nnx.Optimizer(model, spd.adam_spd(3e-3, anchor=0), wrt=nnx.LoRAParam)`. The loop above is
# the same, in one compiled program.

# %%
striped = digits.in_style(few, 'striped')
by_adam, _ = train(model, optax.adam(3e-3), striped, nnx.LoRAParam, 150)
by_spd, state = train(model, spd.adam_spd(3e-3, anchor=0), striped, nnx.LoRAParam, 150)
assert not jax.tree.leaves(optax.tree.get(state, 'anchor'))  # nothing is stored

# %% [markdown]
# ## Compare


# %%
@nnx.jit
def right(model, images, labels):
  return 100 * jnp.mean(jnp.argmax(model(images), -1) == labels)


tests = {style: digits.in_style(test, style) for style in (*digits.OLD, 'striped')}


def accuracy(model, styles):
  return np.mean([right(model, *tests[style]) for style in styles])


print(f'{"":12} striped   old')
for name, found in {'pre-trained': base, 'Adam': by_adam, 'adam_spd': by_spd}.items():
  print(f'{name:12} {accuracy(found, ["striped"]):7.1f} {accuracy(found, digits.OLD):5.1f}')

# %% [markdown]
# Training the adapters alone forgets less than training all weights, so SPD has less to keep. This is one seed. [The
# experiments](../experiments.md#lora) compare three anchors, with errors.
#
# ## Which adapters were held

# %%
records = sorted(spd.layer_report(state), key=lambda record: -record.constrained_share)
for record in records[:6]:
  print(f'{record.name:32} held in {100 * record.constrained_share:3.0f} % of the steps')

# %% [markdown]
# A and B of one adapter are held in the same steps. Only their product matters to the loss, so ⟨g, d⟩ is the same for
# both if the anchor is 0.
