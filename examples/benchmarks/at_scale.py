"""What SPD adds to a run of a model of 7 billion parameters, without the hardware.

    python examples/benchmarks/at_scale.py

compiles the optimizer step ahead of time: on v5p-64 (32 chips, 8 × fsdp and 4 × tensor), and on 8
H100 (fsdp). The model is a decoder of 32 layers, stacked on one axis as `nn.scan` does. Params,
gradients and moments are float32. A row names the dtype of the anchor, which is passed unless it
is captured from the first params. The table has, for each device: the bytes that it holds during
the step (params, gradients, state and temporaries), the bytes on its host, the bytes that the step
moves through its memory, those that are communicated, and what the step takes, and adds to Adam's,
if memory is read and written at its published bandwidth. The transfer from the host is not in the
milliseconds.

It needs what `compiled.py` needs, and a minute.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

sys.path.insert(0, str(Path(__file__).parents[1]))  # examples/, for what follows

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec as P

import reporting
import spd_optax as spd
import training
from benchmarks import compiled, methods, shapes
from spd_optax import placement

LAYERS, WIDTH, HIDDEN, HEADS, VOCABULARY = 32, 4096, 11008, 32, 32000
DECODER: dict[str, tuple[tuple[int, ...], P]] = {  # shapes, and specs as MaxText has them
  'embedding': ((VOCABULARY, WIDTH), P('tensor', 'fsdp')),
  'logits': ((WIDTH, VOCABULARY), P('fsdp', 'tensor')),
  'norm': ((WIDTH,), P()),
  **{
    f'layers/{name}': ((LAYERS, WIDTH, HEADS, WIDTH // HEADS), P(None, 'fsdp', 'tensor'))
    for name in ('query', 'key', 'value')
  },
  'layers/out': ((LAYERS, HEADS, WIDTH // HEADS, WIDTH), P(None, 'tensor', None, 'fsdp')),
  **{
    f'layers/{name}': ((LAYERS, WIDTH, HIDDEN), P(None, 'fsdp', 'tensor'))
    for name in ('gate', 'up')
  },
  'layers/down': ((LAYERS, HIDDEN, WIDTH), P(None, 'tensor', 'fsdp')),
  **{f'layers/{name}': ((LAYERS, WIDTH), P()) for name in ('norm_1', 'norm_2')},
}


class Run(NamedTuple):
  """Where it is trained: the mesh, and bytes a second of each device's memory."""

  target: str
  axes: dict[str, int]
  bandwidth: float


RUNS = {
  'v5p-64': Run('v5p-2x4x4', {'fsdp': 8, 'tensor': 4}, 2.765e12),
  '8 H100': Run('h100-8', {'fsdp': 8, 'tensor': 1}, 3.35e12),
}


SHAPES = {name: shape for name, (shape, _) in DECODER.items()}
SPECS = {name: spec for name, (_, spec) in DECODER.items()}
ANCHOR = compiled.nowhere(SHAPES)


def adam_spd(anchor: Any = ANCHOR, **options: Any) -> Any:
  """`adam_spd`, one layer per slice."""
  return spd.adam_spd(methods.LEARNING_RATE, anchor, stack_axis={0: 'layers/*'}, **options)


def chained(**options: Any) -> Any:
  """`projection_decay` in front of Adam."""
  link = spd.projection_decay(ANCHOR, stack_axis={0: 'layers/*'}, **options)
  return optax.chain(link, optax.adam(methods.LEARNING_RATE))


NARROW = {'anchor_dtype': jnp.bfloat16}
ON_HOST = NARROW | {'anchor_memory_kind': 'pinned_host'}
OPTIMIZERS: dict[str, Callable[[], Any]] = {
  methods.REFERENCE: lambda: methods.OPTIMIZERS[methods.REFERENCE](None),
  'projection_decay, float32': chained,
  'projection_decay, bfloat16': lambda: chained(**NARROW),
  'adam_spd, float32': adam_spd,
  'adam_spd, bfloat16': lambda: adam_spd(**NARROW),
  'adam_spd, bfloat16, apply': lambda: methods.WritesParams(adam_spd(**NARROW)),
  'adam_spd, bfloat16 on the host': lambda: adam_spd(**ON_HOST),
  'adam_spd, bfloat16, captured': lambda: adam_spd(None, **NARROW),
  'SignificantProjection, bfloat16': lambda: adam_spd(**NARROW, rule=spd.SignificantProjection()),
}


def columns(one: compiled.Compiled, run: Run, adam: float) -> dict[str, list[float]]:
  """The row of the table; `adam` are Adam's milliseconds."""
  moved = one.passes * one.param_bytes
  milliseconds = 1e3 * moved / run.bandwidth
  found = {
    'on the device, GB': (one.argument_bytes + one.param_bytes * one.temporaries) / 1e9,
    'on its host, GB': one.host_bytes / 1e9,
    'passes, N': one.passes,
    'moved, GB': moved / 1e9,
    'collectives': len(one.collectives),
    'communicated, kB': sum(size for _, _, size in one.collectives) / 1e3,
    'step, ms': milliseconds,
    'added, ms': milliseconds - adam if adam else 0.0,
  }
  return {name: [round(float(value), 3)] for name, value in found.items()}


def main(argv: list[str] | None = None) -> dict[str, Any]:
  """Compiles each optimizer for each run; returns the rows of the table."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--run', nargs='+', choices=RUNS, default=[*RUNS])
  parser.add_argument('--out', type=Path, default=Path('runs/at_scale'))
  args = parser.parse_args(argv)
  jax.config.update('jax_enable_compilation_cache', False)
  results: dict[str, Any] = {}
  # The library asks the devices of this machine for their memory, and they are not those.
  kinds = mock.patch.object(placement, 'memory_kinds', return_value={'device', 'pinned_host'})
  with training.progress_bar() as bar, kinds:
    task = bar.add_task('compile', total=len(args.run) * len(OPTIMIZERS))
    for name in args.run:
      run, adam = RUNS[name], 0.0
      target = compiled.TARGETS[run.target]
      for title, make in OPTIMIZERS.items():
        one, _ = compiled.compile_step(make(), SHAPES, target, axes=run.axes, specs=SPECS)
        row = columns(one, run, adam)
        adam = adam or row['step, ms'][0]
        results[f'{name}: {title}'] = row
        bar.advance(task)
  settings = {'parameters': shapes.parameters(SHAPES), 'compilers': compiled.compilers()}
  reporting.show('A step of the optimizer, for each device', results)
  reporting.write_json(args.out / 'results.json', settings, results)
  print(f'Results: {args.out}/results.json')
  return results


if __name__ == '__main__':
  main()
