# %% [markdown]
# # Quickstart: from a checkpoint to a report
#
# A small network knows handwritten digits in eight styles. It learns a ninth style, striped, from 200 images. What does it
# forget? We load the checkpoint, fine-tune with Adam and with SPD, compare, and read the report.
#
# This page is a notebook. It runs from top to bottom in half a minute on a laptop.

# %%
import sys
import tempfile
from pathlib import Path

import jax
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax.traverse_util import flatten_dict

import spd_optax as spd

here = Path.cwd()
root = next(path for path in (here, *here.parents) if (path / 'examples/digits.py').exists())
sys.path.insert(0, str(root / 'examples'))
import digits  # the data: scikit-learn's digits, in several styles
import small_model  # the network

folder = Path(tempfile.mkdtemp())

# %% [markdown]
# ## The data
#
# The first eight styles are known. The last one is new.

# %%
styles = [*digits.OLD, 'striped']
figure, axes = plt.subplots(1, 9, figsize=(9, 1.3))
for axis, style in zip(axes, styles, strict=True):
  axis.imshow(digits.in_style(digits.load()[2], style).images[3], cmap='gray')
  axis.set_title(style, fontsize=8)
  axis.axis('off')

# %% [markdown]
# ## Load the checkpoint
#
# Usually somebody else has trained it. Here we train it in a few seconds, and save it as big_vision does.
# `spd.load_anchor` reads Orbax, safetensors, msgpack and npz.

# %%
trained = small_model.pretrained()
np.savez(
  folder / 'pretrained.npz', **{f'params/{k}': v for k, v in flatten_dict(trained, sep='/').items()}
)

anchor = spd.load_anchor(folder / 'pretrained.npz', like=trained, key='params')
print(
  f'striped {small_model.accuracy(anchor, "striped"):.1f} %, old {small_model.accuracy(anchor, "old"):.1f} %'
)

# %% [markdown]
# ## Fine-tune
#
# This is an ordinary loop. Only the optimizer changes, and one line writes the log.

# %%
images, labels = small_model.few('striped')
batches = np.random.default_rng(1).integers(0, len(labels), (200, 16))


def finetune(optimizer, log=None):
  @jax.jit
  def step(params, state, images, labels):
    loss, gradients = jax.value_and_grad(small_model.loss)(params, images, labels)
    updates, state = optimizer.update(gradients, state, params)
    return optax.apply_updates(params, updates), state, loss

  params, state = anchor, optimizer.init(anchor)
  for i, batch in enumerate(batches, 1):
    params, state, loss = step(params, state, images[batch], labels[batch])
    if log and i % 5 == 0:
      log.record(i, state, {'loss': loss})
  return params, state


by_adam, _ = finetune(optax.adam(1e-3))
chain = optax.chain(spd.projection_decay(anchor), optax.adam(1e-3))
with spd.AuditLog(
  folder / 'spd.jsonl', transform='projection_decay', source='pretrained.npz'
) as log:
  by_spd, state = finetune(chain, log)
by_paper, _ = finetune(spd.adam_spd(1e-3, anchor))

# %% [markdown]
# ## Compare
#
# WiSE-FT needs no training: it interpolates between the weights before and after fine-tuning. Always compare with it.

# %%
results = {
  'pre-trained': anchor,
  'Adam': by_adam,
  'WiSE-FT, α = 0.7': spd.interpolate(anchor, by_adam, 0.7),
  'projection_decay': by_spd,
  'adam_spd': by_paper,
}
figure, axis = plt.subplots(figsize=(6, 3.6))
print(f'{"":24} striped   old')
for name, params in results.items():
  new, old = small_model.accuracy(params, 'striped'), small_model.accuracy(params, 'old')
  print(f'{name:24} {new:7.1f} {old:5.1f}')
  axis.scatter(new, old, s=60, label=name)
axis.set(xlabel='new style, %', ylabel='old styles, %')
axis.grid(alpha=0.3)
_ = axis.legend(fontsize=8)

# %% [markdown]
# Up and to the right is better. This is one seed of one small network: it shows how to compare, not which method is
# best. [The evidence](../evidence.md) has errors and more models.
#
# ## See what was held

# %%
for record in spd.layer_report(state):
  print(f'{record.name:16} held in {100 * record.constrained_share:3.0f} % of the steps')

# %% [markdown]
# The log has the same over time. In a shell: `python -m spd_optax.audit report spd.jsonl --html page.html`.
# [Reading the audit page](audit_page.py) explains it.
#
# ## Next
#
# - The same with a model that knows ImageNet: [A real model](real_model.py).
# - Does it forget too much, or learn too little? [Choosing](../how-to/choose.md).
# - Do you want to limit how much is lost? [Setting a budget](../how-to/set-a-budget.md).
# - The line for your framework: [Change this to that](../how-to/change-this-to-that.md).
