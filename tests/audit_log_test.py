"""What an audit log says: nothing false, and all of it."""

import json
import os
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from audited import FACTS, PARAMS, TX, made_up, states, write
from audited import run as run_command

import spd_optax as spd
from spd_optax import audit
from spd_optax.audit import pictures, report


@pytest.fixture
def path(tmp_path):
  return tmp_path / 'run.jsonl'


def test_a_log_says_what_the_states_said(path):
  # Would catch: values of another layer, or that are rounded to nothing.
  write(path)
  run = audit.verify(path)
  assert run.layers == ['bias', 'kernel']
  assert run.header.anchor.fingerprint == spd.fingerprint(PARAMS)
  assert run.header.anchor.source == 'ones'
  assert run.header.versions['jax'] == jax.__version__
  assert run.header.schema == 1
  np.testing.assert_allclose(run.norms, [0, 6**0.5], rtol=1e-6)
  for step, (record, state) in enumerate(zip(run.records, states(5), strict=True)):
    own = state.projection_decay
    assert (record.step, record.metrics) == (step, {'loss': 1 / (step + 1)})
    assert record.updates.tolist() == [step + 1, step + 1]
    for i, name in enumerate(run.layers):
      assert record.condition[i] == own.condition[name]
      assert record.constrained[i] == own.constrained[name]
      np.testing.assert_allclose(record.distance[i], own.distance[name], rtol=1e-6)
      np.testing.assert_allclose(record.ratio[i], own.ratio[name], rtol=1e-6)
  assert any(record.condition.any() for record in run.records)


def test_slices_of_stacked_layers_have_a_value_each(path):
  tx = spd.adam_spd(1e-3, stack_axis={'kernel': 0, 'bias': None})
  with spd.AuditLog(path, **FACTS) as log:
    for step, state in enumerate(states(2, tx)):
      log.record(step, state)
  assert audit.read(path).layers == ['bias', 'kernel[0]', 'kernel[1]']


def test_the_numbers_of_a_rule_are_logged_by_name(path):
  # Would catch: a number that is taken for another, or given to another layer.
  made_up(path, ['b', 'a', 'c/d'], steps=2, numbers=('square', 'mean'))
  run = audit.verify(path)
  assert run.layers == ['a', 'b', 'c/d']
  for step, record in enumerate(run.records, 1):
    assert record.rule_state.keys() == {'square', 'mean'}
    for k, name in enumerate(('square', 'mean')):
      values = np.float32([1, 0, 2]) + k + step / 100
      np.testing.assert_allclose(record.rule_state[name], values, rtol=1e-6)


def test_a_rule_with_other_numbers_is_refused(path):
  # Would catch: a state of another rule that goes on in the same log.
  one = [{'a': np.zeros((), dtype)} for dtype in (bool, np.float32, np.float32, np.int32)]
  log = spd.AuditLog(path, transform='x')
  states = [
    spd.ProjectionDecayState(np.int32(1), {'a': np.ones(2)}, *one, numbers)
    for numbers in ({'mean': {'a': np.float32(1)}}, {})
  ]
  log.record(1, states[0])
  with pytest.raises(ValueError, match='layers are not those of the first'):
    log.record(2, states[1])


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


def test_before_the_first_update_there_is_nothing_to_log(path):
  # Would catch: a fingerprint of random weights, logged at step 0, as that of the anchor; a run
  # that ends since its first update was withheld.
  random = {'kernel': jnp.full((2, 3), 0.5), 'bias': jnp.zeros(3)}
  (after,) = states(1)
  log = spd.AuditLog(path, **FACTS)
  with pytest.warns(audit.AuditWarning, match='no record of step 0: SPD has made no update'):
    log.record(0, TX.init(random), {'accuracy': 0.9})
  log.record(1, TX.init(random))  # no second warning
  assert not path.exists()
  log.record(1, after)
  log.close()
  anchor = optax.tree.get(after, 'anchor')
  assert audit.verify(path).header.anchor.fingerprint == spd.fingerprint(anchor)


@pytest.mark.parametrize(
  'metric', [1j, jnp.array(1j), jax.ShapeDtypeStruct((), jnp.float32)], ids=repr
)
def test_a_metric_without_a_real_value_harms_no_other_record(path, metric):
  # Would catch: an error at the next record, and at each one after it.
  first, second = states(2)
  with spd.AuditLog(path, **FACTS) as log:
    log.record(1, first)
    with pytest.raises(TypeError, match="'loss': "):
      log.record(2, second, {'loss': metric})
    log.record(2, second)
  assert [record.step for record in audit.verify(path).records] == [1, 2]


def test_a_step_that_fails_on_the_device_has_no_record(path, monkeypatch):
  # Would catch: a log that waits for that step again and again, also in `close`.
  first, second, third = states(3)
  begin = spd.reports.begin

  def failing(of):
    if of[0].count != 2:
      return begin(of)

    def wait():
      raise RuntimeError('out of memory')

    return wait

  monkeypatch.setattr(spd.reports, 'begin', failing)
  with spd.AuditLog(path, **FACTS) as log:
    log.record(1, first)
    log.record(2, second)
    with pytest.raises(RuntimeError, match='out of memory'):
      log.flush()
    log.record(3, third)
  assert [record.step for record in audit.verify(path).records] == [1, 3]


def test_an_optimizer_that_holds_nothing_has_a_log(path):
  tx = spd.adam_spd(1e-3, free='*')
  with spd.AuditLog(path, **FACTS) as log:
    for step, state in enumerate(states(2, tx)):
      log.record(step, state, {'loss': 1.0})
  run = audit.verify(path)
  assert (run.layers, [record.step for record in run.records]) == ([], [0, 1])


def test_a_part_without_layers_has_no_number(path):
  # Would catch: the budget of another part's layers, or none.
  tx = optax.partition(
    {name: spd.adam_spd(1e-3, strength=spd.within_distance(0.5)) for name in 'ab'},
    {'kernel': 'b', 'bias': 'b', 'steps': 'a'},
  )
  params = PARAMS | {'steps': jnp.arange(3)}
  gradients = jax.tree.map(jnp.ones_like, params)
  _, state = tx.update(gradients, tx.init(params), params)
  with spd.AuditLog(path, **FACTS) as log:
    log.record(1, state)
  run = audit.verify(path)
  assert (run.header.states, [*run.records[0].metrics]) == (
    [2],
    ['spd/budget', 'spd/drift', 'spd/strength', 'spd/measured'],
  )
  assert run_command('report', path, '--out', path.parent) == 0


def test_a_file_that_was_emptied_begins_anew(path):
  # Would catch: lines without a first line, which nothing can read.
  with spd.AuditLog(path, **FACTS) as log:
    for step, state in enumerate(states(3)):
      log.record(step, state)
      log.flush()
      if step == 0:
        os.truncate(path, 0)
  assert [record.step for record in audit.verify(path).records] == [1, 2]


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


def test_arguments_are_checked_all_at_once(path):
  # Would catch: a header that cannot be written when the first step is done.
  settings = {'lr': optax.constant_schedule(1), 'b': {1}, 3: 1.0, 'nan': np.nan, 'good': 1}
  wrong = {'source': b'x', 'captured': 'yes'}
  with pytest.raises(TypeError, match='AuditLog:') as error:
    spd.AuditLog(path, transform=spd.adam_spd, hyperparameters=settings, **wrong)
  for part in (
    'transform:',
    'source:',
    'captured:',
    "'lr':",
    "'b':",
    ' 3:',
    'nan',
  ):
    assert part in str(error.value), part
  assert 'good' not in str(error.value)
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


def test_paths_and_numbers_of_numpy_become_what_json_can_hold(path):
  # Would catch: source=Path(...) that fails at the first write.
  settings = {'lr': np.float32(0.5), 'data': Path('a/b'), 'betas': (jnp.ones(()), 2)}
  (state,) = states(1)
  with spd.AuditLog(path, transform='x', hyperparameters=settings, source=Path('c/d')) as log:
    log.record(0, state)
  header = audit.read(path).header
  assert header.anchor.source == str(Path('c/d'))
  assert header.hyperparameters == {'lr': 0.5, 'data': str(Path('a/b')), 'betas': [1.0, 2]}


def test_each_part_of_a_partition_counts_its_own_updates(path):
  # Would catch: a share of the updates of another part, which MultiSteps updates more often.
  tx = optax.partition(
    {'each': TX, 'third': optax.MultiSteps(TX, 3)}, {'kernel': 'each', 'bias': 'third'}
  )
  with spd.AuditLog(path, **FACTS) as log:
    for step, state in enumerate(states(12, tx, gradient=lambda i: (1.0, 1.0, -0.2)[i // 3 % 3])):
      if step >= 2:  # before it one part has had no update
        log.record(step, state)
  run = audit.verify(path)
  assert (run.layers, run.header.states) == (['kernel', 'bias'], [1, 1])
  assert [record.updates.tolist() for record in run.records] == [[i, i // 3] for i in range(3, 13)]
  over_time = report.Series(run)
  held = run.records[-1].constrained
  np.testing.assert_allclose(over_time.share, held / [12, 4])
  assert held[1] > 0
  rows = {row[0]: row[2] for row in report.layers_table([over_time]).rows}
  assert rows['bias'] == f'{100 * held[1] / 4:.1f}'
  few = report.Series(run, most=4)
  assert few.edges.tolist() == [2, 5, 8, 11]
  steps = np.array([record.constrained for record in run.records])[::3]
  np.testing.assert_allclose(few.held, np.diff(steps, axis=0) / [3, 1])


def test_a_layer_without_an_update_between_two_records_has_no_share_there(path):
  # Would catch: a warning of a division, or a mean that one such layer makes NaN.
  tx = optax.partition(
    {'each': TX, 'third': optax.MultiSteps(TX, 3)}, {'kernel': 'each', 'bias': 'third'}
  )
  with spd.AuditLog(path, **FACTS) as log:
    for step, state in enumerate(states(7, tx)):
      log.record(step, state)
  over_time = report.Series(audit.verify(path))
  assert np.isnan(over_time.held[:, 1]).tolist() == [True, False, True, True, False, True]
  assert np.isfinite(pictures._panels(over_time)['layers held, %'][1]).all()


@pytest.mark.parametrize('captured', [True, False, None])
@pytest.mark.parametrize('source', ['ones', None])
def test_the_report_says_what_the_user_said_of_the_anchor_and_no_more(path, captured, source):
  # Would catch: an anchor that was passed, and called captured where its source is not named.
  (state,) = states(1)
  with spd.AuditLog(path, transform='x', source=source, captured=captured) as log:
    log.record(0, state)
  run = audit.read(path)
  assert run.header.anchor.captured is captured
  assert run.header.anchor.source == source
  cells = dict(report.facts_table(run).rows)
  assert cells['its source'] == (source or 'not named')
  what = {True: 'captured: the params at the first update', False: 'passed', None: 'not said'}
  assert (cells['anchor'], cells['anchor is zero']) == (what[captured], 'in 1 of 2 layers')


def test_an_anchor_of_zero_is_known_to_be_zero(path):
  # Would catch: "not known" where the state shows that nothing is stored.
  tx = spd.adam_spd(1e-3, 0)
  (state,) = states(1, tx)
  with spd.AuditLog(path, transform='x') as log:
    log.record(0, state)
  run = audit.read(path)
  assert run.norms.tolist() == [0, 0]
  assert dict(report.facts_table(run).rows)['anchor is zero'] == 'in 2 of 2 layers'


def test_the_hash_is_that_of_the_last_line_written(path):
  # Would catch: '' after the first record, whose header is on the disk.
  first, second = states(2)
  log = spd.AuditLog(path, **FACTS)
  assert log.hash == ''
  for step, state in enumerate((first, second)):
    log.record(step, state)
    assert log.hash == json.loads(path.read_text().splitlines()[-1])['hash']
  log.close()
  assert log.hash == audit.verify(path).hash
