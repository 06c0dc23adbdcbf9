"""The same step in eager PyTorch: the paper's per-tensor loop, and PyTorch's own fast Adams.

The loop is written from the paper's equations: Adam in place, tensor by tensor, as
`torch.optim.Adam(foreach=False)` runs it, and SPD around it with a Python branch on the
condition.
"""

import math
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax

try:
  import torch
except ImportError as error:
  raise ImportError(
    'the PyTorch peers need torch: python -m pip install torch '
    '(without a GPU: add --index-url https://download.pytorch.org/whl/cpu), '
    'or leave them out with --no-torch'
  ) from error

Tensors = Sequence[torch.Tensor]


class LoopAdamSPD:
  """Adam-SPD with strength λ, anchored where it starts; steps in place."""

  def __init__(
    self,
    params: Tensors,
    lr: float,
    strength: float = 1.0,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
  ):
    self.params, self.lr, self.strength = params, lr, strength
    self.b1, self.b2, self.eps = b1, b2, eps
    self.anchors = [p.clone() for p in params]
    self.firsts = [torch.zeros_like(p) for p in params]
    self.seconds = [torch.zeros_like(p) for p in params]
    self.steps = self.held = 0

  @torch.no_grad()
  def step(self, gradients: Tensors) -> None:
    """One step for every tensor, each held or not by its own condition."""
    self.steps += 1
    moments = zip(self.firsts, self.seconds, strict=True)
    for p, g, anchor, moment in zip(self.params, gradients, self.anchors, moments, strict=True):
      deviation = p - anchor
      condition = -torch.dot(g.flatten(), deviation.flatten())
      held = bool(condition < 0)  # on a GPU this waits for the device, as the paper's code does
      before = torch.linalg.vector_norm(deviation) if held else None
      self._adam(p, g, *moment)
      if held:
        torch.sub(p, anchor, out=deviation)
        after = torch.linalg.vector_norm(deviation)
        # Where the step ends on the anchor (after = 0) the ratio is 0/0, and there is no way back.
        ratio = torch.nan_to_num((after - before).clamp_(min=0) / after)
        p.addcmul_(deviation, ratio, value=-self.strength)
        self.held += 1

  def _adam(
    self, p: torch.Tensor, g: torch.Tensor, first: torch.Tensor, second: torch.Tensor
  ) -> None:
    first.lerp_(g, 1 - self.b1)
    second.mul_(self.b2).addcmul_(g, g, value=1 - self.b2)
    size = self.lr / (1 - self.b1**self.steps)
    correction = math.sqrt(1 - self.b2**self.steps)
    denominator = second.sqrt().div_(correction).add_(self.eps)
    p.addcdiv_(first, denominator, value=-size)


class Library:
  """An optimizer of `torch.optim`, with the gradients as an argument."""

  def __init__(self, params: Tensors, make: Callable[[Any], torch.optim.Optimizer]):
    self.params = [p.requires_grad_() for p in params]
    self.optimizer = make(self.params)

  def step(self, gradients: Tensors) -> None:
    """One step for all tensors."""
    for p, g in zip(self.params, gradients, strict=True):
      p.grad = g
    self.optimizer.step()


PEERS: dict[str, Callable[[Tensors, float], Any]] = {
  'torch, Adam-SPD loop': LoopAdamSPD,
  'torch.optim.Adam, foreach': lambda params, lr: Library(
    params, lambda params: torch.optim.Adam(params, lr, foreach=True)
  ),
  'torch.optim.AdamW, fused': lambda params, lr: Library(
    params, lambda params: torch.optim.AdamW(params, lr, fused=True)
  ),
}


class Run:
  """A peer with its own copy of the params, to be timed as `step_time.JaxRun` is."""

  def __init__(self, name: str, params: Any, gradients: Sequence[Any], lr: float):
    own = [p.clone() for p in tensors(params)]
    self.optimizer = PEERS[name](own, lr)
    self.gradients = [tensors(tree) for tree in gradients]
    if own[0].is_cuda:
      torch.cuda.synchronize()  # the copies are made before JAX may reuse the originals

  def seconds(self, turn: int, repeats: int) -> float:
    """Time of one of `repeats` steps with the gradients whose turn it is."""
    gradients = self.gradients[turn]
    clock = _device_seconds if gradients[0].is_cuda else _host_seconds
    return clock(lambda: self.optimizer.step(gradients), repeats)

  def held(self) -> float | None:
    """Share of layers and steps whose condition was true; None without SPD."""
    loop = self.optimizer
    if not isinstance(loop, LoopAdamSPD):
      return None
    return loop.held / (loop.steps * len(loop.params))


def tensors(tree: Any) -> list[torch.Tensor]:
  """The leaves as tensors on the same device; they share the arrays' memory."""
  return [torch.from_dlpack(leaf) for leaf in jax.tree.leaves(tree)]


def prepare(platform: str) -> None:
  """Gives PyTorch all cores, as XLA has them; an error where it lacks JAX's device."""
  if platform == 'cpu':
    torch.set_num_threads(cores())
  elif platform != 'gpu' or not torch.cuda.is_available():
    raise RuntimeError(
      f'JAX runs on {platform} and this PyTorch ({torch.__version__}) does not: '
      'install a PyTorch for that device, or leave it out with --no-torch'
    )


def cores() -> int:
  """The cores that this process may use."""
  if hasattr(os, 'sched_getaffinity'):
    return len(os.sched_getaffinity(0))
  return os.cpu_count() or 1


def _host_seconds(run: Callable[[], None], repeats: int) -> float:
  begin = time.perf_counter()
  for _ in range(repeats):
    run()
  return (time.perf_counter() - begin) / repeats


def _device_seconds(run: Callable[[], None], repeats: int) -> float:
  begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
  begin.record()
  for _ in range(repeats):
    run()
  end.record()
  torch.cuda.synchronize()
  return begin.elapsed_time(end) / 1e3 / repeats  # it counts milliseconds
