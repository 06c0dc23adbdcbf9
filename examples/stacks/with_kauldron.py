"""Kauldron: `kd.train.Trainer` from loaded weights, resumed by its checkpointer; and by a konfig.

Tried with kauldron 1.4.2, flax 0.12.8, jax 0.10.2, optax 0.2.8:

    python -m pip install -e . kauldron && python examples/stacks/with_kauldron.py

The one line that changes is marked below, as Python and as konfig. A konfig takes no functions, so
say `free`, `stack_axis` and `group` by patterns.
"""

import json
import tempfile

import checks
import jax
import numpy as np
from flax import linen as nn
from kauldron import kd, konfig

import spd_optax as spd


class Net(nn.Module):
  """A layer and a new head."""

  x: kd.kontext.Key = 'batch.x'

  @nn.compact
  def __call__(self, x):
    return nn.Dense(3, name='head')(nn.tanh(nn.Dense(8, name='body')(x)))


class Source:
  """Random examples."""

  def __len__(self):
    return 64

  def __getitem__(self, i):
    random = np.random.default_rng(int(i))
    x, y = random.normal(size=5), random.normal(size=3)
    return {'x': np.float32(x), 'y': np.float32(y)}


class Load(kd.ckpts.InitTransform):
  """Puts weights into the state that a run begins with; a resumed run does not call it."""

  def __init__(self, params):
    self.params = params

  def transform(self, state):
    places = jax.tree.map(lambda x: x.sharding, state.params)
    return state.replace(params=jax.device_put(self.params, places))


# optimizer = optax.adam(1e-2)
optimizer = spd.adam_spd(1e-2, free='head')


def configured():
  """The same from a konfig, which was written to JSON and read again."""
  with konfig.imports():
    import spd_optax as spd
  # config = konfig.ConfigDict({'optimizer': optax.adam(1e-2)})
  config = konfig.ConfigDict({'optimizer': spd.adam_spd(1e-2, free='head')})
  read = konfig.ConfigDict(json.loads(config.to_json()))
  assert read == config
  return konfig.resolve(read)['optimizer']


def trainer(pretrained=None, folder=None, stop=None, optimizer=optimizer):
  """A trainer that saves every second step."""
  return kd.train.Trainer(
    seed=0,
    workdir=folder or tempfile.mkdtemp(),
    num_train_steps=6,
    stop_after_steps=stop,
    train_ds=kd.data.py.DataSource(
      data_source=Source(), shuffle=True, batch_size=16, num_workers=0
    ),
    model=Net(),
    train_losses={'l2': kd.losses.L2(preds='preds', targets='batch.y')},
    schedules={},
    optimizer=optimizer,
    checkpointer=kd.ckpts.Checkpointer(save_interval_steps=2),
    **({} if pretrained is None else {'init_transform': Load(pretrained)}),
  )


def main() -> None:
  """Trains from loaded weights, once in one go and once in two."""
  checks.mesh(data=4)
  random = np.random.default_rng(0)
  shapes = trainer().init_state().params
  pretrained = jax.tree.map(lambda x: np.float32(random.normal(size=x.shape)), shapes)

  whole, _ = trainer(pretrained).train()
  folder = tempfile.mkdtemp()
  trainer(pretrained, folder, stop=4).train()
  assert trainer(folder=folder).checkpointer.latest_step > 0
  resumed, _ = trainer(pretrained, folder).train()

  by_konfig, _ = trainer(pretrained, optimizer=configured()).train()

  checks.assert_equal(resumed, whole)
  checks.assert_equal(by_konfig, whole)
  checks.assert_anchor(whole.opt_state, pretrained['body'], whole.params['body'])
  checks.assert_layers(whole.opt_state, ['body/bias', 'body/kernel'])


if __name__ == '__main__':
  main()
