"""States to log, and a log of them; shared by the tests of the audit."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

import spd_optax as spd
from spd_optax.audit import __main__ as command
from spd_optax.layers import layer_key

PARAMS = {'kernel': jnp.ones((2, 3)), 'bias': jnp.zeros(3)}
TX = spd.with_projection_decay(optax.sgd(0.1, momentum=0.9))
FACTS = {'transform': 'with_projection_decay', 'hyperparameters': {'lr': 0.1}, 'source': 'ones'}


@functools.cache
def compiled(tx):
  return jax.jit(tx.update)


def states(count, tx=TX, params=PARAMS, gradient=lambda i: (1.0, 1.0, -0.2)[i % 3]):
  """The state after each of so many steps."""
  state, step = tx.init(params), compiled(tx)
  for i in range(count):
    gradients = jax.tree.map(lambda p, i=i: jnp.full_like(p, gradient(i)), params)
    updates, state = step(gradients, state, params)
    params = optax.apply_updates(params, updates)
    yield state


def write(path, count=5, **facts):
  """A log of so many records."""
  with spd.AuditLog(path, **{**FACTS, **facts}) as log:
    for step, state in enumerate(states(count)):
      log.record(step, state, {'loss': 1 / (step + 1)})
  return path


def names(count):
  """Layers as a transformer has them."""
  parts = ('attention/query/kernel', 'attention/query/bias', 'mlp/kernel', 'mlp/bias')
  found = [f'encoder/layer/{i}/{part}' for i in range(count // 4) for part in parts]
  return [*found, *(f'head/{i}' for i in range(count - len(found)))]


def made_up(path, layers, steps=30, seed=0, numbers=(), metrics=(), **facts):
  """A log of states that were made up: layer i is held with a probability that grows with i.

  `numbers` are names of numbers of the rule; the k-th is k + step / 100 + i for layer i.
  """
  rng = np.random.default_rng(seed)
  anchor = {name: np.full(4, i % 3, np.float32) for i, name in enumerate(layers)}
  constrained = np.zeros(len(layers), np.int32)
  facts = {'transform': 'adam_spd', 'hyperparameters': {'lr': 1e-3}, 'source': 'x', **facts}
  with spd.AuditLog(path, **facts) as log:
    for step in range(1, steps + 1):
      held = rng.random(len(layers)) < np.linspace(0, 0.9, len(layers)) * (step > 1)
      constrained = constrained + held
      far = np.linspace(0.5, 2, len(layers), dtype=np.float32) * np.sqrt(np.float32(step - 1))
      columns = held, rng.random(len(layers), np.float32), far, constrained.astype(np.int32)
      named = [by_key(layers, column) for column in columns]
      every_fifth = {'OOD accuracy': 0.9 - step / 100} if step % 5 == 0 else {}
      shown = {'loss': 1 / step, **every_fifth, **dict(metrics)}
      own = {
        name: by_key(layers, np.float32(np.arange(len(layers)) + k + step / 100))
        for k, name in enumerate(numbers)
      }
      log.record(step, spd.ProjectionDecayState(np.int32(step), anchor, *named, own), shown)
  return path


def by_key(layers, column):
  """Values by the keys of these layers in a state."""
  return dict(zip(map(layer_key, layers), column, strict=True))


def run(*arguments):
  """Runs the command in this process."""
  return command.main([str(argument) for argument in arguments])
