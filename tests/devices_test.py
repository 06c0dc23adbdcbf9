"""Many devices are one device: under jit, in shard_map and pmap, and over two processes."""

import functools
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import chex
import jax
import numpy as np
import optax
import pytest
from contract_test import ADAM, ANCHORS, loop, make_step
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from stacks_test import FORMS, every_form

import spd_optax as spd
from spd_optax import audit

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


@pytest.mark.parametrize('anchor', ['captured', 'tree'])
@every_form
def test_each_layer_is_held_at_some_steps_and_free_at_others(make, anchor):
  """Catches noise under which nothing happens: all else here would pass."""
  params, state = alone(make, anchor)
  steps = optax.tree.get(state, 'constrained')
  assert all(np.all((steps[name] > 0) & (steps[name] < STEPS)) for name in SHAPES)
  untouched, _ = alone(lambda anchor, **rules: ADAM, anchor)
  moved = jax.tree.map(lambda x, y: np.abs(x - y).max() > 1e-4, params, untouched)
  assert all(jax.tree.leaves(moved))


@pytest.mark.parametrize(
  ('name', 'anchor'),
  [('FSDP', 'captured'), ('tensor', 'tree'), ('FSDP x tensor', 'tree'), ('explicit', 'captured')],
)
@every_form
def test_under_jit(make, name, anchor):
  """Catches sums of single shards, and an anchor that is replicated or gathered."""
  assert_close(sharded(make, anchor, name), alone(make, anchor))


@pytest.mark.parametrize('name', ['FSDP x tensor', 'explicit'])
@pytest.mark.parametrize('anchor', ['captured', 'tree'])
@every_form
def test_init_inside_jit_shards_the_anchor_like_the_params(make, anchor, name):
  """Catches a whole copy of the model on every device."""
  tx, params = make_tx(make, anchor), placed(normal(0), specs_on(name), mesh(name))
  state = jax.jit(tx.init)(params)
  assert_placed(optax.tree.get(state, 'anchor'), specs_on(name), mesh(name))
  chex.assert_trees_all_equal(jax.device_get(state), jax.device_get(tx.init(params)))


@pytest.mark.parametrize('anchor', ['captured', 'tree'])
@every_form
def test_init_on_an_explicit_mesh_shards_the_state_as_the_steps_do(make, anchor):
  """Catches values of dealt-out layers that are whole after `jit(init)`, and then do not fit."""
  tx = make_tx(make, anchor)
  params = placed(normal(0), specs_on('explicit'), mesh('explicit'))
  state = jax.jit(tx.init)(params)
  _, after = jax.eval_shape(make_step(tx), params, state, params)
  for name in set(spd.ProjectionDecayState._fields) - {'count'}:  # of Adam's own state jax decides
    found, expected = (jax.tree.map(jax.typeof, optax.tree.get(s, name)) for s in (state, after))
    assert found == expected, name


def map_over_shards(tx: Any, state: Any, name: str, specs: Any) -> Any:
  both = specs, state_specs(tx, state, specs)
  return jax.shard_map(make_step(tx), mesh=mesh(name), in_specs=(*both, specs), out_specs=both)


@pytest.mark.parametrize(('name', 'anchor'), [('FSDP', 'tree'), ('FSDP x tensor', 'captured')])
@every_form
def test_in_shard_map(make, name, anchor):
  """Catches a leaf that is counted once per copy, a sum over dealt-out layers, a wrong vma."""
  tx = make_tx(make, anchor, axis_name=axis_names(name))
  state = tx.init(normal(0))
  step = jax.jit(map_over_shards(tx, state, name, specs_on(name)))
  assert_close(loop(step, normal(0), state, noise())[-1], alone(make, anchor))


@every_form
def test_in_pmap(make):
  """Catches what test_in_shard_map does, where shards have an axis of their own."""
  tx = make_tx(make, 'captured', axis_name=axis_names('FSDP'))
  specs, start = specs_on('FSDP'), (normal(0), tx.init(normal(0)))
  both = specs, state_specs(tx, start[1], specs)

  def split(x, spec):
    return np.stack(np.split(x, 8, list(spec).index('fsdp')) if 'fsdp' in spec else [x] * 8)

  gradients = jax.tree.map(lambda g, spec: np.stack([split(x, spec) for x in g]), noise(), specs)
  trail = loop(jax.pmap(make_step(tx), 'fsdp'), *jax.tree.map(split, start, both), gradients)
  assert_close(trail[-1], jax.tree.map(split, alone(make, 'captured'), both))


@pytest.mark.parametrize('mapped', [False, True], ids=['jit', 'shard_map'])
@every_form
def test_one_all_reduce_is_all_communication(make, mapped):
  """Catches a collective per layer, sums that wait for other sums, gathered params."""
  tx = make(axis_name='fsdp' if mapped else None)
  specs = {f'layer_{i}': P('fsdp') for i in range(40)}
  params = placed({name: np.ones((8, 4), np.float32) for name in specs}, specs, mesh('FSDP'))
  state = tx.init(params)
  step = map_over_shards(tx, state, 'FSDP', specs) if mapped else make_step(tx)
  compiled = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, params).compile()
  collectives = re.findall(r' ((?:all|reduce|collective)-[\w-]+)\(', compiled.as_text())
  assert collectives == ['all-reduce']


def test_two_processes(tmp_path):
  """Catches whatever needs all shards at hand, such as a copy by way of the host.

  And an audit log that is touched off process 0, or that falls out of step where it fails there.
  """
  with socket.create_server(('127.0.0.1', 0)) as free:
    port = str(free.getsockname()[1])
  script = Path(__file__).with_name('two_processes.py')
  log, result = tmp_path / 'log', tmp_path / 'result.npz'
  flags = {
    'JAX_PLATFORMS': 'cpu',
    'PYTHONPATH': str(script.parent.parent),
    'XLA_FLAGS': '--xla_force_host_platform_device_count=2',
  }
  with log.open('w') as output:
    options = {'env': os.environ | flags, 'stdout': output, 'stderr': output}
    command = [sys.executable, script, port, result]
    children = [subprocess.Popen([*command, process], **options) for process in '01']
  deadline = time.monotonic() + 120
  try:
    while {None} <= {child.poll() for child in children} <= {None, 0}:
      assert time.monotonic() < deadline, log.read_text()
      time.sleep(0.1)
  finally:
    for child in children:
      child.kill()
  assert [child.wait() for child in children] == [0, 0], log.read_text()
  expected = jax.tree.leaves([alone(*run) for run in RUNS])
  found = dict(np.load(result))
  assert found.pop('fingerprint') == spd.fingerprint(ANCHOR)
  assert_close(list(found.values()), expected)
  run = audit.verify(tmp_path / 'audit' / 'run.jsonl')
  assert [record.step for record in run.records] == [1, 2]
  assert run.header.anchor.fingerprint == spd.fingerprint(ANCHOR)
  np.testing.assert_allclose(run.norms, np.linalg.norm(ANCHOR), rtol=1e-6)
