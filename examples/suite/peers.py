"""More methods to compare with: their strength is learned, per weight, or on what the model says.

In the equations g is the gradient and u Adam's step, by which an optimizer subtracts α u. Further,
d = θ − θ_0, with θ_0 the weights at `init`. A layer is a leaf of the params. A row is what one
output unit sees: a kernel's numbers along all axes but the last. A vector is one row.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from suite.methods import Scalar
from suite.tasks import Data, Params

Loss = Callable[[Params, Data], jax.Array]

FTP_RATE = 1e-2  # μ of FTP
LEAST = 1e-8  # FTP's first and smallest γ, and what it adds to norms


class Learned(NamedTuple):
  """State of `ftp` and `digrap`, which learn one number for each layer.

  Attributes:
    start: θ_0.
    slope: what the next gradient is held against to learn the number: the rows c / n of `ftp`,
      p / ‖p‖ of `digrap`. It is 0 at first, so that the first step leaves the number as it is.
    number: γ or ω of each layer.
    adam: state of the Adam that trains the weights.
    learner: state of the Adam that trains the numbers.
  """

  start: Params
  slope: Params
  number: Any
  adam: Any
  learner: Any


def learning(
  adam: optax.GradientTransformation, learner: optax.GradientTransformation, first: float
) -> Callable[[Params], Learned]:
  """The `init` of an optimizer whose numbers are `first`."""

  def init(params: Params) -> Learned:
    numbers = jax.tree.map(lambda p: jnp.full([], first, p.dtype), params)
    start, slope = jax.tree.map(jnp.copy, params), jax.tree.map(jnp.zeros_like, params)
    return Learned(start, slope, numbers, adam.init(params), learner.init(numbers))

  return init


def rows(x: jax.Array) -> jax.Array:
  """The sum of each row, with as many axes as x."""
  return jnp.sum(x, tuple(range(x.ndim - 1)) if x.ndim > 1 else None, keepdims=True)


def ftp(learning_rate: Scalar, blocks: Any, k: Scalar) -> optax.GradientTransformation:
  """Fast Trainable Projection around Adam: rows end within a distance that their layer learns.

      c_t = θ_{t−1} − α u_t − θ_0          n_t = ‖c_t‖_1 + 1e−8 of each row (MARS norm)
      h_t = Σ_rows ⟨g_t, c_{t−1}⟩ / n_{t−1}           and k h_t where that is positive
      γ_t = clip(γ_{t−1} − Adam(h_t; μ), 1e−8, max_rows n_t)             γ_1 = 1e−8
      θ_t = θ_0 + min(γ_t / n_t, 1) c_t

  So each layer has one γ, and each of its rows a norm. The constants are those of the official
  code: μ = 0.01, β = (0.9, 0.999), ε = 1e−8, and a bias correction that counts from the first
  step, though γ is first learned in the second. Its k is 1, the strongest of [0, 1]: a smaller
  one slows down how γ shrinks. All layers are projected, since all are pre-trained.

  Tian, Liu, Smith and Kira, Fast Trainable Projection for Robust Fine-Tuning, 2023,
  https://arxiv.org/abs/2310.19182; code: https://github.com/GT-RIPL/FTP.
  """
  adam, learner = optax.adam(learning_rate), optax.adam(FTP_RATE)

  def hypergradient(g: jax.Array, slope: jax.Array) -> jax.Array:
    h = jnp.sum(g * slope)
    return jnp.where(h > 0, k * h, h)

  def update(gradients: Any, state: Learned, params: Any = None) -> tuple[Any, Learned]:
    steps, inner = adam.update(gradients, state.adam, params)
    moved = jax.tree.map(lambda p, u, start: p + u - start, params, steps, state.start)
    norms = jax.tree.map(lambda c: rows(jnp.abs(c)) + LEAST, moved)
    changes, outer = learner.update(
      jax.tree.map(hypergradient, gradients, state.slope), state.learner
    )
    gamma = jax.tree.map(
      lambda y, change, n: jnp.clip(y + change, LEAST, jnp.max(n)), state.number, changes, norms
    )
    updates = jax.tree.map(
      lambda p, start, c, n, y: start + jnp.minimum(y / n, 1) * c - p,
      *(params, state.start, moved, norms, gamma),
    )
    slope = jax.tree.map(jnp.divide, moved, norms)
    return updates, Learned(state.start, slope, gamma, inner, outer)

  return optax.GradientTransformation(learning(adam, learner, LEAST), update)


def digrap(learning_rate: Scalar, blocks: Any, rate: Scalar) -> optax.GradientTransformation:
  """DiGraP in front of Adam: each layer learns the share of the outward gradient that goes.

      p_t = ⟨g_t, d_t⟩ / ‖d_t‖² d_t
      h_t = Σ_rows ⟨g_t, p_{t−1}⟩ / (‖g_t‖ ‖p_{t−1}‖)
      ω_t = clip(ω_{t−1} − Adam(h_t; μ), 0, 1)                           ω_1 = 0
      g'_t = g_t − ω_t p_t     where ⟨g_t, d_t⟩ < 0, else g_t

  The rate μ of ω is swept. Its Adam has β = (0.9, 0.999) and ε = 1e−8, and counts from the first
  step. The paper's Algorithm 1 normalizes the hypergradient α ⟨g_t, p_{t−1}⟩; it is done row by
  row as in the authors' earlier code, and α cancels. `methods.digrap` has a fixed share instead.

  Huang, Tian, et al., Directional Gradient Projection for Robust Fine-Tuning of Foundation
  Models, 2025, https://arxiv.org/abs/2502.15895; earlier code:
  https://github.com/chengyuehuang511/vlm_robustness.
  """
  adam, learner = optax.adam(learning_rate), optax.adam(rate)

  def units(x: jax.Array) -> jax.Array:
    return x / jnp.maximum(jnp.sqrt(rows(x**2)), 1e-12)

  def projection(g: jax.Array, d: jax.Array) -> jax.Array:
    return jnp.sum(g * d) / jnp.maximum(jnp.sum(d**2), 1e-30) * d

  def update(gradients: Any, state: Learned, params: Any = None) -> tuple[Any, Learned]:
    distances = jax.tree.map(jnp.subtract, params, state.start)
    parts = jax.tree.map(projection, gradients, distances)
    changes, outer = learner.update(
      jax.tree.map(lambda g, slope: jnp.sum(units(g) * slope), gradients, state.slope),
      state.learner,
    )
    omega = jax.tree.map(lambda w, change: jnp.clip(w + change, 0, 1), state.number, changes)
    freed = jax.tree.map(
      lambda g, d, part, w: g - jnp.where(jnp.sum(g * d) < 0, w, 0) * part,
      *(gradients, distances, parts, omega),
    )
    updates, inner = adam.update(freed, state.adam, params)
    return updates, Learned(state.start, jax.tree.map(units, parts), omega, inner, outer)

  return optax.GradientTransformation(learning(adam, learner, 0), update)


def cautious_to_start(
  learning_rate: Scalar, blocks: Any, decay: Scalar
) -> optax.GradientTransformation:
  """Cautious weight decay beside Adam, toward the initial weights instead of 0.

      θ ← θ − α (u + λ 1[u d ≥ 0] d)     for each weight

  A weight decays but where Adam leads it away from its start.

  Chen, Li, et al., Cautious Weight Decay, 2025, https://arxiv.org/abs/2510.12402; there d is θ.
  """

  def decayed(u: jax.Array, p: jax.Array, start: jax.Array) -> jax.Array:
    return u + decay * (p - start) * (u * (p - start) >= 0)

  def update(updates: Any, start: Params, params: Any = None) -> tuple[Any, Params]:
    return jax.tree.map(decayed, updates, params, start), start

  return optax.chain(
    optax.scale_by_adam(),
    optax.GradientTransformation(lambda params: jax.tree.map(jnp.copy, params), update),
    optax.scale_by_learning_rate(learning_rate),
  )


def with_base(loss: Loss, logits: Callable[[Params, Data], jax.Array]) -> Loss:
  """The loss, and for reference how far the model's answers to the new inputs move from the base's.

      L(θ) + κ mean_x KL(softmax f(θ_0, x) ‖ softmax f(θ, x))

  The mean is over the examples of the batch, in text over all tokens of all examples. No gradient
  reaches θ_0 or κ. The divergence runs as Shenfeld, Pari and Agrawal measure it, in RL's Razor:
  Why Online Reinforcement Learning Forgets Less, 2025, https://arxiv.org/abs/2509.04259.

  Args:
    loss: (params, batch) -> scalar.
    logits: (params, batch) -> float[n, …, classes], f on the inputs of the batch.

  Returns:
    A loss over {'model': θ, 'base': θ_0, 'kl': κ}; `model_alone` trains θ.
  """

  def total(params: Params, batch: Data) -> jax.Array:
    base, strength = jax.lax.stop_gradient((params['base'], params['kl']))
    said, first = (jax.nn.log_softmax(logits(p, batch)) for p in (params['model'], base))
    divergence = optax.losses.kl_divergence_with_log_targets(said, first)
    return loss(params['model'], batch) + strength * jnp.mean(divergence)

  return total


def model_alone(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
  """The optimizer, for the model in the params of `with_base` alone."""
  still = optax.set_to_zero()
  transforms = {'model': optimizer, 'base': still, 'kl': still}
  return optax.partition(transforms, lambda params: {name: name for name in params})
