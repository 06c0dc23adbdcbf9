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
  if process == '0':
    np.savez(result, *jax.tree.leaves(found))


if __name__ == '__main__':
  main(*sys.argv[1:])
