"""Haiku: params by module name, layers of `hk.experimental.layer_stack`, a pickled run resumed.

Tried with dm-haiku 0.0.17, jax 0.10.2, optax 0.2.8:

    python -m pip install -e . dm-haiku && python examples/stacks/with_haiku.py

The one line that changes is marked below. Haiku has no checkpoints; pickled arrays do.
"""

import pathlib
import pickle
import tempfile

import checks
import haiku as hk
import jax
import jax.numpy as jnp
import optax

import spd_optax as spd


@hk.without_apply_rng
@hk.transform
def net(x: jax.Array) -> jax.Array:
  """A layer, three in one leaf, and a new head."""
  x = jnp.tanh(hk.Linear(8, name='body')(x))
  stack = hk.experimental.layer_stack(3, name='layers')
  x = stack(lambda x: jnp.tanh(hk.Linear(8, name='fc')(x)))(x)
  return hk.Linear(3, name='head')(x)


# tx = optax.adam(1e-2)
tx = spd.adam_spd(1e-2, free='head', stack_axis={0: 'layers'})


@jax.jit
def step(params, opt_state, x, y):
  """One step."""
  gradients = jax.grad(lambda params: jnp.mean((net.apply(params, x) - y) ** 2))(params)
  updates, opt_state = tx.update(gradients, opt_state, params)
  return optax.apply_updates(params, updates), opt_state


def train(params, opt_state, start, stop):
  """Steps `start` to `stop`."""
  for i in range(start, stop):
    x, y = jax.random.split(jax.random.key(i))
    x, y = jax.random.normal(x, (16, 8)), jax.random.normal(y, (16, 3))
    params, opt_state = step(params, opt_state, x, y)
  return params, opt_state


def main() -> None:
  """Trains from saved weights, once in one go and once in two."""
  mesh = checks.mesh(fsdp=4)
  file = pathlib.Path(tempfile.mkdtemp()) / 'run.pickle'
  pretrained = jax.device_get(net.init(jax.random.key(0), jnp.ones((1, 8))))

  def begin():
    params = checks.split(pretrained, mesh)
    return params, tx.init(params)

  whole = train(*begin(), 0, 6)
  file.write_bytes(pickle.dumps(jax.device_get(train(*begin(), 0, 3))))
  stopped = pickle.loads(file.read_bytes())
  resumed = train(*checks.put_like(stopped, begin(), mesh), 3, 6)

  checks.assert_equal(resumed, whole)
  kept, trained = (dict(params) for params in (pretrained, whole[0]))
  del kept['head'], trained['head']  # it is free
  checks.assert_anchor(whole[1], kept, trained)
  scanned = [f'layers/fc/{leaf}[{i}]' for leaf in 'bw' for i in range(3)]
  checks.assert_layers(whole[1], ['body/b', 'body/w', *scanned])


if __name__ == '__main__':
  main()
