"""Time, compile time and temporary memory of a whole optimizer step, beside Adam and PyTorch.

    python examples/benchmarks/step_time.py --model vit_b16 t5_base

runs on JAX's default device. All methods of a model take turns in one process, in a new order
every round, so that whatever else the machine does meets all of them alike. Only a quiet
machine gives times to report; on a busy one, OMP_WAIT_POLICY=passive keeps PyTorch's threads
from waiting for a core.
"""

import argparse
import functools
import os
import platform
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np
import optax

sys.path.insert(0, str(Path(__file__).parents[1]))  # examples/, for what follows

import reporting
import training
from benchmarks import methods, shapes

WARM_UP = 2  # rounds; even, so that every method has seen both trees of gradients
SHORTEST = 0.05  # seconds of one timing on an accelerator, to hide the launch
PARAMS_SCALE, GRADIENTS_SCALE = 0.02, 1e-3
TORCH_COPIES = 5  # memory of a peer in copies of the params: those, anchor, moments, temporaries


class Run(Protocol):
  """A method with its params and state."""

  def seconds(self, turn: int, repeats: int) -> float:
    """Time of one of `repeats` steps with the gradients whose turn it is."""

  def held(self) -> float | None:
    """Share of layers and steps whose condition was true; None without SPD."""


class Compiled:
  """An optimizer's step, compiled for its shapes, still without arrays."""

  def __init__(self, tx: optax.GradientTransformation, params: Any):
    step, self.tx, state = methods.make_step(tx), tx, jax.eval_shape(tx.init, params)
    begin = time.perf_counter()
    program = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, params).compile()
    self.compile_seconds = time.perf_counter() - begin
    self.temporaries = program.memory_analysis().temp_size_in_bytes
    self.memory = size(params) + size(state) + self.temporaries
    on_host = jax.default_backend() == 'cpu'
    self.steps = functools.partial(in_python, program) if on_host else in_one_program(step)


def in_python(step: methods.Step, params: Any, state: Any, gradients: Any, repeats: int) -> Any:
  """Steps launched one by one."""
  for _ in range(repeats):
    params, state = step(params, state, gradients)
  return params, state


def in_one_program(step: methods.Step) -> Callable[..., Any]:
  """Steps in one launch: that of a thousand small buffers takes longer than a GPU's step."""

  def steps(params: Any, state: Any, gradients: Any, repeats: Any) -> Any:
    def body(_: Any, carry: Any) -> Any:
      # The barrier ties the gradients to the carry; else XLA may move their squares, the same
      # in every step, out of the loop.
      carry, now = jax.lax.optimization_barrier((carry, gradients))
      return step(*carry, now)

    return jax.lax.fori_loop(0, repeats, body, (params, state))

  return jax.jit(steps, donate_argnums=(0, 1))


class JaxRun:
  """A `Run` of a compiled step; takes the params over."""

  def __init__(self, compiled: Compiled, params: Any, gradients: Sequence[Any]):
    self.steps, self.gradients = compiled.steps, gradients
    self.carry = jax.block_until_ready((params, compiled.tx.init(params)))

  def seconds(self, turn: int, repeats: int) -> float:
    begin = time.perf_counter()
    self.carry = jax.block_until_ready(self.steps(*self.carry, self.gradients[turn], repeats))
    return (time.perf_counter() - begin) / repeats

  def held(self) -> float | None:
    constrained = jax.tree.leaves(optax.tree.get(self.carry[1], 'constrained', {}))
    if not constrained:
      return None
    _, steps = optax.tree.get_all_with_path(self.carry[1], 'count')[0]
    return float(np.mean(constrained) / steps)


def size(tree: Any) -> int:
  """Bytes of all arrays."""
  return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def two_gradients(tree: shapes.Shapes, dtype: Any) -> list[Any]:
  """Gradients for odd and for even rounds; in four leaves of five the second turns back.

  Taking turns they hold two layers of five a step, as in the README's run. The turned one is
  half as long, so that momentum carries the layer on and SPD has something to take back.
  """
  first = shapes.random(tree, dtype, seed=1, scale=GRADIENTS_SCALE)
  leaves, treedef = jax.tree.flatten(first)
  second = [leaf if i % 5 == 0 else -leaf / 2 for i, leaf in enumerate(leaves)]
  return [first, jax.block_until_ready(treedef.unflatten(second))]


def groups(memory: Mapping[str, int], budget: float) -> list[list[str]]:
  """As few groups as fit into memory one after the other; the reference is in each."""
  reference, *others = memory
  found, used = [[reference]], memory[reference]
  for name in others:
    if used + memory[name] > budget and len(found[-1]) > 1:
      found.append([reference])
      used = memory[reference]
    found[-1].append(name)
    used += memory[name]
  return found


def device_memory() -> float:
  """Bytes that the runs of one group may fill; to start them takes almost as much again."""
  stats = jax.devices()[0].memory_stats() or {}
  physical = os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE')
  return 0.45 * stats.get('bytes_limit', physical)


def repeats_of(run: Run) -> int:
  """Steps in one timing: one on a CPU."""
  run.seconds(0, 1)
  repeats = 1
  if jax.default_backend() != 'cpu':
    while repeats * run.seconds(0, repeats) < SHORTEST:
      repeats *= 2
  return repeats


def take_turns(
  runs: Mapping[str, Run], rounds: int, advance: Callable[[], None]
) -> dict[str, np.ndarray]:
  """Seconds of a step: an array over rounds for each method."""
  times: dict[str, list[float]] = {name: [] for name in runs}
  repeats = {name: repeats_of(run) for name, run in runs.items()}
  rng = np.random.default_rng(0)
  for i in range(WARM_UP + rounds):
    for name in rng.permutation(list(runs)).tolist():
      times[name].append(runs[name].seconds(i % 2, repeats[name]))
    advance()
  return {name: np.array(values[WARM_UP:]) for name, values in times.items()}


def columns(seconds: np.ndarray, ratios: np.ndarray, held: float | None) -> dict[str, list[float]]:
  """What the rounds say about one method: median and quartiles, and ratios of the same round."""
  low, median, high = np.quantile(1e3 * seconds, (0.25, 0.5, 0.75))
  found = {
    'ms': median,
    '25 %': low,
    '75 %': high,
    '% of Adam': 100 * np.median(ratios),
  }
  found |= {} if held is None else {'held, %': 100 * held}
  return {name: [round(float(value), 3)] for name, value in found.items()}


def costs(compiled: Compiled, params: Any) -> dict[str, list[float]]:
  """What compiling says: temporaries in copies of the params."""
  return {
    'compile, s': [round(compiled.compile_seconds, 3)],
    'temp, N': [round(compiled.temporaries / size(params), 3)],
  }


def measure(args: argparse.Namespace, model: str, peers: Any, bar: Any) -> dict[str, Any]:
  """Compiles and times every method on one model; returns its columns by method."""
  tree = shapes.MODELS[model]()
  structs = shapes.structs(tree, args.dtype)
  # What training starts from.
  anchor = jax.device_get(shapes.random(tree, args.dtype, scale=PARAMS_SCALE))
  compiled = {name: Compiled(make(anchor), structs) for name, make in methods.OPTIMIZERS.items()}
  memory = {name: one.memory for name, one in compiled.items()}
  memory |= dict.fromkeys(peers.PEERS if peers else (), TORCH_COPIES * size(structs))
  gradients = two_gradients(tree, args.dtype)

  def start(name: str) -> Run:
    params = shapes.random(tree, args.dtype, scale=PARAMS_SCALE)
    if name in compiled:
      return JaxRun(compiled[name], params, gradients)
    return peers.Run(name, params, gradients, methods.LEARNING_RATE)

  parts = groups(memory, device_memory() - 2 * size(structs))
  task = bar.add_task(model, total=len(parts) * (WARM_UP + args.rounds))
  results: dict[str, Any] = {}
  for part in parts:
    runs = {name: start(name) for name in part}
    times = take_turns(runs, args.rounds, lambda: bar.advance(task))
    for name in part:
      ratios = times[name] / times[methods.REFERENCE]
      own = costs(compiled[name], structs) if name in compiled else {}
      row = columns(times[name], ratios, runs[name].held()) | own
      # Another part's arrays may lie in other pages, where Adam has another speed.
      row['Adam, ms'] = [round(1e3 * float(np.median(times[methods.REFERENCE])), 3)]
      results.setdefault(name, row)  # of the reference the first part's
    del runs  # before the next part is made
  return results


def settings(args: argparse.Namespace, model: str) -> dict[str, Any]:
  """What the numbers depend on besides the versions."""
  tree, device = shapes.MODELS[model](), jax.devices()[0]
  return {
    'model': model,
    'leaves': shapes.leaves(tree),
    'parameters': shapes.parameters(tree),
    'dtype': args.dtype,
    'rounds': args.rounds,
    'device': f'{device.platform}: {device.device_kind}',
    'host': f'{processor()}, {os.cpu_count()} cores',
    'torch': sys.modules['torch'].__version__ if args.torch else None,
    'OMP_WAIT_POLICY': os.environ.get('OMP_WAIT_POLICY'),
  }


def processor() -> str:
  """The CPU's name."""
  lines = Path('/proc/cpuinfo').read_text().splitlines() if Path('/proc/cpuinfo').exists() else []
  names = [line.partition(': ')[2] for line in lines if line.startswith('model name')]
  return names[0] if names else platform.processor()


def main(argv: list[str] | None = None) -> dict[str, Any]:
  """Runs the benchmark; returns the table of each model."""
  parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
  parser.add_argument('--model', nargs='+', choices=shapes.MODELS, default=['vit_b16', 't5_base'])
  parser.add_argument('--dtype', choices=('float32', 'bfloat16'), default='float32')
  parser.add_argument('--rounds', type=int, default=15)
  parser.add_argument('--torch', action=argparse.BooleanOptionalAction, default=True)
  parser.add_argument('--out', type=Path, default=Path('runs/step_time'))
  args = parser.parse_args(argv)
  os.environ.setdefault('XLA_PYTHON_CLIENT_PREALLOCATE', 'false')  # PyTorch needs the GPU, too
  jax.config.update('jax_enable_compilation_cache', False)  # compile times are of fresh compiles
  peers = None
  if args.torch:
    from benchmarks import torch_loop as peers

    peers.prepare(jax.default_backend())
  Compiled(methods.OPTIMIZERS[methods.REFERENCE](None), shapes.structs(shapes.tiny()))  # warm up
  found = {}
  with training.progress_bar() as bar:
    for model in args.model:
      found[model] = measure(args, model, peers, bar)
  for model, results in found.items():
    about = settings(args, model)
    reporting.show(f'{model}, {args.dtype}, {about["device"]} ({about["host"]})', results)
    reporting.write_json(args.out / f'{model}_{args.dtype}.json', about, results)
  print(f'Results: {args.out}/')
  return found


if __name__ == '__main__':
  main()
