"""The methods and adapters of examples/compare.py against NumPy."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from reference import x64

import spd_optax as spd
from suite import adapters, methods

pytestmark = pytest.mark.examples

RATE, STEPS = 0.1, 4


# Adapters.


def test_adapters_change_nothing_at_first_and_then_a_b() -> None:
  """Catches B that is not 0, a product of the wrong shape or leaf, and adapted biases."""
  rng = np.random.default_rng(0)
  shapes = {'w': (6, 4), 'k': (8, 2, 4), 'b': (4,)}
  base = {'block': {name: jnp.float32(rng.normal(size=s)) for name, s in shapes.items()}}
  params = adapters.wrap(base, 2, jax.random.key(0))
  chex.assert_trees_all_equal(adapters.merge(params), base)
  assert sorted(params['adapters']) == ['block/k', 'block/w']
  assert params['adapters']['block/k']['a'].shape == (8, 2)  # 8 × 8 is the squarest matrix of it
  for adapter in params['adapters'].values():
    adapter['b'] = jnp.float32(rng.normal(size=adapter['b'].shape))
  found = adapters.merge(params)['block']
  for name in ('w', 'k'):
    a, b = (np.float64(params['adapters'][f'block/{name}'][part]) for part in 'ab')
    expected = np.float64(base['block'][name]) + (a @ b).reshape(shapes[name])
    np.testing.assert_allclose(found[name], expected, rtol=1e-5, atol=1e-6)
  chex.assert_trees_all_equal(found['b'], base['block']['b'])


def test_adapters_alone_are_trained() -> None:
  """Catches a base that the gradient, or weight decay, reaches."""
  params = adapters.wrap({'w': jnp.full((3, 3), 1 / 3)}, 1, jax.random.key(0))
  tx = adapters.alone(optax.adamw(RATE, weight_decay=0.5))
  updates, _ = tx.update(jax.tree.map(jnp.ones_like, params), tx.init(params), params)
  after = optax.apply_updates(params, updates)
  chex.assert_trees_all_equal(after['base'], params['base'])
  assert all(np.all(x) for x in jax.tree.leaves(updates['adapters']))


# Methods.


def run(tx: optax.GradientTransformation, theta: np.ndarray, gradients: np.ndarray) -> np.ndarray:
  """The weights after a step with each gradient, in float64."""
  with x64():
    params = {'w': jnp.asarray(theta)}

    def step(carry: Any, gradient: Any) -> Any:
      updates, state = tx.update({'w': gradient}, carry[1], carry[0])
      return (optax.apply_updates(carry[0], updates), state), None

    start = params, tx.init(params)
    return np.asarray(jax.jit(lambda: jax.lax.scan(step, start, gradients)[0][0]['w'])())


def by_hand(
  theta: np.ndarray, gradients: np.ndarray, before: Any = None, beside: Any = None
) -> Any:
  """Adam with optax's constants: `before`(g, θ) is what it sees, `beside`(u, θ) joins its step."""
  m = v = np.zeros_like(theta)
  for t, g in enumerate(gradients, 1):
    g = g if before is None else before(g, theta)
    m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
    u = (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
    theta = theta - RATE * (u if beside is None else u + beside(u, theta))
  return theta


def some() -> tuple[np.ndarray, np.ndarray]:
  """Weights of either sign, and gradients that turn; the first is 0 throughout."""
  rng = np.random.default_rng(3)
  gradients = rng.normal(size=(STEPS, 6)) * [0, 1, 1, 1, 1, 1] + np.array(
    [[1], [1], [-2], [-1]]
  ) * [*(0, 1, 1, 1, 1, 1)]
  return np.array([0.7, -0.5, 0.4, -0.9, 0.3, 0.8]), gradients


def test_cautious_decay_by_hand() -> None:
  """Catches the wrong sign of the step, and no decay where the step is 0 (x u ≥ 0)."""
  theta, gradients = some()
  found = run(methods.cautious(RATE, None, 0.3), theta, gradients)
  expected = by_hand(theta, gradients, beside=lambda u, p: 0.3 * p * (u * p >= 0))
  np.testing.assert_allclose(found, expected, rtol=1e-12)
  assert abs(found[0]) < abs(theta[0])
  assert np.any(np.abs(found - by_hand(theta, gradients, beside=lambda u, p: 0.3 * p)) > 1e-3)


def test_both_places_of_l2_sp_by_hand() -> None:
  """Catches the two taken for one another, and a decay toward 0."""
  theta, gradients = some()
  for method, place in ((methods.l2_sp, 'before'), (methods.decoupled_l2_sp, 'beside')):
    join = {
      'before': lambda g, p: g + 0.5 * (p - theta),
      'beside': lambda u, p: 0.5 * (p - theta),
    }
    expected = by_hand(theta, gradients, **{place: join[place]})
    np.testing.assert_allclose(run(method(RATE, None, 0.5), theta, gradients), expected, rtol=1e-11)


def test_digrap_by_hand() -> None:
  """Catches a homeward gradient that is changed, and a projection on the wrong side."""
  theta, gradients = some()
  seen = []

  def projected(g: np.ndarray, p: np.ndarray) -> np.ndarray:
    d = p - theta
    seen.append(np.dot(g, d))
    return g - 0.7 * (np.dot(g, d) / np.dot(d, d)) * d if np.dot(g, d) < 0 else g

  expected = by_hand(theta, gradients, before=projected)
  assert min(seen) < 0 < max(seen)
  found = run(methods.digrap(RATE, None, 0.7), theta, gradients)
  np.testing.assert_allclose(found, expected, rtol=1e-11)


def free(blocks: tuple[str, ...], share: float, params: Any, updates: int = 1) -> list[str]:
  """The leaves that `thaw` lets move in the last of so many updates."""
  tx = methods.thaw(blocks, share, 2)
  state = tx.init(params)
  for _ in range(updates):
    found, state = tx.update(params, state, params)
  leaves = jax.tree.leaves_with_path(found)
  return [jax.tree_util.keystr(path, simple=True, separator='/') for path, x in leaves if x]


def test_thaw_frees_the_last_blocks_of_nested_params() -> None:
  """Catches a head that is frozen with the others, blocks found by part of a name, and no thaw."""
  blocks = ('embedding', 'block_0', 'block_1', 'head')
  one = jnp.ones([])
  paths = ['block_0/attention/out', 'block_1/head_norm', 'embedding/table', 'head/bias']
  plain: dict[str, Any] = {}
  for path in paths:
    at = plain
    *parents, last = path.split('/')
    for name in parents:
      at = at.setdefault(name, {})
    at[last] = one
  wrapped = {'adapters': {path: {'a': one} for path in paths}, 'base': optax.MaskedNode()}
  for params, shape in ((plain, '{}'), (wrapped, 'adapters/{}/a')):
    last = [shape.format(path) for path in ('block_1/head_norm', 'head/bias')]
    assert free(blocks, 0.5, params) == last
    assert free(blocks, methods.HEAD, params) == last[1:]
    assert free(blocks, methods.HEAD, params, updates=2) == last[1:]
    assert len(free(blocks, methods.HEAD, params, updates=3)) == 4
  for n in range(2, 8):
    names = tuple(f'part_{i}' for i in range(n))
    assert free(names, methods.HEAD, dict.fromkeys(names, one)) == [names[-1]]


def test_spd_is_the_librarys() -> None:
  """Catches strength and margin that are swapped, and another optimizer inside."""
  theta, gradients = some()
  for strength, margin in ((1.0, 0.05), (0.3, 0.0)):
    pairs = (
      (methods.around(methods.adam), spd.adam_spd(RATE, strength=strength, margin=margin)),
      (
        methods.chained,
        optax.chain(spd.projection_decay(None, strength, margin=margin), optax.adam(RATE)),
      ),
    )
    for make, expected in pairs:
      found = run(make(RATE, None, strength, margin), theta, gradients)
      np.testing.assert_array_equal(found, run(expected, theta, gradients))
