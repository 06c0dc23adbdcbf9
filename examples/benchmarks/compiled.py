"""What the compilers of TPU, GPU and CPU make of an optimizer step, without the hardware.

    python examples/benchmarks/compiled.py --model vit_b16 --target v5e v5e-2x2 v5p-4x4x4
    python examples/benchmarks/compiled.py --target h200 cpu

compiles ahead of time and reads the optimized program: passes over the params (bytes of
device memory moved, in copies of a device's params; Adam's floor is 7, SPD's 8),
temporaries, collectives and compile time. TPU targets need `pip install 'jax[tpu]'`, h200
`pip install jax-cuda13-plugin` of jax's version.
"""

import argparse
import math
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault('JAX_PLATFORMS', 'cpu')  # the targets are compiled for, not run on
os.environ.setdefault('TPU_SKIP_MDS_QUERY', '1')  # this machine is no TPU host: do not ask
os.environ.setdefault('ALLOW_MULTIPLE_LIBTPU_LOAD', '1')

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

sys.path.insert(0, str(Path(__file__).parents[1]))  # examples/, for what follows

import reporting
import training
from benchmarks import hlo, methods, shapes

# The compiler of jax-cuda13-plugin asks for the device: bytes a second and bytes, as published.
GPUS = {'h100': ('3350000000000', '85000000000'), 'h200': ('4800000000000', '150000000000')}
GPU = """
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: BANDWIDTH
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: MEMORY
  shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 }
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
device_description_str: "NVIDIA NAME"
"""


class Target(NamedTuple):
  """Devices to compile for: `count` of a TPU slice (None: all) or of GPUs, or this CPU."""

  platform: str
  topology: str = ''
  count: int | None = None

  def devices(self) -> list[Any]:
    if self.platform == 'cpu':
      return jax.devices('cpu')[:1]
    options: dict[str, Any] = {}
    if self.platform == 'cuda':
      bandwidth, memory = GPUS[self.topology]
      config = GPU.replace('BANDWIDTH', bandwidth).replace('MEMORY', memory)
      config = config.replace('NAME', self.topology.upper())
      options = {'target_config': config, 'topology': f'1x{self.count}x1'}
    described = topologies.get_topology_desc(self.topology, self.platform, **options)
    return list(described.devices)[: self.count]


TARGETS = {
  'v5e': Target('tpu', 'v5e:2x2', 1),
  'v5e-2x2': Target('tpu', 'v5e:2x2'),
  'v5e-4x4': Target('tpu', 'v5e:4x4'),
  'v5p-4x4x4': Target('tpu', 'v5p:4x4x4'),
  'v5p-2x4x4': Target('tpu', 'v5p:2x4x4'),
  'h200': Target('cuda', 'h200', 1),
  'h100-8': Target('cuda', 'h100', 8),
  'cpu': Target('cpu'),
}

SMALLEST = 2**14  # elements of a leaf that is worth sharding


class Compiled(NamedTuple):
  """A step compiled for a target; sizes in copies of one device's params, counts per leaf."""

  passes: float
  temporaries: float
  collectives: list[tuple[str, int, int]]
  programs: float
  scalars: float
  instructions: int
  trace_seconds: float
  compile_seconds: float
  host_bytes: int
  argument_bytes: int
  param_bytes: int


def fsdp(shape: tuple[int, ...], devices: int) -> PartitionSpec:
  """The first axis that divides by the number of devices; small leaves are replicated."""
  for axis, size in enumerate(shape):
    if devices > 1 and size % devices == 0 and math.prod(shape) >= SMALLEST:
      return PartitionSpec(*[None] * axis, 'fsdp')
  return PartitionSpec()


def nowhere(tree: shapes.Shapes) -> Any:
  """An anchor of zeros that takes no memory, for compiling."""
  return jax.tree.map(lambda x: np.broadcast_to(np.float32(0), x.shape), shapes.structs(tree))


def arguments(
  tx: optax.GradientTransformation, tree: shapes.Shapes, mesh: Mesh, dtype: Any, specs: Any
) -> tuple[Any, Any]:
  """Params and state as shapes; what is like the params is sharded like them, by these specs."""

  def placed(leaf: Any, spec: PartitionSpec, memory_kind: str | None = None) -> Any:
    sharding = NamedSharding(mesh, spec, memory_kind=memory_kind)
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

  def like_params(leaf: Any, spec: PartitionSpec) -> Any:
    on_host = leaf.memory_space == jax.memory.Space.Host
    return placed(leaf, spec, 'pinned_host' if on_host else None)

  params = jax.tree.map(placed, shapes.structs(tree, dtype), specs)
  jaxpr, state = jax.make_jaxpr(tx.init, return_shape=True)(params)
  avals = jax.tree.unflatten(jax.tree.structure(state), jaxpr.out_avals)
  return params, optax.tree.map_params(
    tx,
    lambda leaf, spec: like_params(leaf, spec) if hasattr(leaf, 'shape') else leaf,
    avals,
    specs,
    is_leaf=lambda node: isinstance(node, optax.MaskedNode),  # no anchor
    transform_non_params=lambda leaf: jax.tree.map(lambda x: placed(x, PartitionSpec()), leaf),
  )


def compile_step(
  tx: optax.GradientTransformation,
  tree: shapes.Shapes,
  target: Target,
  dtype: Any = jnp.float32,
  axes: Mapping[str, int] | None = None,
  specs: Any = None,
) -> tuple[Compiled, str]:
  """Compiles a whole step, params and state donated; returns what it costs, and the program.

  The mesh has the lengths of `axes` and the params `specs`; by default both are those of `fsdp`.
  """
  devices = np.array(target.devices())
  axes = axes or {'fsdp': devices.size}
  mesh = Mesh(devices.reshape(*axes.values()), tuple(axes))
  if specs is None:
    specs = jax.tree.map(lambda x: fsdp(x.shape, devices.size), shapes.structs(tree))
  params, state = arguments(tx, tree, mesh, dtype, specs)
  shardings = jax.tree.map(lambda x: x.sharding, (params, state))
  step = jax.jit(methods.make_step(tx), donate_argnums=(0, 1), out_shardings=shardings)
  begin = time.perf_counter()
  lowered = step.trace(params, state, params).lower()
  between = time.perf_counter()
  compiled = lowered.compile()
  end = time.perf_counter()
  text = compiled.as_text()
  program, memory = hlo.parse(text), compiled.memory_analysis()
  programs, scalars = hlo.computed(program)
  local = sum(
    math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(params)
  )
  # On CPU the analysis is right, and also knows which temporaries take a dead argument's place.
  stored = memory.temp_size_in_bytes if target.platform == 'cpu' else hlo.temporaries(program)
  return Compiled(
    passes=hlo.traffic(program) / local,
    temporaries=stored / local,
    collectives=hlo.collectives(program),
    programs=programs / shapes.leaves(tree),
    scalars=scalars / shapes.leaves(tree),
    instructions=hlo.instructions(program),
    trace_seconds=between - begin,
    compile_seconds=end - between,
    host_bytes=memory.host_argument_size_in_bytes,
    argument_bytes=memory.argument_size_in_bytes,
    param_bytes=local,
  ), text


def columns(one: Compiled, adam: Compiled) -> dict[str, list[float]]:
  """The row of the table."""
  found = {
    'passes, N': one.passes,
    'temp, N': one.temporaries,
    'collectives': len(one.collectives),
    'programs a leaf': one.programs,
    'scalars a leaf': one.scalars,
    'instructions / Adam': one.instructions / adam.instructions,
    'compile / Adam': one.compile_seconds / adam.compile_seconds,
    'trace + compile, s': one.trace_seconds + one.compile_seconds,
  }
  return {name: [round(float(value), 3)] for name, value in found.items()}


def growth() -> Mapping[str, tuple[shapes.Shapes, str]]:
  """A block of T5, made wider and deeper, and spread over more devices."""
  block = shapes.t5_base()['encoder']['block']['1']
  grown = {f'params ×{k}': (shapes.wider(block, k), 'v5e') for k in (1, 4, 16)}
  grown |= {f'leaves ×{k}': (shapes.deeper(block, k), 'v5e') for k in (1, 2, 4, 8)}
  wide = shapes.deeper(shapes.wider(block, 4), 4)
  devices = {1: 'v5e', 4: 'v5e-2x2', 16: 'v5e-4x4', 64: 'v5p-4x4x4'}
  return grown | {f'devices ×{k}': (wide, target) for k, target in devices.items()}


def cases(args: argparse.Namespace) -> Mapping[str, tuple[shapes.Shapes, str]]:
  """(shapes, target) by name."""
  if args.growth:
    return growth()
  models = {name: shapes.MODELS[name]() for name in args.model}
  return {
    f'{model}, {target}': (tree, target) for target in args.target for model, tree in models.items()
  }


def main(argv: list[str] | None = None) -> dict[str, Any]:
  """Compiles every case with every optimizer; returns the rows of the table."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--target', nargs='+', choices=TARGETS, default=['cpu'])
  parser.add_argument('--model', nargs='+', choices=shapes.MODELS, default=['vit_b16', 't5_base'])
  parser.add_argument('--method', nargs='+', choices=methods.OPTIMIZERS, default=None)
  parser.add_argument('--growth', action='store_true', help='grow params, leaves and devices')
  parser.add_argument('--out', type=Path, default=Path('runs/compiled'))
  args = parser.parse_args(argv)
  jax.config.update('jax_enable_compilation_cache', False)
  chosen = dict.fromkeys((methods.REFERENCE, *(args.method or methods.OPTIMIZERS)))
  todo = cases(args)
  results: dict[str, Any] = {}
  with training.progress_bar() as bar:
    task = bar.add_task('compile', total=len(todo) * len(chosen))
    for case, (tree, target) in todo.items():
      compile_step(methods.OPTIMIZERS[methods.REFERENCE](None), shapes.tiny(), TARGETS[target])
      adam = None
      for name in chosen:
        one, _ = compile_step(methods.OPTIMIZERS[name](nowhere(tree)), tree, TARGETS[target])
        adam = adam or one
        results[f'{case}: {name}'] = columns(one, adam)
        bar.advance(task)
  settings = {'cases': list(todo), 'compilers': compilers()}
  reporting.show('Ahead-of-time compiles; N: one copy of the params on a device', results)
  name = 'growth' if args.growth else '_'.join((*args.model, *args.target))
  reporting.write_json(args.out / f'{name}.json', settings, results)
  print(f'Results: {args.out}/{name}.json')
  return results


def compilers() -> dict[str, str]:
  """Versions of the compilers that are installed besides jaxlib's."""
  from importlib import metadata

  names = ('libtpu', 'jax-cuda13-plugin')
  installed = {one.metadata['Name'] for one in metadata.distributions()}
  return {name: metadata.version(name) for name in names if name in installed}


if __name__ == '__main__':
  main()
