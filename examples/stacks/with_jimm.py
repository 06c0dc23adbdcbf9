"""jimm (jax-image-models): a ViT from a directory of safetensors, resumed by Orbax.

Tried with jax-image-models 0.4.0, flax 0.12.8, jax 0.10.2, optax 0.2.8, orbax-checkpoint 0.12.8:

    python -m pip install -e . jax-image-models huggingface_hub
    python examples/stacks/with_jimm.py

The one line that changes is in `begin`. jimm stacks the blocks of its encoder on axis 0. It reads
no checkpoint into another number of classes, so a new head is put in after loading.
"""

import pathlib
import tempfile

import checks
import jax
import jax.numpy as jnp
import jimm
import optax
from flax import nnx
from orbax import checkpoint as ocp

import spd_optax as spd

SIZES = {'img_size': 8, 'patch_size': 4, 'num_layers': 2, 'num_heads': 2}
SIZES |= {'mlp_dim': 16, 'hidden_size': 8, 'dropout_rate': 0.0}


@nnx.jit
def step(model, optimizer, x, y):
  """One step."""

  def loss(model):
    return optax.softmax_cross_entropy_with_integer_labels(model(x), y).mean()

  optimizer.update(model, nnx.grad(loss)(model))


def train(model, optimizer, start, stop):
  """Steps `start` to `stop`."""
  for i in range(start, stop):
    x = jax.random.normal(jax.random.key(i), (4, 8, 8, 3))
    step(model, optimizer, x, jnp.arange(4) % 3)
  return model, optimizer


def main() -> None:
  """Trains from a saved model, once in one go and once in two."""
  jax.set_mesh(checks.mesh(data=1, fsdp=4))  # jimm splits the params over these axes
  folder = pathlib.Path(tempfile.mkdtemp())
  jimm.VisionTransformer(**SIZES, rngs=nnx.Rngs(0)).save_pretrained(str(folder / 'vit'))

  def begin():
    model = jimm.VisionTransformer.from_pretrained(str(folder / 'vit'))
    model.classifier = nnx.Linear(8, 3, rngs=nnx.Rngs(1))
    # tx = optax.adam(1e-2)
    tx = spd.adam_spd(1e-2, free='classifier', stack_axis={0: 'layers'})
    return model, nnx.Optimizer(model, tx, wrt=nnx.Param)

  whole = train(*begin(), 0, 6)
  with ocp.StandardCheckpointer() as writer:
    writer.save(folder / 'stopped', nnx.state(train(*begin(), 0, 3)))
  resumed = begin()
  with ocp.StandardCheckpointer() as reader:
    nnx.update(resumed, reader.restore(folder / 'stopped', nnx.state(resumed)))
  train(*resumed, 3, 6)

  checks.assert_equal(nnx.state(resumed), nnx.state(whole))
  pretrained, trained = (nnx.state(model.encoder, nnx.Param) for model in (begin()[0], whole[0]))
  checks.assert_anchor(whole[1].opt_state, pretrained, trained)
  names = [record.name for record in spd.layer_report(whole[1].opt_state)]
  assert {f'encoder/layers/mlp/layers/0/kernel[{i}]' for i in range(2)} <= set(names), names
  assert not any('classifier' in name for name in names)


if __name__ == '__main__':
  main()
