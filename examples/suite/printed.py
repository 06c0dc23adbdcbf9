"""A task on a ViT of millions of weights that is pre-trained here, on printed letters."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from suite import classifiers, models, packages
from suite.efficientnet import LETTERS, load
from suite.tasks import Data, Stage, Task, cosine, together

PRINTED = ('serif', 'monospaced', 'poster')
EACH = 100  # pictures to pre-train on, of each letter in upper and in lower case and of each kind
WIDTH = 256


class ViT(nn.Module):
  """Pictures [n, 64, 64] of 0 to 255 -> logits float32[n, LETTERS]; convolutions make 16 tokens.

  It learns faster than from patches.
  """

  depth: int

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    x = x[..., None].astype(jnp.float32) / 128 - 1
    for i, width in enumerate((16, 32, 128, WIDTH)):
      x = nn.relu(nn.Dense(width, name=f'stem_{i}')(models.neighbours(x)))
    x = x.reshape(len(x), -1, WIDTH)
    x = x + self.param('position', nn.initializers.normal(0.02), x.shape[1:])
    for i in range(self.depth):
      x = models.Block(name=f'block_{i}')(x, None)
    return nn.Dense(LETTERS, name='head')(nn.LayerNorm(name='norm')(x.mean(1)))


def printed() -> Data:
  """Printed letters to pre-train on; those in `letters.npz` are others of the same fonts."""

  def build() -> dict[str, np.ndarray]:
    from suite import letters  # needs Pillow

    seeds = enumerate(PRINTED, len(letters.FONTS))  # build() in letters.py has those before
    pictures, labels = together(*(letters.alphabet(kind, seed, EACH) for seed, kind in seeds))
    return {'pictures': pictures, 'labels': labels}

  arrays = packages.cached('printed', build)
  return arrays['pictures'], arrays['labels']


def letters_vit(depth: int = 6) -> Task:
  """A ViT that knows printed letters learns handwriting."""
  sets, old, module = load(), printed(), ViT(depth)

  return Task(
    title='letters: printed → handwriting (ViT of 3.5 million weights, trained here)',
    init=classifiers.initializer(module, old[0]),
    loss=classifiers.cross_entropy(module),
    score=classifiers.accuracy(module),
    old=old,
    stages=(Stage(sets['pool'], sets['test']),),
    ood={kind: sets[kind] for kind in PRINTED},
    blocks=(
      *(f'stem_{i}' for i in range(4)),
      'position',
      *(f'block_{i}' for i in range(depth)),
      *('norm', 'head'),
    ),
    pretrain_steps=400,
    pretrain_rate=1e-3,
    shots=416,
    logits=classifiers.outputs(module),
    pace=cosine(),
    rates=(3e-5, 1e-4, 3e-4, 1e-3),
    by_layer=True,
  )
