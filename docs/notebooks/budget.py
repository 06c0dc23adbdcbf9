# %% [markdown]
# # A budget: say how much may be lost
#
# With a budget, SPD sets its strength itself, in one run. Here the drift is the KL divergence from the base model on
# *new* images. It needs no old data and no labels. [Setting a budget](../how-to/set-a-budget.md) shows the other ways.

# %%
import sys
from pathlib import Path

import jax
import matplotlib.pyplot as plt
import numpy as np
import optax

import spd_optax as spd

here = Path.cwd()
root = next(path for path in (here, *here.parents) if (path / 'examples/digits.py').exists())
sys.path.insert(0, str(root / 'examples'))
import small_model

anchor = small_model.pretrained()
images, labels = small_model.few('striped')
batches = np.random.default_rng(1).integers(0, len(labels), (300, 16))

# %% [markdown]
# ## One run
#
# The logits of the base model are computed once. `update` gets the drift in every step. A slow measurement may be made
# in every tenth step, with NaN in the others.

# %%
probe = images[:100]
base_logits = small_model.logits(anchor, probe)


def finetune(strength):
  link = spd.projection_decay(anchor, strength=strength)
  optimizer = optax.chain(link, optax.adam(1e-3))

  @jax.jit
  def step(params, state, images, labels):
    gradients = jax.grad(small_model.loss)(params, images, labels)
    drift = spd.kl_from_base(small_model.logits(params, probe), base_logits)
    updates, state = optimizer.update(gradients, state, params, drift=drift)
    return optax.apply_updates(params, updates), state, drift

  params, state, drifts, strengths = anchor, optimizer.init(anchor), [], []
  for batch in batches:
    params, state, drift = step(params, state, images[batch], labels[batch])
    drifts.append(drift)
    strengths.append(optax.tree.get(state, 'budget_state').strength)
  return params, np.array(drifts), np.array(strengths)


runs = {budget: finetune(spd.within_budget(budget)) for budget in (2.0, 4.0, 100.0)}
print(f'without a limit the drift is {runs[100.0][1][-1]:.1f} nats at the end')

# %% [markdown]
# ## What the strength did
#
# The drift rises until it is near the budget (dashed). Then the strength rises and keeps the drift there. Early on the
# drift may be above the budget, because the model learns fastest then.
#
# The drift never comes near the budget of 100. So the strength stays 0, and the run equals plain Adam. Such a run says
# which budgets make sense: less than its drift. (A task that reverses the old answers needs many nats. Others need less
# than one.)

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout='constrained')
for budget, (_, drifts, strengths) in list(runs.items())[:2]:
  (line,) = left.plot(drifts, label=f'budget {budget} nats')
  left.axhline(budget, color=line.get_color(), ls='--', lw=0.8)
  right.plot(np.maximum(strengths, 1e-2), color=line.get_color())
left.set(xlabel='step', ylabel='KL from the base model, nats')
right.set(xlabel='step', ylabel='strength', yscale='log')
_ = left.legend(fontsize=8)

# %% [markdown]
# ## What the budget changed
#
# A smaller budget keeps more of the old styles, and costs accuracy on the new one. The numbers are of one seed. If a
# budget is too small for the task, the drift oscillates around it, and the model learns little. Then use a larger
# budget or a lower rate.

# %%
rows = {'pre-trained': (anchor, np.zeros(20))}
rows |= {f'budget {budget}': run[:2] for budget, run in runs.items()}
print(f'{"":13}    new    old     KL')
for name, (params, drifts) in rows.items():
  scores = [small_model.accuracy(params, style) for style in ('striped', 'old')]
  print(f'{name:13} {scores[0]:6.1f} {scores[1]:6.1f} {np.mean(drifts[-20:]):6.2f}')
