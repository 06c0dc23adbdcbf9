"""The audit log as a file: nothing that it said is lost, and nothing false is added."""

import json
import os
import resource
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import spd_optax as spd
from spd_optax import audit
from spd_optax.audit import reading

PARAMS = {'kernel': jnp.ones((2, 3)), 'bias': jnp.zeros(3)}
TX = spd.with_projection_decay(optax.sgd(0.1, momentum=0.9))
FACTS = {'transform': 'with_projection_decay', 'hyperparameters': {'lr': 0.1}, 'source': 'ones'}


def states(count, tx=TX, params=PARAMS, gradient=lambda i: (1.0, 1.0, -0.2)[i % 3]):
  """The state after each of so many steps."""
  state = tx.init(params)
  for i in range(count):
    gradients = jax.tree.map(lambda p, i=i: jnp.full_like(p, gradient(i)), params)
    updates, state = tx.update(gradients, state, params)
    params = optax.apply_updates(params, updates)
    yield state


def write(path, count=5, **facts):
  """A log of so many records."""
  with spd.AuditLog(path, **{**FACTS, **facts}) as log:
    for step, state in enumerate(states(count)):
      log.record(step, state, {'loss': 1 / (step + 1)})
  return path


@pytest.fixture
def path(tmp_path):
  return tmp_path / 'run.jsonl'


def test_a_log_says_what_the_states_said(path):
  # Would catch: values of another layer, or that are rounded to nothing.
  write(path)
  run = audit.verify(path)
  assert run.header['layers'] == ['bias', 'kernel']
  assert run.header['anchor']['fingerprint'] == spd.fingerprint(PARAMS)
  assert run.header['anchor']['source'] == 'ones'
  assert run.header['versions']['jax'] == jax.__version__
  assert run.header['schema'] == 1
  np.testing.assert_allclose(run.norms, [0, 6**0.5], rtol=1e-6)
  for step, (record, state) in enumerate(zip(run.records, states(5), strict=True)):
    own = state.projection_decay
    assert (record.step, record.updates, record.metrics) == (
      step,
      step + 1,
      {'loss': 1 / (step + 1)},
    )
    for i, name in enumerate(run.layers):
      assert record.held[i] == own.condition[name]
      assert record.steps[i] == own.constrained[name]
      np.testing.assert_allclose(record.distance[i], own.distance[name], rtol=1e-6)
      np.testing.assert_allclose(record.ratio[i], own.ratio[name], rtol=1e-6)
  assert any(record.held.any() for record in run.records)


def test_slices_of_stacked_layers_have_a_value_each(path):
  tx = spd.adam_spd(1e-3, stack_axis={'kernel': 0, 'bias': None})
  with spd.AuditLog(path, **FACTS) as log:
    for step, state in enumerate(states(2, tx)):
      log.record(step, state)
  assert audit.read(path).layers == ['bias', 'kernel[0]', 'kernel[1]']


def test_every_line_is_json_also_of_values_that_are_not_finite(path):
  # Would catch: NaN as Python writes it, which other readers of JSON refuse.
  log = spd.AuditLog(path, **FACTS)
  warned = []
  for step, state in enumerate(states(3, gradient=lambda i: (np.nan, np.inf, -np.inf)[i])):
    with warnings.catch_warnings(record=True) as caught:
      log.record(step, state, {'a': np.nan, 'b': -np.inf, 'c': jnp.inf})
      log.flush()
    warned += [str(warning.message) for warning in caught]
  assert len(warned) == 1
  assert 'a, b, c' in warned[0]

  def refuse(constant):
    raise AssertionError(constant)

  for line in path.read_text().splitlines():
    json.loads(line, parse_constant=refuse)
  last = audit.read(path).records[-1]
  assert np.isnan(last.distance).all()
  np.testing.assert_equal(last.metrics, {'a': np.nan, 'b': -np.inf, 'c': np.inf})


def test_a_killed_process_leaves_every_record_and_the_log_goes_on(path):
  # Would catch: records that wait in a buffer of the process.
  code = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
import itertools, jax
import spd_optax as spd
from audit_log_test import FACTS, states
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
  assert 'versions' in json.loads(path.read_text().splitlines()[len(found) + 1])['resumed']


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


def edited(lines):
  return [*lines[:2], lines[2].replace(b'"step":1', b'"step":9'), *lines[3:]]


@pytest.mark.parametrize(
  ('change', 'problem'),
  [
    (edited, 'line 3: its hash does not fit'),
    (lambda lines: [*lines[:2], *lines[3:]], 'line 3: does not continue the line before'),
    (lambda lines: [*lines[:2], lines[3], lines[2], *lines[4:]], 'line 4: does not continue'),
    (lambda lines: [*lines[:2], b'{"step":1}\n', *lines[2:]], 'line 3: has no hash'),
    (lambda lines: [*lines[:2], lines[2][9:], *lines[3:]], 'line 3: not JSON'),
    (lambda lines: [*lines[:-1], lines[-1].replace(b'loss', b'Loss')], 'line 6: its hash'),
    (lambda lines: [lines[0].replace(b'ones', b'twos'), *lines[1:]], 'line 1: its hash'),
  ],
)
def test_an_edited_or_missing_line_is_found_and_nothing_is_appended(path, change, problem):
  # Would catch: a chain that only looks at the line before, or a damaged log that goes on.
  lines = write(path).read_bytes().splitlines(keepends=True)
  damaged = b''.join(change(lines))
  path.write_bytes(damaged)
  with pytest.raises(audit.AuditFileError, match=problem):
    audit.verify(path)
  (*_, state) = states(6)
  with pytest.raises(audit.AuditFileError, match=problem):
    spd.AuditLog(path, **{**FACTS, 'source': 'ones'}).record(5, state)
  assert path.read_bytes() == damaged


def test_all_problems_are_named_at_once(path):
  lines = write(path).read_bytes().splitlines(keepends=True)
  path.write_bytes(b''.join([*edited(lines)[:4], *lines[5:]]))
  with pytest.raises(audit.AuditFileError) as error:
    audit.read(path)
  assert 'line 3' in str(error.value)
  assert 'line 5' in str(error.value)


def test_an_end_that_was_cut_off_is_found_by_a_hash_kept_elsewhere(path):
  with spd.AuditLog(path, **FACTS) as log:
    for step, state in enumerate(states(3)):
      log.record(step, state)
  assert audit.verify(path, log.hash).hash == log.hash
  path.write_bytes(b''.join(path.read_bytes().splitlines(keepends=True)[:-1]))
  audit.verify(path)
  with pytest.raises(audit.AuditFileError, match='the end was cut off'):
    audit.verify(path, log.hash)


@pytest.mark.parametrize(
  ('content', 'problem'),
  [
    (b'{"a": 1}\n', 'no audit log'),
    (b'\x89PNG\r\n\x1a\n' + b'\0' * 30, 'no audit log'),
    (b'hello', 'no audit log'),
    (b'[1]\n', 'no audit log'),
    (reading.seal({'format': reading.FORMAT, 'schema': 2}, '')[0], 'has schema 2'),
    (reading.seal({'format': reading.FORMAT, 'schema': 1}, '')[0], 'lacks layers'),
  ],
)
def test_a_foreign_or_newer_file_is_refused_before_training(path, content, problem):
  # Would catch: a log that is appended to somebody's data.
  path.write_bytes(content)
  with pytest.raises(audit.AuditFileError, match=problem):
    spd.AuditLog(path, **FACTS)
  with pytest.raises(audit.AuditFileError, match=problem):
    audit.read(path)
  assert path.read_bytes() == content


def test_a_path_that_is_no_file_is_refused_before_training(tmp_path):
  with pytest.raises(IsADirectoryError, match='pass a file'):
    spd.AuditLog(tmp_path, **FACTS)
  with pytest.raises(FileNotFoundError, match='no such directory'):
    spd.AuditLog(tmp_path / 'nowhere' / 'run.jsonl', **FACTS)
  with pytest.raises(OSError, match='not a regular file'):
    spd.AuditLog('/dev/full', **FACTS)
  with pytest.raises(audit.AuditFileError, match='a directory'):
    audit.read(tmp_path)


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
    with pytest.raises(OSError, match='it ends with its last whole record'):
      log.flush()
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
  assert path.read_bytes() == whole
  log.record(4, fifth)
  log.close()
  assert [record.step for record in audit.verify(path).records] == [0, 1, 2, 3, 4]


def test_a_log_of_another_run_is_refused_naming_all_differences(path):
  # Would catch: two runs in one file.
  whole = write(path).read_bytes()
  params = {'kernel': jnp.zeros((2, 3)), 'new': jnp.zeros(3)}
  (state,) = states(1, params=params)
  log = spd.AuditLog(path, transform='adam_spd', hyperparameters={'lr': 0.2}, source='zeros')
  with pytest.raises(ValueError, match='the log of another run') as error:
    log.record(5, state)
  for part in ('transform:', 'hyperparameters:', 'anchor source:', 'anchor fingerprint:'):
    assert part in str(error.value)
  assert 'layer bias: only in the file' in str(error.value)
  assert 'layer new: only now' in str(error.value)
  assert path.read_bytes() == whole


def test_an_anchor_that_is_meant_to_move_may_be_another_on_reopening(path):
  write(path, moving_anchor=True)
  (*_, state) = states(6)
  with spd.AuditLog(path, **FACTS, moving_anchor=True) as log:
    log.record(5, spd.reanchor(state, {**PARAMS, 'bias': jnp.ones(3)}))
  assert np.isnan(audit.verify(path).norms).all()


def test_before_the_first_update_there_is_nothing_to_log(path):
  # Would catch: a fingerprint of random weights, logged at step 0, as that of the anchor.
  random = {'kernel': jnp.full((2, 3), 0.5), 'bias': jnp.zeros(3)}
  (after,) = states(1)
  log = spd.AuditLog(path, **FACTS)
  with pytest.raises(ValueError, match='record after the first update'):
    log.record(0, TX.init(random), {'accuracy': 0.9})
  assert not path.exists()
  log.record(1, after)
  log.close()
  anchor = optax.tree.get(after, 'anchor')
  assert audit.verify(path).header['anchor']['fingerprint'] == spd.fingerprint(anchor)


def test_metrics_are_those_of_their_step(path):
  # Would catch: a value that is changed or donated before its record is written.
  changing, donated = np.array(1.0), jnp.array(2.0)
  first, second = states(2)
  with spd.AuditLog(path, **FACTS) as log:
    log.record(1, first, {'a': changing, 'b': donated})
    changing[...] = 7.0
    jax.jit(lambda x: x + 1, donate_argnums=0)(donated)
    log.record(2, second)
  assert audit.verify(path).records[0].metrics == {'a': 1.0, 'b': 2.0}


def test_a_closed_log_can_be_opened_beside_a_forked_child(path):
  # Would catch: a lock that lives on in a data loader's workers.
  first, second = states(2)
  log = spd.AuditLog(path, **FACTS)
  log.record(0, first)
  child = subprocess.Popen(['sleep', '60'], pass_fds=[log._file._file])
  try:
    log.close()
    with spd.AuditLog(path, **FACTS) as log:
      log.record(1, second)
  finally:
    child.kill()
    child.wait()
  assert len(audit.verify(path).records) == 2


@pytest.mark.parametrize('how', ['record', 'flush', 'close', 'with'])
def test_a_warning_is_for_the_line_that_logs(path, how):
  # Would catch: warnings that point into the library, where nobody can act on them.
  (state,) = states(1)
  with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter('always')
    with spd.AuditLog(path, **FACTS, fsync=how == 'record') as log:
      log.record(0, state, {'loss': np.nan})
      if how in ('flush', 'close'):
        getattr(log, how)()
  assert [(w.category, w.filename) for w in caught] == [(audit.AuditWarning, __file__)]


def test_a_record_does_not_wait_for_its_step_unless_it_is_to_be_safe(path):
  # Would catch: a device that stands still while the host writes.
  (state,) = states(1)
  with spd.AuditLog(path, **FACTS) as log:
    log.record(0, state)
    assert len(audit.read(path).records) == 0
  assert len(audit.read(path).records) == 1
  (*_, state) = states(2)
  log = spd.AuditLog(path, **FACTS, fsync=True)
  log.record(1, state)
  assert len(audit.read(path).records) == 2


def test_a_process_that_ends_without_closing_keeps_its_last_record(path):
  # With one device, where all values travel together unasked.
  code = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
import jax
import spd_optax as spd
from audit_log_test import FACTS, states
assert jax.device_count() == 1
log = spd.AuditLog({str(path)!r}, **FACTS)
for step, state in enumerate(states(3)):
  log.record(step, state)
"""
  one = {**os.environ, 'XLA_FLAGS': '', 'JAX_PLATFORMS': 'cpu'}
  subprocess.run([sys.executable, '-c', code], check=True, env=one)
  for record, state in zip(audit.verify(path).records, states(3), strict=True):
    own = state.projection_decay
    np.testing.assert_allclose(record.distance, list(own.distance.values()), rtol=1e-6)
    np.testing.assert_array_equal(record.steps, list(own.constrained.values()))


def test_a_state_may_be_donated_right_after_its_record(path):
  # Would catch: a record that is read from buffers that the next step has overwritten.
  step = jax.jit(TX.update, donate_argnums=1)
  state, distances = TX.init(PARAMS), []
  params = PARAMS
  with spd.AuditLog(path, **FACTS) as log:
    for i in range(5):
      updates, state = step(jax.tree.map(jnp.ones_like, params), state, params)
      params = optax.apply_updates(params, updates)
      log.record(i, state)
      distances.append(float(state.projection_decay.distance['kernel']))
  found = [record.distance[1] for record in audit.read(path).records]
  np.testing.assert_allclose(found, distances, rtol=1e-6)


def test_two_writers_of_one_file_are_refused(path):
  # Would catch: two chains in one file.
  first, second = (spd.AuditLog(path, **FACTS) for _ in range(2))
  zeroth, after = states(2)
  first.record(0, zeroth)
  with pytest.raises(BlockingIOError, match='an AuditLog is open on this file'):
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


def test_arguments_are_checked_all_at_once(path):
  with pytest.raises(TypeError, match='hyperparameters') as error:
    spd.AuditLog(path, transform='x', hyperparameters={'lr': optax.constant_schedule(1), 'b': {1}})
  assert 'lr:' in str(error.value)
  assert 'b:' in str(error.value)
  (state,) = states(1)
  log = spd.AuditLog(path, **FACTS)
  with pytest.raises(TypeError, match='must be numbers') as error:
    log.record(0, state, {'a': 'x', 'b': jnp.ones(2), 'c': 1})
  assert "'a'" in str(error.value)
  assert "'b'" in str(error.value)
  with pytest.raises(TypeError, match='expected the state of an optimizer'):
    log.record(0, optax.adam(1e-3).init(PARAMS))
  assert not path.exists()
  log.record(3, state)
  with pytest.raises(ValueError, match='step 3 after step 3'):
    log.record(3, state)


def test_other_processes_write_nothing(path, monkeypatch):
  # Would catch: a file per host, or all hosts in one file.
  monkeypatch.setattr(jax, 'process_index', lambda: 1)
  write(path)
  assert not path.exists()


def advice_of(path, tx, params, gradient, count=120, **facts):
  """The codes and messages that a run of such gradients provokes, and those of its file."""
  with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter('always')
    with spd.AuditLog(path, **{**FACTS, **facts}) as log:
      for step, state in enumerate(states(count, tx, params, gradient)):
        log.record(step, state)
  given = [str(w.message) for w in caught if issubclass(w.category, audit.AuditWarning)]
  found = audit.advise(audit.read(path))
  assert given == [f'step {advice.step}: {advice.message}' for advice in found]
  return {advice.code: advice for advice in found}


def test_it_warns_once_where_no_layer_was_ever_held(path):
  # Would catch: a run of weeks that turns out to have been Adam's.
  found = advice_of(path, TX, PARAMS, lambda i: 1.0)
  assert found.keys() == {'never held'}
  for part in ('has not constrained any layer', 'inner optimizer', 'learning rate', 'momentum'):
    assert part in found['never held'].message


def test_it_warns_where_every_layer_is_always_held(path):
  # An anchor that the loss wants to reach from the first step on: not where training started.
  anchor = jax.tree.map(lambda p: p - 1, PARAMS)
  tx = optax.chain(spd.projection_decay(anchor), optax.sgd(1e-4))
  found = advice_of(path, tx, PARAMS, lambda i: 1.0)
  assert found.keys() == {'always held'}
  for part in ('100 % of the layers', 'margin', 'anchor', 'sign of the loss'):
    assert part in found['always held'].message


def test_it_warns_where_a_captured_anchor_is_not_the_start(path):
  # The state of an earlier run with params that were loaded anew.
  state = TX.init(PARAMS)._replace()
  own = state.projection_decay._replace(count=jnp.ones([], jnp.int32))
  other = jax.tree.map(lambda p: p + 2, PARAMS)
  _, state = TX.update(PARAMS, state._replace(projection_decay=own), other)
  log = spd.AuditLog(path, **{**FACTS, 'source': None})
  log.record(0, state)
  with pytest.warns(audit.AuditWarning, match='the anchor is not where training started'):
    log.close()


def test_it_warns_where_the_first_update_already_finds_the_params_elsewhere(path):
  (state,) = states(1)
  own = state.projection_decay
  away = own._replace(distance={'kernel': jnp.float32(0.1), 'bias': jnp.float32(0)})
  log = spd.AuditLog(path, **{**FACTS, 'source': None})
  log.record(0, state._replace(projection_decay=away))
  with pytest.warns(audit.AuditWarning, match='kernel'):
    log.close()


def test_it_warns_where_a_held_layer_goes_away_all_the_same(path):
  # Behind the optimizer it sees an update that points outward, and takes it for a gradient.
  tx = optax.chain(optax.adam(1e-2), spd.projection_decay())
  found = advice_of(path, tx, PARAMS, lambda i: 1.0)
  assert 'behind the optimizer' in found['growing'].message
  assert 'kernel' in found['growing'].message


def test_it_warns_of_values_that_are_not_finite_and_names_the_layers(path):
  found = advice_of(path, TX, PARAMS, lambda i: np.nan if i == 3 else 1.0, 6)
  assert found.keys() == {'not finite'}
  assert 'bias, kernel' in found['not finite'].message


def test_it_is_silent_on_a_run_that_holds_some_layers(path):
  # Would catch: warnings that people learn to ignore.
  noise = np.random.default_rng(0).normal(size=200)
  found = advice_of(path, spd.adam_spd(1e-2), PARAMS, lambda i: noise[i] + 0.1, 200, source=None)
  assert not found
