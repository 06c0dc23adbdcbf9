"""Keras 3 on JAX: an optax transformation in `model.fit`, restored from saved weights.

Tried with keras 3.15.1, jax 0.10.2, optax 0.2.8:

    python -m pip install -e . keras h5py && python examples/stacks/with_keras.py

The one line that changes is in `compiled`. Copy the class `Optax` into your code. Name the model:
otherwise its paths begin with a name that Keras counts up.
"""

import os
import pathlib
import tempfile

os.environ['KERAS_BACKEND'] = 'jax'

import checks
import jax
import keras
import numpy as np
import optax

import spd_optax as spd


class Optax(keras.optimizers.Optimizer):
  """Runs an optax transformation in `fit`. Paths are those of the variables."""

  def __init__(self, tx: optax.GradientTransformation, name: str = 'optax', **options):
    super().__init__(learning_rate=0.0, name=name, **options)
    self.tx = tx

  def build(self, variables):
    if self.built:
      return
    super().build(variables)
    leaves, self.treedef = jax.tree.flatten(self.tx.init({v.path: v.value for v in variables}))
    self.slots = []
    for i, leaf in enumerate(leaves):
      # The anchor and the moments are split as the variables are.
      where = leaf.sharding if isinstance(leaf.sharding, jax.NamedSharding) else None
      kind = {'dtype': str(leaf.dtype), 'trainable': False, 'name': f'slot_{i}'}
      self.slots.append(keras.Variable(leaf, layout=where, **kind))
      self._track_variable(self.slots[-1])  # so that Keras saves it

  @property
  def state(self) -> optax.OptState:
    """The optimizer state, for `spd.layer_report`."""
    return jax.tree.unflatten(self.treedef, [slot.value for slot in self.slots])

  def _backend_update_step(self, grads, trainable_variables, learning_rate):
    paths = [v.path for v in trainable_variables]
    params = dict(zip(paths, (v.value for v in trainable_variables), strict=True))
    gradients = dict(zip(paths, grads, strict=True))
    updates, state = self.tx.update(gradients, self.state, params)
    for variable in trainable_variables:
      variable.assign(params[variable.path] + updates[variable.path])
    for slot, leaf in zip(self.slots, jax.tree.leaves(state), strict=True):
      slot.assign(leaf)


def compiled(model: keras.Model) -> keras.Model:
  """The model with its optimizer, and the optimizer's variables made from its weights."""
  # model.compile('adam', 'mse')
  model.compile(Optax(spd.adam_spd(1e-2, free='head')), 'mse')
  model.optimizer.build(model.trainable_variables)
  return model


def main() -> None:
  """Trains from a saved model, once in one go and once in two."""
  axes = checks.mesh(batch=1, fsdp=4)
  devices = keras.distribution.DeviceMesh((1, 4), ('batch', 'fsdp'), axes.devices)
  layout = keras.distribution.LayoutMap(devices)
  layout['.*kernel'] = (None, 'fsdp')
  keras.distribution.set_distribution(
    keras.distribution.ModelParallel(layout_map=layout, batch_dim_name='batch')
  )
  folder = pathlib.Path(tempfile.mkdtemp())
  layers = [keras.Input((6,)), keras.layers.BatchNormalization(name='norm')]
  layers += [keras.layers.Dense(8, 'tanh', name='body'), keras.layers.Dense(4, name='head')]
  first = keras.Sequential(layers, name='net')
  first.save(folder / 'pretrained.keras')
  random = np.random.default_rng(0)
  x, y = random.normal(size=(64, 6)), random.normal(size=(64, 4))

  def begin() -> keras.Model:
    return compiled(keras.saving.load_model(folder / 'pretrained.keras', compile=False))

  def fit(model: keras.Model, start: int, stop: int) -> keras.Model:
    model.fit(x, y, 16, initial_epoch=start, epochs=stop, shuffle=False, verbose=0)
    return model

  whole = fit(begin(), 0, 4)
  fit(begin(), 0, 2).save_weights(folder / 'stopped.weights.h5')  # the optimizer's too
  stopped = begin()
  stopped.load_weights(folder / 'stopped.weights.h5')
  resumed = fit(stopped, 2, 4)

  runs = ([*model.variables, *model.optimizer.variables] for model in (resumed, whole))
  checks.assert_equal(*([variable.value for variable in run] for run in runs))
  assert int(whole.optimizer.iterations) == 16
  weights = (model.trainable_variables[:-2] for model in (first, whole))  # without the head
  held = [{variable.path: variable.value for variable in run} for run in weights]
  checks.assert_anchor(whole.optimizer.state, *held)
  layers = ['body/bias', 'body/kernel', 'norm/beta', 'norm/gamma']
  checks.assert_layers(whole.optimizer.state, layers)


if __name__ == '__main__':
  main()
