"""The peers of examples/compare.py against NumPy, all settings at once as the suite runs them."""

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from reference import x64

import training
from suite import jobs, methods, peers

pytestmark = pytest.mark.examples

RATES, STEPS = (0.03, 0.001), 12
SHAPES = {'kernel': (3, 4), 'heads': (2, 3, 5), 'bias': (4,)}

Leaves = dict[str, np.ndarray]


ONE_TURN = np.repeat([1.0, -1.5], STEPS // 2)
MANY_TURNS = np.array([1, 1, 1, 1, -1, 1, -1, 1, -1, 1, -1, 1])


def some(way: np.ndarray) -> tuple[Leaves, Leaves]:
  """Weights, and gradients that go so far one way in each step; one weight's are all 0."""
  rng = np.random.default_rng(3)
  theta = {name: rng.normal(size=shape) for name, shape in SHAPES.items()}
  gradients = {}
  for name, x in theta.items():
    ways = way.reshape(-1, *[1] * x.ndim) * rng.normal(size=x.shape)
    gradients[name] = ways + 0.4 * rng.normal(size=(STEPS, *x.shape))
  gradients['bias'][:, 0] = 0
  return theta, gradients


def run(method: Any, cases: list[jobs.Case], theta: Leaves, gradients: Leaves) -> Leaves:
  """The weights of each case after a step with each gradient, in float64."""
  with x64():
    make = methods.Method(method)
    optimizer = jobs.injected(SimpleNamespace(blocks=tuple(SHAPES)), make, cases[0])
    params = jax.tree.map(lambda x: jnp.stack([jnp.asarray(x)] * len(cases)), theta)
    state = jobs.with_numbers(jax.vmap(optimizer.init)(params), cases)

    def step(carry: Any, gradient: Any) -> Any:
      updates, state = optimizer.update(gradient, carry[1], carry[0])
      return (optax.apply_updates(carry[0], updates), state), None

    def one(params: Any, state: Any) -> Any:
      return jax.lax.scan(step, (params, state), gradients)[0][0]

    return jax.tree.map(np.asarray, jax.jit(jax.vmap(one))(params, state))


def check(method: Any, name: str, values: tuple[float, ...], by_hand: Any, data: Any) -> None:
  """Every layer of every case, alone, is what `by_hand` makes of it."""
  cases = [jobs.Case({name: x}, rate, 0) for x in values for rate in RATES]
  found = run(method, cases, *data)
  theta, gradients = data
  for layer in SHAPES:
    for i, case in enumerate(cases):
      expected = by_hand(theta[layer], gradients[layer], case.rate, case.setting[name])
      np.testing.assert_allclose(found[layer][i], expected, rtol=1e-10, err_msg=f'{layer} {case}')


def adam() -> Callable[[Any], Any]:
  """Adam's direction for one gradient after the other."""
  m = v = t = 0

  def step(g: Any) -> Any:
    nonlocal m, v, t
    m, v, t = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2, t + 1
    return (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)

  return step


def each_row(x: np.ndarray) -> Iterator[tuple[Any, ...]]:
  """Where the rows are: the columns of x along its last axis; a vector is one."""
  if x.ndim == 1:
    yield (...,)
  else:
    yield from ((..., i) for i in range(x.shape[-1]))


def test_ftp_by_hand() -> None:
  """Catches wrong rows, norm, clips and k, γ learned from g_{t−1}, and its wrong count of steps."""
  seen = set()

  def by_hand(theta: np.ndarray, gradients: np.ndarray, rate: float, k: float) -> np.ndarray:
    weights, direction = theta.copy(), adam()
    gamma = 1e-8
    mean = square = 0.0
    c, norms = np.zeros_like(theta), {}
    for t, g in enumerate(gradients, 1):
      before, norms_before = c, norms
      c = weights - rate * direction(g) - theta
      norms = {at: np.abs(c[at]).sum() + 1e-8 for at in each_row(c)}
      if t > 1:
        h = sum(np.sum(g[at] * before[at]) / norms_before[at] for at in each_row(c))
        seen.add('outward' if h < 0 else 'homeward')
        h = h if h < 0 else k * h
        mean, square = 0.9 * mean + 0.1 * h, 0.999 * square + 0.001 * h**2
        step = mean / (1 - 0.9**t) / (np.sqrt(square / (1 - 0.999**t)) + 1e-8)
        gamma -= 0.01 * step
        seen.add('least' if gamma < 1e-8 else 'most' if gamma > max(norms.values()) else 'between')
        gamma = min(max(gamma, 1e-8), max(norms.values()))
      for at in each_row(c):
        seen.add('free' if gamma >= norms[at] else 'held')
        weights[at] = theta[at] + min(gamma / norms[at], 1) * c[at]
    return weights

  check(peers.ftp, 'k', (1.0, 0.2), by_hand, some(ONE_TURN))
  assert seen == {'outward', 'homeward', 'least', 'most', 'between', 'free', 'held'}


def test_digrap_by_hand() -> None:
  """Catches a homeward gradient that is changed, a wrong sign or clip of ω, and other rows."""
  seen = set()

  def by_hand(theta: np.ndarray, gradients: np.ndarray, rate: float, mu: float) -> np.ndarray:
    weights, direction, learn = theta.copy(), adam(), adam()
    omega, before = 0.0, np.zeros_like(theta)
    for g in gradients:
      d = weights - theta
      inner = np.sum(g * d)
      h = 0.0
      for at in each_row(g):
        lengths = np.linalg.norm(g[at]) * np.linalg.norm(before[at])
        h += np.sum(g[at] * before[at]) / lengths if lengths else 0
      omega -= mu * learn(h)
      seen.add('least' if omega < 0 else 'most' if omega > 1 else 'between')
      omega = min(max(omega, 0), 1)
      before = inner / np.sum(d**2) * d if d.any() else np.zeros_like(d)
      if inner < 0 < omega:
        seen.add('projected')
        g = g - omega * before
      weights -= rate * direction(g)
    return weights

  check(peers.digrap, 'rate', (0.05, 0.8), by_hand, some(MANY_TURNS))
  assert seen == {'least', 'most', 'between', 'projected'}


def test_cautious_decay_to_the_start_by_hand() -> None:
  """Catches decay toward 0, one condition for a layer, and decay where the step leads away."""
  seen = set()

  def by_hand(theta: np.ndarray, gradients: np.ndarray, rate: float, decay: float) -> np.ndarray:
    weights, direction = theta.copy(), adam()
    for g in gradients:
      u, d = direction(g), weights - theta
      seen.update(np.sign(u * d).ravel())
      weights = weights - rate * (u + np.where(u * d < 0, 0, decay * d))
    return weights

  check(peers.cautious_to_start, 'decay', (0.5, 0.0, 3.0), by_hand, some(ONE_TURN))
  assert seen == {-1, 0, 1}


def softmax(z: np.ndarray) -> np.ndarray:
  e = np.exp(z - z.max(-1, keepdims=True))
  return e / e.sum(-1, keepdims=True)


def linear(rng: np.random.Generator) -> tuple[Any, Any, Any]:
  """Inputs [n, tokens, features], labels, and a linear model's logits."""
  batch = rng.normal(size=(6, 2, 3)), rng.integers(4, size=(6, 2))
  return *batch, lambda params, batch: batch[0] @ params['w']


def cross_entropy(logits: Any) -> Any:
  def loss(params: Any, batch: Any) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits(params, batch), batch[1]).mean()

  return loss


def test_kl_to_the_base_by_hand() -> None:
  """Catches the other direction of the KL, a sum for the mean, and a gradient into base or κ."""
  rng = np.random.default_rng(0)
  x, y, logits = linear(rng)
  w, base, strength = rng.normal(size=(3, 4)), rng.normal(size=(3, 4)), 0.7
  p, q = softmax(x @ base), softmax(x @ w)
  kl = np.mean(np.sum(p * np.log(p / q), -1))
  own = -np.mean(np.log(np.take_along_axis(q, y[..., None], -1)))
  with x64():
    total = peers.with_base(cross_entropy(logits), logits)
    params = {'model': {'w': jnp.asarray(w)}, 'base': {'w': jnp.asarray(base)}}
    both = jax.value_and_grad(total)({**params, 'kl': jnp.asarray(strength)}, (x, y))
    value, gradient = jax.tree.map(np.asarray, both)
  np.testing.assert_allclose(value, own + strength * kl, rtol=1e-10)
  expected = np.einsum('nti,ntj->ij', x, q - np.eye(4)[y] + strength * (q - p)) / y.size
  np.testing.assert_allclose(gradient['model']['w'], expected, rtol=1e-9)
  assert not np.any(gradient['base']['w'])
  assert gradient['kl'] == 0


def test_the_model_alone_is_trained_with_each_strength() -> None:
  """Catches a base or κ that decays or moves, and a strength for all."""
  rng = np.random.default_rng(1)
  x, y, logits = linear(rng)
  start, strengths, decay = rng.normal(size=(3, 4)), np.array([0.0, 1.0, 8.0]), 0.1
  order = np.stack([rng.integers(6, size=(STEPS, 2))] * 3)
  with x64():
    base = {'w': jnp.stack([jnp.asarray(start)] * 3)}
    params = {'model': jax.tree.map(jnp.copy, base), 'base': base, 'kl': jnp.asarray(strengths)}
    optimizer = peers.model_alone(
      optax.chain(optax.add_decayed_weights(decay), optax.sgd(RATES[0], momentum=0.5))
    )
    state = jax.vmap(optimizer.init)(params)
    total = peers.with_base(cross_entropy(logits), logits)
    found, _ = training.train(total, optimizer, params, (x, y), order, state=state)
  np.testing.assert_array_equal(found['base']['w'], np.stack([start] * 3))
  np.testing.assert_array_equal(found['kl'], strengths)
  for i, strength in enumerate(strengths):
    w, trace = start, 0
    for at in order[i]:
      p, q = softmax(x[at] @ start), softmax(x[at] @ w)
      pull = q - np.eye(4)[y[at]] + strength * (q - p)
      trace = np.einsum('nti,ntj->ij', x[at], pull) / pull[..., 0].size + decay * w + 0.5 * trace
      w = w - RATES[0] * trace
    np.testing.assert_allclose(found['model']['w'][i], w, rtol=1e-9)
