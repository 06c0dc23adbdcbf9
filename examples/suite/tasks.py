"""What a task is: something known, something new with little data, and what must not be lost."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import spd_optax as spd

Data = Any  # a tree of arrays [n, …]
Params = Any


class Stage(NamedTuple):
  """New data that come at a time.

  Attributes:
    pool: each seed draws its training examples from it; the others are for validation.
    test: in-distribution test set.
  """

  pool: Data
  test: Data


def kl(logits: jax.Array, base: jax.Array, batch: Data) -> jax.Array:
  """KL(π_0 ‖ π) in nats, the mean over all answers."""
  return spd.kl_from_base(logits, base)


class Task(NamedTuple):
  """A model, what it is pre-trained on, and what it is fine-tuned on.

  Attributes:
    title: a line for the reader.
    init: random key -> params.
    loss: (params, batch) -> scalar, to train with.
    score: (params, data) -> scalar, higher is better; at most 100.
    old: data to pre-train on.
    stages: what is learned, one after the other; mostly one.
    ood: out-of-distribution test sets by name.
    blocks: the params' top-level names from input to output, the last one the head.
    pretrain_steps, pretrain_rate, pretrain_optimizer: how `old` is learned, in batches of 64.
    steps, batch, shots: of fine-tuning, for each stage.
    rank: of the low-rank adapters that alone are trained; 0 trains all weights.
    pretrained: () -> params that others trained, with a head of zeros; None: `old` is learned.
    features: (params, inputs) -> what the head sees, float32[n, d]. Where there are features,
      `score` takes data that have them in place of all inputs.
    logits: (params, batch) -> float32[n, …, classes]; of a regression what it predicts.
    drift: (logits, those of the base model, batch) -> how far they are from these, a scalar.
    pace: factors of the learning rate, one after the other, each for as many steps;
      early stopping looks at the validation data after each.
    rates: learning rates of Adam to try, where they are not the suite's.
    by_layer: whether the records say how often each layer was held.
  """

  title: str
  init: Callable[[jax.Array], Params]
  loss: Callable[[Params, Data], jax.Array]
  score: Callable[[Params, Data], jax.Array]
  old: Data
  stages: tuple[Stage, ...]
  ood: dict[str, Data]
  blocks: tuple[str, ...]
  pretrain_steps: int = 1000
  pretrain_rate: float = 3e-3
  pretrain_optimizer: Callable[[optax.Schedule], optax.GradientTransformation] = optax.adamw
  steps: int = 150
  batch: int = 16
  shots: int = 200
  rank: int = 0
  pretrained: Callable[[], Params] | None = None
  features: Callable[[Params, Data], jax.Array] | None = None
  logits: Callable[[Params, Data], jax.Array] | None = None
  drift: Callable[[jax.Array, jax.Array, Data], jax.Array] = kl
  pace: tuple[float, ...] = (1.0,) * 10
  rates: tuple[float, ...] = ()
  by_layer: bool = False


def cosine(warmup: float = 0.1, parts: int = 30) -> tuple[float, ...]:
  """A pace that grows linearly to 1 over a share of the steps, and then decays to 0."""
  steps = 1000 * parts
  schedule = optax.warmup_cosine_decay_schedule(0, 1, round(warmup * steps), steps)
  return tuple(float(schedule(1000 * part + 500)) for part in range(parts))


def in_bfloat16(task: Task) -> Task:
  """The task with its loss, logits and gradients computed in bfloat16.

  Weights stay float32, and so does the type of the gradients. What has one axis, as labels have,
  is not rounded. Scores are computed in float32.
  """

  def rounded(x: jax.Array) -> jax.Array:
    floating = jnp.issubdtype(x.dtype, jnp.floating)
    return x.astype(jnp.bfloat16) if floating else x

  def narrow(of: Callable[[Params, Data], jax.Array]) -> Callable[[Params, Data], jax.Array]:
    def computed(params: Params, batch: Data) -> jax.Array:
      inputs = jax.tree.map(lambda x: rounded(x) if x.ndim > 1 else x, batch)
      return of(jax.tree.map(rounded, params), inputs).astype(jnp.float32)

    return computed

  return task._replace(loss=narrow(task.loss), logits=task.logits and narrow(task.logits))


def size(data: Data) -> int:
  """The number of examples."""
  return len(jax.tree.leaves(data)[0])


def take(data: Data, at: np.ndarray | slice) -> Data:
  """Some of the examples."""
  return jax.tree.map(lambda x: x[at], data)


def together(*parts: Data) -> Data:
  """All examples of all parts."""
  return jax.tree.map(lambda *arrays: np.concatenate(arrays), *parts)
