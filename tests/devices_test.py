"""Many devices are one device: under jit, in shard_map and pmap, and over two processes."""

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
from cases import ADAM, every_form, loop, make_step
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from meshes import (
  ANCHOR,
  RUNS,
  SHAPES,
  STEPS,
  alone,
  assert_close,
  assert_placed,
  axis_names,
  make_tx,
  mesh,
  noise,
  normal,
  placed,
  sharded,
  specs_on,
  state_specs,
)

import spd_optax as spd
from spd_optax import audit


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
  [
    ('FSDP x tensor', 'tree'),
    ('explicit', 'captured'),
    pytest.param('FSDP', 'captured', marks=pytest.mark.slow),
    pytest.param('tensor', 'tree', marks=pytest.mark.slow),
  ],
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


@pytest.mark.parametrize(
  ('name', 'anchor'),
  [('FSDP x tensor', 'captured'), pytest.param('FSDP', 'tree', marks=pytest.mark.slow)],
)
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
  specs = {f'layer_{i}': P('fsdp') for i in range(12)}
  params = placed({name: np.ones((8, 4), np.float32) for name in specs}, specs, mesh('FSDP'))
  state = tx.init(params)
  step = map_over_shards(tx, state, 'FSDP', specs) if mapped else make_step(tx)
  compiled = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, params).compile()
  collectives = re.findall(r' ((?:all|reduce|collective)-[\w-]+)\(', compiled.as_text())
  assert collectives == ['all-reduce']


def test_reports_and_logs_where_a_mesh_is_set(tmp_path):
  """Catches values on one device alone, which jit refuses there."""
  stacked = {'layers': {'kernel': np.ones((8, 3, 2)), 'bias': np.ones((8, 2))}, 'head': np.ones(8)}
  on = mesh('FSDP')
  params = jax.device_put(jax.tree.map(np.float32, stacked), NamedSharding(on, P('fsdp')))
  strength = spd.within_distance(0.5)
  tx = spd.adam_spd(0.1, stack_axis={'layers': 0, 'head': None}, strength=strength)
  _, state = jax.jit(tx.update)(params, tx.init(params), params)
  with jax.set_mesh(on), spd.AuditLog(tmp_path / 'run.jsonl', transform='adam_spd') as log:
    found = spd.layer_report(state)
    log.record(1, state, {'loss': jax.device_put(0.5, jax.devices()[3])})
  assert found == spd.layer_report(state)
  (record,) = audit.read(tmp_path / 'run.jsonl').records
  assert (record.metrics['loss'], record.metrics['spd/budget']) == (0.5, 0.5)


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
