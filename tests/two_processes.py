"""One of the two processes of devices_test: two_processes.py PORT RESULT ID."""

import sys

import jax
import numpy as np


def main(port: str, result: str, process: str) -> None:
  jax.config.update('jax_cpu_collectives_implementation', 'gloo')
  jax.distributed.initialize(f'127.0.0.1:{port}', num_processes=2, process_id=int(process))
  # Only now: nothing may use a backend before.
  from devices_test import RUNS, sharded
  from jax.experimental.multihost_utils import process_allgather

  found = process_allgather([sharded(*run, 'two processes') for run in RUNS], tiled=True)
  fingerprint = exchanged()
  if process == '0':
    np.savez(result, *jax.tree.leaves(found), fingerprint=fingerprint)


def exchanged() -> str:
  """The fingerprint of an anchor over both processes that was dropped and put back."""
  from devices_test import ANCHOR

  import spd_optax as spd

  mesh = jax.make_mesh((len(jax.devices()),), ('x',))
  sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec('x'))
  anchor = jax.make_array_from_callback(ANCHOR.shape, sharding, lambda at: ANCHOR[at])
  state = jax.jit(spd.adam_spd(1e-3).init)(anchor)
  state = spd.put_anchor(spd.drop_anchor(state), anchor)
  return spd.fingerprint(state.projection_decay.anchor)


if __name__ == '__main__':
  main(*sys.argv[1:])
