"""One of the two processes of devices_test: two_processes.py PORT RESULT ID."""

import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np


def main(port: str, result: str, process: str) -> None:
  jax.config.update('jax_cpu_collectives_implementation', 'gloo')
  jax.distributed.initialize(f'127.0.0.1:{port}', num_processes=2, process_id=int(process))
  # Only now: nothing may use a backend before.
  from jax.experimental.multihost_utils import process_allgather
  from meshes import RUNS, sharded

  found = process_allgather([sharded(*run, 'two processes') for run in RUNS], tiled=True)
  check_host_anchor()
  fingerprint = resumed(result)
  if process == '0':
    np.savez(result, *jax.tree.leaves(found), fingerprint=fingerprint)


def check_host_anchor() -> None:
  """Each process fills its shards from its own copy: nothing is gathered to be compared."""
  from jax.sharding import NamedSharding, PartitionSpec
  from meshes import ANCHOR

  import spd_optax as spd

  sharding = NamedSharding(jax.make_mesh((len(jax.devices()),), ('x',)), PartitionSpec('x'))
  params = jax.make_array_from_callback(ANCHOR.shape, sharding, lambda at: ANCHOR[at])
  own = ANCHOR + jax.process_index()
  for anchor in (own, jax.numpy.asarray(own)):
    found = spd.adam_spd(1e-3, anchor).init(params).projection_decay.anchor
    assert found.sharding.is_equivalent_to(sharding, 2)
    for shard in found.addressable_shards:
      np.testing.assert_array_equal(shard.data, own[shard.index])


def resumed(result: str) -> str:
  """Saves a run without its anchor and resumes it, as in the README; the anchor's fingerprint."""
  from jax.sharding import NamedSharding, PartitionSpec
  from meshes import ANCHOR
  from orbax.checkpoint import v1 as ocp

  import spd_optax as spd

  mesh = jax.make_mesh((len(jax.devices()),), ('x',))
  sharding = NamedSharding(mesh, PartitionSpec('x'))
  params = jax.make_array_from_callback(ANCHOR.shape, sharding, lambda at: ANCHOR[at])
  tx = spd.adam_spd(1e-3)
  state = jax.jit(tx.init)(params)
  with audit_log(Path(result)) as log:
    for step in range(3):
      _, state = jax.jit(tx.update)(params, state, params)
      logged(log, step, state)
  with jax.set_mesh(mesh):
    assert [record.constrained for record in spd.layer_report(state)] == [0]
  ocp.save(f'{result}.run', spd.drop_anchor(state))

  slim = jax.jit(lambda params: spd.drop_anchor(tx.init(params)))
  target = jax.tree.map(
    lambda x, placed: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placed),
    jax.eval_shape(slim, params),
    slim.lower(params).compile().output_shardings,
  )
  state = spd.put_anchor(ocp.load(f'{result}.run', target), params)
  assert state.projection_decay.anchor.sharding.is_equivalent_to(sharding, 2)
  _, state = jax.jit(tx.update)(params, state, params)
  assert int(state.projection_decay.count) == 4
  return spd.fingerprint(state.projection_decay.anchor)


def audit_log(result: Path) -> Any:
  """A log that only process 0 can write: elsewhere its path does not exist."""
  import spd_optax as spd

  folder = result.with_name('audit')
  if jax.process_index() == 0:
    folder.mkdir()
    log = spd.AuditLog(folder / 'run.jsonl', transform='adam_spd', captured=True)
    folder.rmdir()  # so that the first record fails on process 0
    return log
  return spd.AuditLog(folder / 'nowhere' / 'run.jsonl', transform='adam_spd', captured=True)


def logged(log: Any, step: int, state: Any) -> None:
  """Records a step; where that fails on process 0 it goes on, in step with the other."""
  try:
    log.record(step, state)
  except FileNotFoundError:
    assert (jax.process_index(), step) == (0, 0)
    log.path.parent.mkdir()


if __name__ == '__main__':
  main(*sys.argv[1:])
