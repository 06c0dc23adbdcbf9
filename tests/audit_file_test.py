"""The file of an audit log through kills, full disks, forks and restarts: nothing is lost."""

import json
import os
import resource
import signal
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from audited import FACTS, states, write

import spd_optax as spd
from spd_optax import audit


@pytest.fixture
def path(tmp_path):
  return tmp_path / 'run.jsonl'


def test_a_killed_process_leaves_every_record_and_the_log_goes_on(path):
  # Would catch: records that wait in a buffer of the process.
  code = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
import itertools, jax
import spd_optax as spd
from audited import FACTS, states
log = spd.AuditLog({str(path)!r}, **FACTS)
for step, state in enumerate(states(10_000)):
  print(step - 2, flush=True)
  log.record(step, state)
"""
  with subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE, text=True) as process:
    for line in process.stdout:
      if int(line) == 7:
        process.send_signal(signal.SIGKILL)
        break
    written = [int(line) for line in process.stdout]
  found = [record.step for record in audit.verify(path).records]
  assert found == list(range(len(found)))
  assert len(found) > max([7, *written])
  with spd.AuditLog(path, **FACTS) as log:
    for step, state in enumerate(states(12)):
      if step >= 6:  # the last checkpoint
        log.record(step, state)
  run = audit.verify(path)
  assert [record.resumed for record in run.records].count(True) == 1
  assert [record.step for record in run.current()] == list(range(12))
  assert 'jax' in json.loads(path.read_text().splitlines()[len(found) + 1])['resumed']


@pytest.mark.parametrize('cut', [1, 20, 200])
def test_a_torn_line_is_told_and_removed_on_reopening(path, cut):
  # Would catch: a next record that is written behind half a line.
  whole = write(path).read_bytes()
  path.write_bytes(whole[:-cut])
  run = audit.read(path)
  assert len(run.records) == 4
  assert run.torn == len(whole.splitlines()[-1]) + 1 - cut
  log = spd.AuditLog(path, **FACTS)
  (*_, state) = states(6)
  with pytest.warns(audit.AuditWarning, match='whose writer was killed') as caught:
    log.record(5, state)
  assert caught[0].filename == __file__
  log.close()
  assert [record.step for record in audit.verify(path).records] == [0, 1, 2, 3, 5]


def test_a_torn_header_is_begun_again(path):
  write(path)
  path.write_bytes(path.read_bytes()[:50])
  with pytest.raises(audit.AuditFileError, match='no audit log'):
    audit.read(path)
  assert len(audit.verify(write(path)).records) == 5


def test_a_full_disk_raises_and_the_log_stays_whole(path):
  # Would catch: half a line at the end, a chain that a later record does not continue, and a
  # record that is lost though the disk has room again.
  write(path, 3)
  whole = path.read_bytes()
  log = spd.AuditLog(path, **FACTS)
  *_, fourth, fifth = states(5)
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) + 100, limits[1]))
  try:
    log.record(3, fourth)
    with pytest.raises(OSError, match=r'run\.jsonl'):
      log.flush()
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
  assert path.read_bytes() == whole
  log.record(4, fifth)
  log.close()
  assert [record.step for record in audit.verify(path).records] == [0, 1, 2, 3, 4]


def test_a_closed_log_can_be_opened_beside_a_forked_child(path):
  # Would catch: a lock that lives on in a data loader's workers.
  first, second = states(2)
  log = spd.AuditLog(path, **FACTS)
  log.record(0, first)
  child = subprocess.Popen(['sleep', '60'], pass_fds=[log._file])
  try:
    log.close()
    with spd.AuditLog(path, **FACTS) as log:
      log.record(1, second)
  finally:
    child.kill()
    child.wait()
  assert len(audit.verify(path).records) == 2


def test_a_process_that_ends_without_closing_keeps_its_last_record(path):
  # Would catch: a record that is lost, or that a forked child writes, too, at its own exit.
  code = f"""
import os, sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
import jax
import spd_optax as spd
from audited import FACTS, states
assert jax.device_count() == 1  # where all values travel together unasked
os.chdir({str(path.parent)!r})
log = spd.AuditLog({path.name!r}, **FACTS)
os.chdir('/')
for step, state in enumerate(states(3)):
  log.record(step, state)
child = os.fork()
if not child:
  try:
    log.record(3, state)
  except RuntimeError as error:
    assert 'was forked' in str(error)
    log.close()  # as at the exit; that of JAX may hang in a forked process
    os._exit(5)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 5
"""
  one = {**os.environ, 'XLA_FLAGS': '', 'JAX_PLATFORMS': 'cpu'}
  subprocess.run([sys.executable, '-c', code], check=True, env=one)
  for record, state in zip(audit.verify(path).records, states(3), strict=True):
    own = state.projection_decay
    np.testing.assert_allclose(record.distance, list(own.distance.values()), rtol=1e-6)
    np.testing.assert_array_equal(record.constrained, list(own.constrained.values()))


def test_a_cell_of_a_notebook_may_run_again(path):
  # Would catch: a log that nobody can close any more, but that keeps its file locked.
  for _ in range(3):
    log = spd.AuditLog(path, **FACTS)
    for step, state in enumerate(states(2)):
      log.record(step, state)
    del state
  log.close()
  run = audit.verify(path)
  assert [record.step for record in run.records] == [0, 1] * 3
  assert [record.resumed for record in run.records] == [False, False, True, False, True, False]


def test_a_run_that_went_back_goes_on_in_its_log_after_close(path):
  # Would catch: a log that an in-process rollback makes useless, and records of it that stay.
  with spd.AuditLog(path, **FACTS) as log:
    for step, state in enumerate(states(5)):
      log.record(step, state, {'try': 1})
    with pytest.raises(ValueError, match=r'step 2 after step 4; call close\(\)'):
      log.record(2, state)
    log.close()
    for step, state in enumerate(states(4)):
      if step >= 2:
        log.record(step, state, {'try': 2})
  run = audit.verify(path)
  assert [record.step for record in run.records] == [0, 1, 2, 3, 4, 2, 3]
  assert [record.metrics['try'] for record in run.current()] == [1, 1, 2, 2]


def test_a_run_may_go_back_after_a_close_that_failed(path):
  # Would catch: a record that still waits to be written, and that the next one does not supersede.
  write(path, 1)
  whole = path.read_bytes()
  log = spd.AuditLog(path, **FACTS)
  *_, fourth, fifth = states(5)
  log.record(3, fourth)
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) + 100, limits[1]))
  try:
    with pytest.raises(OSError, match=r'run\.jsonl'):
      log.close()
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
  log.record(2, fourth)
  log.record(4, fifth)
  log.close()
  run = audit.verify(path)
  assert [record.step for record in run.records] == [0, 3, 2, 4]
  assert [record.step for record in run.current()] == [0, 2, 4]


def test_fsync_makes_the_name_of_a_new_file_safe_as_well(path, monkeypatch):
  # Would catch: a power failure after which the directory has no such file.
  (state,) = states(1)
  synced, fsync = [], os.fsync
  monkeypatch.setattr(os, 'fsync', lambda file: (synced.append(os.fstat(file)), fsync(file)))
  with spd.AuditLog(path, **FACTS, fsync=True) as log:
    log.record(0, state)
  assert [stat.S_ISDIR(status.st_mode) for status in synced] == [False, True, False]
  assert synced[1].st_ino == path.parent.stat().st_ino


def test_two_writers_of_one_file_are_refused(path):
  # Would catch: two chains in one file.
  first, second = (spd.AuditLog(path, **FACTS) for _ in range(2))
  zeroth, after = states(2)
  first.record(0, zeroth)
  with pytest.raises(BlockingIOError, match=r'call its close\(\), or use it in a `with`'):
    second.record(0, zeroth)
  first.record(1, after)
  first.close()
  assert len(audit.verify(path).records) == 2


def test_a_record_that_was_interrupted_after_its_write_is_kept(path, monkeypatch):
  # Would catch: Ctrl-C between the write and the bookkeeping, then a chain that is broken.
  log = spd.AuditLog(path, **FACTS)
  zeroth, first, second = states(3)
  log.record(0, zeroth)
  log.flush()
  write = os.write

  def interrupted(file, line):
    write(file, line)
    raise KeyboardInterrupt

  monkeypatch.setattr(os, 'write', interrupted)
  log.record(1, first)
  with pytest.raises(KeyboardInterrupt):
    log.flush()
  monkeypatch.undo()
  log.record(2, second)
  log.close()
  assert [record.step for record in audit.verify(path).records] == [0, 1, 2]


def test_a_deleted_log_is_an_error(path):
  # Would catch: weeks of records in a file that has no name any more.
  log = spd.AuditLog(path, **FACTS)
  zeroth, first = states(2)
  log.record(0, zeroth)
  path.unlink()
  with pytest.raises(FileNotFoundError, match='was deleted'):
    log.record(1, first)
  with pytest.raises(FileNotFoundError, match='was deleted'):
    log.close()
