"""A training run that may be killed at any time and started again: `killed_run.py FOLDER STEPS`.

It prints each step that it has done, and at the end writes everything to FOLDER/final.npz.
"""

import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from orbax.checkpoint import v1 as ocp

import spd_optax as spd

EVERY = 4  # steps from one checkpoint to the next


class Model(nn.Module):
  """Two layers."""

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    return nn.Dense(2, use_bias=False)(nn.tanh(nn.Dense(8, use_bias=False)(x)))


def batch_at(position: int) -> tuple[np.ndarray, np.ndarray]:
  """The batch at a position of the data."""
  rng = np.random.default_rng(position)
  return rng.standard_normal((8, 4), np.float32), rng.standard_normal((8, 2), np.float32)


def start() -> Any:
  """The optimizer, the pre-trained params, and the jitted step."""
  model = Model()
  shapes = jax.eval_shape(model.init, jax.random.key(0), batch_at(0)[0])
  rng = np.random.default_rng(0)
  pretrained = jax.tree.map(lambda x: rng.standard_normal(x.shape, np.float32), shapes)
  tx = spd.adam_spd(0.1, pretrained)

  def loss(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.mean((model.apply(params, x) - y) ** 2)

  @jax.jit
  def step(params: Any, state: Any, batch: Any) -> Any:
    value, gradients = jax.value_and_grad(loss)(params, *batch)
    updates, state = tx.update(gradients, state, params)
    return optax.apply_updates(params, updates), state, value

  return tx, pretrained, step


def restored(checkpoints: Any, tx: Any, pretrained: Any) -> tuple[Any, Any, int]:
  """Params, state and data position of the last checkpoint, or of the start."""
  if checkpoints.latest is None:
    params = jax.tree.map(jnp.array, pretrained)
    return params, tx.init(params), 0
  slim = jax.eval_shape(lambda params: spd.drop_anchor(tx.init(params)), pretrained)
  target = {'params': pretrained, 'state': slim, 'position': 0}
  loaded = checkpoints.load(checkpoints.latest.step, jax.tree.map(abstract, target))
  params = jax.tree.map(jnp.array, loaded['params'])
  return params, spd.put_anchor(loaded['state'], pretrained), int(loaded['position'])


def abstract(leaf: Any) -> Any:
  return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) if hasattr(leaf, 'shape') else leaf


def train(folder: Path, steps: int) -> tuple[Any, Any]:
  tx, pretrained, step = start()
  log = spd.AuditLog(folder / 'run.jsonl', transform='adam_spd', source='the first batch')
  with ocp.training.Checkpointer(folder / 'checkpoints') as checkpoints, log:
    params, state, first = restored(checkpoints, tx, pretrained)
    for position in range(first, steps):
      params, state, loss = step(params, state, batch_at(position))
      log.record(position, state, {'loss': loss})
      if (position + 1) % EVERY == 0:
        log.flush()  # the run may go on from here: no record may be missing
        saved = {'params': params, 'state': spd.drop_anchor(state), 'position': position + 1}
        checkpoints.save(position + 1, saved)
      print(position, flush=True)
  return params, state


if __name__ == '__main__':
  found = train(Path(sys.argv[1]), int(sys.argv[2]))
  np.savez(Path(sys.argv[1]) / 'final.npz', *jax.tree.leaves(found))
