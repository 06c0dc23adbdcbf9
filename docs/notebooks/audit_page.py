# %% [markdown]
# # Reading the audit page
#
# An audit log answers three questions about a run. Did SPD act? On which layers? What was the result? This notebook
# trains two models, one with `adam_spd` and one with a firm setting of `projection_decay`, and reads their logs.

# %%
import os
import sys
import tempfile
from pathlib import Path

import jax
import numpy as np
import optax
from IPython.display import Image, display

import spd_optax as spd
from spd_optax.audit.__main__ import main as audit

here = Path.cwd()
root = next(path for path in (here, *here.parents) if (path / 'examples/digits.py').exists())
sys.path.insert(0, str(root / 'examples'))
import small_model

folder = Path(tempfile.mkdtemp())
anchor = small_model.pretrained()
images, labels = small_model.few('striped')
batches = np.random.default_rng(1).integers(0, len(labels), (200, 16))


def finetune(name, optimizer):
  @jax.jit
  def step(params, state, images, labels):
    loss, gradients = jax.value_and_grad(small_model.loss)(params, images, labels)
    updates, state = optimizer.update(gradients, state, params)
    return optax.apply_updates(params, updates), state, loss

  params, state = anchor, optimizer.init(anchor)
  with spd.AuditLog(folder / f'{name}.jsonl', transform=name, source='eight styles') as log:
    for i, batch in enumerate(batches, 1):
      params, state, loss = step(params, state, images[batch], labels[batch])
      scores = {}
      if i % 50 == 0:  # a slow metric may come more rarely
        scores = {style: small_model.accuracy(params, style) for style in ('striped', 'old')}
      if i % 5 == 0:
        log.record(i, state, {'loss': loss, **scores})


finetune('adam_spd', spd.adam_spd(1e-3, anchor))
firm = spd.projection_decay(anchor, 10.0, margin=0.1)
finetune('firm', optax.chain(firm, optax.adam(1e-3)))

# %% [markdown]
# ## One run
#
# In a shell: `python -m spd_optax.audit report adam_spd.jsonl --html page.html`. The page has the same tables and pictures. It
# is one file that opens without a network. In Python, without the page:

# %%
os.chdir(folder)
status = audit(['report', 'adam_spd.jsonl', '--out', 'pictures'])

# %% [markdown]
# **Look first at the share of steps held.** Near 0 %: the run equals its inner optimizer, and [here is
# why](../understand/equal-runs.md). 20 to 50 % is usual for `adam_spd`. Near 100 %, with a distance that does not
# change: the model is held at its anchor, and cannot learn.
#
# **Then look at the warnings.** Each says what to look at. A good run has no warnings.
#
# ## The pictures

# %%
for picture in sorted(Path('pictures').glob('*.png')):
  display(Image(picture, width=640))

# %% [markdown]
# - **Distance**: how far each layer is from its anchor. A curve that rises and flattens is usual. If a curve rises to
#   the end, the layer still has something to learn.
# - **Held**: a row is a layer, a column a stretch of steps. Dark is free, bright is held. If a layer is held far more
#   than the others, fine-tuning keeps moving it away from its anchor.
# - **Metrics**: your own numbers. Forgetting shows only if you log a score on the old data.
#
# ## Two runs side by side
#
# The firm setting holds more, moves less, keeps more of the old styles, and learns less of the new one.

# %%
status = audit(['compare', 'adam_spd.jsonl', 'firm.jsonl', '--out', 'both'])

# %% [markdown]
# ## Was the log changed?
#
# Each line carries the hash of the line before. Keep the last hash elsewhere. Later it shows that the log is unchanged
# up to that line.

# %%
status = audit(['verify', 'adam_spd.jsonl'])

# %%
path = Path('adam_spd.jsonl')
path.write_text(path.read_text().replace('"step":100,', '"step":101,', 1))
status = audit(['verify', str(path)])  # the exit status is 1
