"""One training loop for all examples: several seeds at once, compiled in chunks of steps."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich import progress

Loss = Callable[[Any, Any], jax.Array]


def batch_order(
  seeds: int, steps: int, batch: int, size: int, shots: int | None = None
) -> np.ndarray:
  """Indices int32[seeds, steps, batch]; each seed draws its own `shots` of `size` examples."""
  shots = size if shots is None else shots
  order = np.empty((seeds, steps, batch), np.int32)
  for seed in range(seeds):
    rng = np.random.default_rng(seed)
    chosen = rng.permutation(size)[:shots]
    epochs = -(-steps * batch // shots)
    flat = np.concatenate([rng.permutation(chosen) for _ in range(epochs)])
    order[seed] = flat[: steps * batch].reshape(steps, batch)
  return order


def train(
  loss: Loss,
  optimizer: optax.GradientTransformation,
  params: Any,
  data: Any,
  order: np.ndarray,
  advance: Callable[[int], None] = lambda steps: None,
  state: Any = None,
  chunk: int = 20,
) -> tuple[Any, Any]:
  """Trains once per seed from the same params, all seeds in one program.

  Args:
    loss: (params, batch) -> scalar.
    optimizer: any optax optimizer.
    params: weights to start from, without a seed axis.
    data: tree of arrays [n, …] to draw batches from.
    order: indices int32[seeds, steps, batch] from `batch_order`.
    advance: called with the number of steps done since the last call.
    state: optimizer state to start from, with a seed axis; None: the optimizer's own.
    chunk: steps between two calls of `advance`.

  Returns:
    The trained params and the optimizer's state, each with a leading seed axis.
  """

  def step(carry: Any, at: jax.Array) -> tuple[Any, None]:
    params, state = carry
    gradients = jax.grad(loss)(params, jax.tree.map(lambda x: x[at], data))
    updates, state = optimizer.update(gradients, state, params)
    return (optax.apply_updates(params, updates), state), None

  def run(carry: Any, order: jax.Array) -> Any:
    return jax.lax.scan(step, carry, order)[0]

  seeds, steps, _ = order.shape
  data = jax.tree.map(jnp.asarray, data)
  params = jax.tree.map(lambda x: jnp.broadcast_to(x, (seeds, *jnp.shape(x))), params)
  carry = params, jax.vmap(optimizer.init)(params) if state is None else state
  run_chunk = jax.jit(jax.vmap(run), donate_argnums=0)
  for start in range(0, steps, chunk):
    part = order[:, start : start + chunk]
    carry = jax.block_until_ready(run_chunk(carry, part))
    advance(part.shape[1])
  return carry


@contextmanager
def progress_bar() -> Iterator[progress.Progress]:
  """A bar per task with steps done and time left."""
  columns = (*progress.Progress.get_default_columns(), progress.MofNCompleteColumn())
  with progress.Progress(*columns) as bar:
    yield bar
