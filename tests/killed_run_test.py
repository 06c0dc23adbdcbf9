"""A run that was killed again and again is the run that never was, bit for bit."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import numpy as np
import pytest
from killed_run import EVERY

from spd_optax import audit

SCRIPT = Path(__file__).parent / 'killed_run.py'


def run(folder, steps, kill_after=None, wait=0.0):
  """Starts the run, and kills it some time after it has done so many steps; whether it was."""
  folder.mkdir(exist_ok=True)
  command = [sys.executable, str(SCRIPT), str(folder), str(steps)]
  environment = {name: value for name, value in os.environ.items() if name != 'XLA_FLAGS'}
  with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as process:
    for _ in range(kill_after or 0):
      process.stdout.readline()
    if kill_after is not None:
      time.sleep(wait)
      process.kill()
    process.stdout.read()
  assert process.returncode in (0, -signal.SIGKILL)
  return process.returncode != 0


def killed_run(folder, steps, kills):
  """Goes on from the last checkpoint after each of so many kills; lastly to the end."""
  points, after, wait = random.Random(0), EVERY, 0.0  # first right behind a checkpoint
  while kills:
    kills -= run(folder, steps, after, wait)
    in_a_start = points.random() < 0.2
    after = 0 if in_a_start else points.randint(1, 2 * EVERY)
    wait = points.choice([0, points.uniform(0, 2.0 if in_a_start else 0.1)])
  assert not (folder / 'final.npz').exists()
  run(folder, steps)


def facts(record):
  """What a record says, but for the time and where the run began again."""
  fields = record._replace(time=0, resumed=False)._asdict()
  return {name: x.tolist() if hasattr(x, 'tolist') else x for name, x in fields.items()}


@pytest.mark.parametrize('kills', [2, pytest.param(20, marks=pytest.mark.slow)])
def test_a_killed_run_ends_like_one_that_was_not(tmp_path, kills):
  """Catches what a checkpoint lacks, a half-written one that is read, and a record lost or wrong.

  Params, optimizer state with its anchor put back, and the log, repeated steps included.
  """
  steps = 3 * EVERY * kills
  run(tmp_path / 'whole', steps)
  killed_run(tmp_path / 'killed', steps, kills)
  with (
    np.load(tmp_path / 'whole/final.npz') as whole,
    np.load(tmp_path / 'killed/final.npz') as found,
  ):
    assert [found[name].tobytes() for name in whole] == [whole[name].tobytes() for name in whole]
  whole, found = (audit.verify(tmp_path / name / 'run.jsonl') for name in ('whole', 'killed'))
  assert msgspec.structs.replace(found.header, started=whole.header.started) == whole.header
  expected = {record.step: facts(record) for record in whole.records}
  assert list(expected) == list(range(steps))
  assert [record.step for record in found.current()] == list(range(steps))
  assert all(facts(record) == expected[record.step] for record in found.records)
  assert sum(record.resumed for record in found.records) >= kills / 2
  assert any(record.condition.any() for record in found.records)
