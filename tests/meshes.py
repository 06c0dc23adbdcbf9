"""One run on many devices: params that are split in several ways, and what trains on them."""

import functools
from typing import Any

import chex
import jax
import numpy as np
import optax
from cases import ANCHORS, FORMS, loop, make_step
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

# Blocks and experts are stacked layers: each block is split over devices, whole experts
# are dealt out to them. The head is one layer of three leaves, each split in its own way.
SHAPES = {'blocks': (2, 8, 16), 'embed': (16, 8), 'experts': (8, 3, 8)}
SHAPES |= {'head': {'bias': (8,), 'kernel': (16, 8), 'scale': (8,)}}
SPECS = {
  'blocks': P(None, 'fsdp', 'tensor'),
  'embed': P('tensor', 'fsdp'),
  'experts': P('fsdp', None, 'tensor'),
  'head': {'bias': P(), 'kernel': P('fsdp', 'tensor'), 'scale': P('tensor')},
}
RULES = {
  'stack_axis': {'blocks': 0, 'embed': None, 'experts': 0, 'head': None},
  'group': lambda path: 'head' if path.startswith('head/') else None,
}
STEPS = 8
AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit
MESHES = {
  'FSDP': (AUTO, {'fsdp': 8}),
  'tensor': (AUTO, {'tensor': 8}),
  'FSDP x tensor': (AUTO, {'fsdp': 4, 'tensor': 2}),
  'explicit': (EXPLICIT, {'fsdp': 4, 'tensor': 2}),  # what `jax.make_mesh` makes, by now
  'two processes': (AUTO, {'fsdp': 2, 'tensor': 2}),
}
RUNS = list(zip(FORMS.values(), ['captured', 'tree'], strict=True))  # of the two processes

ANCHOR = np.arange(32, dtype=np.float32).reshape(8, 4)


def normal(seed: int, *batch: int) -> Any:
  rng = np.random.default_rng(seed)
  return jax.tree.map(lambda _, at: rng.standard_normal((*batch, *at), np.float32), SPECS, SHAPES)


def noise() -> Any:
  return normal(4, STEPS)  # of a seed under which no layer is always free or always held


def mesh(name: str) -> Mesh:
  kind, axes = MESHES[name]
  devices = np.array(jax.devices()).reshape(*axes.values())
  return Mesh(devices, tuple(axes), axis_types=(kind,) * len(axes))


def specs_on(name: str) -> Any:
  """SPECS without the axes that the mesh lacks."""
  axes = MESHES[name][1]
  return jax.tree.map(lambda spec: P(*(a if a in axes else None for a in spec)), SPECS)


def axis_names(name: str) -> Any:
  """For each leaf the axes that its layers are split over: all but those that deal out experts."""
  split = specs_on(name)
  split['experts'] = P(*split['experts'][1:])
  return jax.tree.map(lambda spec: tuple(a for a in spec if a) or None, split)


def state_specs(tx: Any, state: Any, specs: Any) -> Any:
  """Specs of a state: what it holds per expert is dealt out like the experts."""

  def others(values):
    return jax.tree.map(lambda x: P(specs['experts'][0]) if x.shape == (8,) else P(), values)

  return optax.tree.map_params(tx, lambda _, spec: spec, state, specs, transform_non_params=others)


def placed(tree: Any, specs: Any, on: Mesh) -> Any:
  return jax.device_put(tree, jax.tree.map(lambda spec: NamedSharding(on, spec), specs))


def assert_placed(tree: Any, specs: Any, on: Mesh) -> None:
  for leaf, spec in zip(jax.tree.leaves(tree), jax.tree.leaves(specs), strict=True):
    assert leaf.sharding.is_equivalent_to(NamedSharding(on, spec), leaf.ndim)


def assert_close(found: Any, expected: Any) -> None:
  """Equal but for the order of float32 sums; all numbers are of order 1."""
  chex.assert_trees_all_close(found, expected, rtol=1e-6, atol=1e-6)


def make_tx(make: Any, anchor: str, **options: Any) -> Any:
  return make(ANCHORS[anchor](normal(0)), **RULES, **options)


@functools.cache
def alone(make: Any, anchor: str) -> Any:
  """Params and state after training on one device."""
  tx = make_tx(make, anchor)
  return loop(jax.jit(make_step(tx)), normal(0), tx.init(normal(0)), noise())[-1]


def sharded(make: Any, anchor: str, name: str) -> Any:
  """Params and state after training under jit, all along sharded as they were."""
  tx, on, specs = make_tx(make, anchor), mesh(name), specs_on(name)
  params = placed(normal(0), specs, on)
  gradients = placed(noise(), jax.tree.map(lambda spec: P(None, *spec), specs), on)
  state = tx.init(params)
  assert_placed(optax.tree.get(state, 'anchor'), specs, on)
  state = placed(state, state_specs(tx, state, specs), on)
  trail = loop(jax.jit(make_step(tx), donate_argnums=(0, 1)), params, state, gradients)
  for params, state in trail[1:]:
    assert_placed((params, optax.tree.get(state, 'anchor')), (specs, specs), on)
  return trail[-1]
