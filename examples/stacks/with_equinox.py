"""Equinox: a module as the anchor, `eqx.filter_jit`, a run resumed from serialised leaves.

Tried with equinox 0.13.8, jax 0.10.2, optax 0.2.8:

    python -m pip install -e . equinox && python examples/stacks/with_equinox.py

The one line that changes is marked below.
"""

import pathlib
import tempfile

import checks
import equinox as eqx
import jax
import jax.numpy as jnp

import spd_optax as spd


class Net(eqx.Module):
  """Three layers in one leaf, as `jax.lax.scan` wants them, and a new head."""

  layers: eqx.nn.Linear
  head: eqx.nn.Linear

  def __init__(self, key: jax.Array):
    keys = jax.random.split(key, 4)
    self.layers = eqx.filter_vmap(lambda key: eqx.nn.Linear(8, 8, key=key))(keys[:3])
    self.head = eqx.nn.Linear(8, 3, key=keys[3])

  def __call__(self, x: jax.Array) -> jax.Array:
    return self.head(jax.lax.scan(lambda x, layer: (jnp.tanh(layer(x)), None), x, self.layers)[0])


# tx = optax.adam(1e-2)
tx = spd.adam_spd(1e-2, free='head', stack_axis={0: 'layers'})


@eqx.filter_jit
def step(model, opt_state, x, y):
  """One step; SPD needs the params, which are the arrays of the model."""
  gradients = eqx.filter_grad(lambda model: jnp.mean((jax.vmap(model)(x) - y) ** 2))(model)
  params = eqx.filter(model, eqx.is_inexact_array)
  updates, opt_state = tx.update(gradients, opt_state, params)
  return eqx.apply_updates(model, updates), opt_state


def train(model, opt_state, start, stop):
  """Steps `start` to `stop`."""
  for i in range(start, stop):
    x, y = jax.random.split(jax.random.key(i))
    x, y = jax.random.normal(x, (16, 8)), jax.random.normal(y, (16, 3))
    model, opt_state = step(model, opt_state, x, y)
  return model, opt_state


def main() -> None:
  """Trains from saved weights, once in one go and once in two."""
  mesh = checks.mesh(fsdp=4)
  folder = pathlib.Path(tempfile.mkdtemp())
  eqx.tree_serialise_leaves(folder / 'pretrained.eqx', Net(jax.random.key(0)))

  def begin():
    model = eqx.tree_deserialise_leaves(folder / 'pretrained.eqx', Net(jax.random.key(1)))
    arrays, rest = eqx.partition(model, eqx.is_inexact_array)
    arrays = checks.split(arrays, mesh)
    return eqx.combine(arrays, rest), tx.init(arrays)

  whole = train(*begin(), 0, 6)
  eqx.tree_serialise_leaves(folder / 'stopped.eqx', train(*begin(), 0, 3))
  fresh = begin()
  stopped = eqx.tree_deserialise_leaves(folder / 'stopped.eqx', fresh)
  # Equinox reads to one device: what is split is put back where a fresh start has it.
  resumed = train(*checks.put_like(stopped, fresh, mesh), 3, 6)

  checks.assert_equal(*(eqx.filter(run, eqx.is_array) for run in (resumed, whole)))
  checks.assert_anchor(whole[1], begin()[0].layers, whole[0].layers)
  names = [f'layers/{leaf}[{i}]' for leaf in ('weight', 'bias') for i in range(3)]
  checks.assert_layers(whole[1], names)


if __name__ == '__main__':
  main()
