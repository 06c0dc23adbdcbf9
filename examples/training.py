"""One training loop for all examples: several seeds at once, compiled in chunks of steps."""

import functools
import time
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
  record: Callable[[int, Any, Any], None] = lambda step, params, state: None,
) -> tuple[Any, Any]:
  """Trains once per seed from the same params, all seeds in one program.

  Args:
    loss: (params, batch) -> scalar.
    optimizer: any optax optimizer.
    params: weights to start from, without a seed axis; with one where `state` is given.
    data: tree of arrays [n, …] to draw batches from.
    order: indices int32[seeds, steps, batch] from `batch_order`.
    advance: called with the number of steps done since the last call.
    state: optimizer state to go on from, with a seed axis; None: the optimizer's own.
    chunk: steps between two calls of `advance` and `record`.
    record: called with the number of steps so far, and the params and state of the first seed.

  Returns:
    The trained params and the optimizer's state, each with a leading seed axis.
  """
  seeds, steps, _ = order.shape
  data = jax.tree.map(jnp.asarray, data)
  if state is None:
    params = jax.tree.map(lambda x: jnp.broadcast_to(x, (seeds, *jnp.shape(x))), params)
    state = jax.vmap(optimizer.init)(params)
  carry = params, state
  run_chunk = _compiled(loss, optimizer)
  for start in range(0, steps, chunk):
    part = order[:, start : start + chunk]
    carry = jax.block_until_ready(run_chunk(carry, part, data))
    advance(part.shape[1])
    record(start + part.shape[1], *jax.tree.map(lambda x: x[0], carry))
  return carry


@functools.cache
def _compiled(loss: Loss, optimizer: optax.GradientTransformation) -> Callable[..., Any]:
  """(params and state, order, data) -> params and state; compiled once for several calls."""

  def run(carry: Any, order: jax.Array, data: Any) -> Any:
    def step(carry: Any, at: jax.Array) -> tuple[Any, None]:
      params, state = carry
      gradients = jax.grad(loss)(params, jax.tree.map(lambda x: x[at], data))
      updates, state = optimizer.update(gradients, state, params)
      return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(step, carry, order)[0]

  return jax.jit(jax.vmap(run, in_axes=(0, 0, None)), donate_argnums=0)


class Lines(progress.Progress):
  """Says in a line now and then how far a task is, where bars cannot be drawn."""

  def __init__(self, every: float = 10):
    super().__init__(disable=True)
    self.every, self.said = every, time.monotonic()

  def advance(self, task_id: progress.TaskID, advance: float = 1) -> None:
    super().advance(task_id, advance)
    task = next(task for task in self.tasks if task.id == task_id)
    if task.finished or time.monotonic() - self.said >= self.every:
      print(f'{task.description}: {task.completed:.0f} of {task.total:.0f}', flush=True)
      self.said = time.monotonic()


@contextmanager
def progress_bar() -> Iterator[progress.Progress]:
  """A bar per task with steps done and time left; lines where the output is no terminal."""
  columns = (*progress.Progress.get_default_columns(), progress.MofNCompleteColumn())
  bar = progress.Progress(*columns)
  with bar if bar.console.is_terminal else Lines() as shown:
    yield shown
