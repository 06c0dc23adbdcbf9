"""Warnings about a run, each provoked."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from audited import FACTS, PARAMS, TX, states

import spd_optax as spd
from spd_optax import audit
from spd_optax.audit import advice, format


@pytest.fixture
def path(tmp_path):
  return tmp_path / 'run.jsonl'


def advice_of(path, tx, params, gradient, count=120, **facts):
  """The codes and messages that a run of such gradients provokes, and those of its file."""
  with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter('always')
    with spd.AuditLog(path, **{**FACTS, **facts}) as log:
      for step, state in enumerate(states(count, tx, params, gradient)):
        log.record(step, state)
  given = [str(w.message) for w in caught if issubclass(w.category, audit.AuditWarning)]
  found = audit.advise(audit.read(path), facts.get('patience', advice.PATIENCE))
  assert given == [f'step {advice.step}: {advice.message}' for advice in found]
  return {advice.code: advice for advice in found}


def away(p):
  """An anchor from which no constant gradient points straight away, so that no ratio is 1."""
  return p - jnp.arange(1.0, p.size + 1).reshape(p.shape)


def test_it_warns_once_where_no_layer_was_ever_held(path):
  # Would catch: a run of weeks that turns out to have been Adam's.
  found = advice_of(path, TX, PARAMS, lambda i: 1.0)
  assert found.keys() == {'never held'}
  for part in ('has not constrained any layer', 'inner optimizer', 'learning rate', 'momentum'):
    assert part in found['never held'].message


def test_it_warns_where_every_layer_is_always_held(path):
  # An anchor that the loss wants to reach from the first step on: not where training started.
  anchor = jax.tree.map(away, PARAMS)
  tx = optax.chain(spd.projection_decay(anchor), optax.sgd(1e-4))
  found = advice_of(path, tx, PARAMS, lambda i: 1.0)
  assert found.keys() == {'always held'}
  for part in ('100 % of the layers', 'margin', 'anchor', 'sign of the loss'):
    assert part in found['always held'].message


def test_it_is_silent_about_l2_sp_which_holds_every_layer_by_design(path):
  # Would catch: a baseline that is called wrong for being what it is.
  tx = optax.chain(spd.l2_sp(strength=0.01), optax.adam(1e-2))
  assert not advice_of(path, tx, PARAMS, lambda i: 1.0)


def test_it_still_warns_of_what_is_always_held_beside_l2_sp(path):
  # Would catch: one part of the model that hides the other.
  anchor = jax.tree.map(away, PARAMS)
  tx = optax.partition(
    {
      'held': optax.chain(spd.projection_decay({**anchor, 'bias': None}), optax.sgd(1e-4)),
      'pulled': optax.chain(spd.l2_sp(strength=0.01), optax.sgd(1e-4)),
    },
    {'kernel': 'held', 'bias': 'pulled'},
  )
  assert advice_of(path, tx, PARAMS, lambda i: 1.0).keys() == {'always held'}


def test_it_warns_where_a_captured_anchor_is_not_the_start(path):
  # The state of an earlier run with params that were loaded anew.
  state = TX.init(PARAMS)._replace()
  own = state.projection_decay._replace(count=jnp.ones([], jnp.int32))
  other = jax.tree.map(lambda p: p + 2, PARAMS)
  _, state = TX.update(PARAMS, state._replace(projection_decay=own), other)
  log = spd.AuditLog(path, **FACTS, captured=True)
  log.record(0, state)
  with pytest.warns(audit.AuditWarning, match='the anchor is not where training started'):
    log.close()


def test_it_warns_where_the_first_update_already_finds_the_params_elsewhere(path):
  # Would catch: a warning about an anchor that was passed and is meant to be elsewhere.
  (state,) = states(1)
  own = state.projection_decay
  away = own._replace(distance={'kernel': jnp.float32(0.1), 'bias': jnp.float32(0)})
  said = {}
  for source in (None, 'ones'):
    for captured in (True, False, None):
      with spd.AuditLog(path, transform='x', source=source, captured=captured) as log:
        log.record(0, state._replace(projection_decay=away))
        with warnings.catch_warnings(record=True) as caught:
          log.flush()
      said[source, captured] = [str(warning.message) for warning in caught]
      path.unlink()
  expected = {(None, True), (None, None), ('ones', True)}
  assert {key for key, messages in said.items() if messages} == expected
  for part in ('(kernel)', 'load the checkpoint before', 'spd.reanchor', 'captured=False'):
    assert part in said[None, None][0]


def test_it_warns_where_a_held_layer_goes_away_all_the_same(path):
  # Behind the optimizer it sees an update that points outward, and takes it for a gradient.
  tx = optax.chain(optax.adam(1e-2), spd.projection_decay(margin=0.05))
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


def test_patience_is_that_of_the_part_with_the_fewest_updates(path):
  # Would catch: a layer that is judged by one update, because another had a hundred.
  tx = optax.partition(
    {'each': TX, 'tenth': optax.MultiSteps(TX, 10)}, {'kernel': 'each', 'bias': 'tenth'}
  )
  found = advice_of(path, tx, PARAMS, lambda i: 1.0, 60, patience=5)
  assert found['never held'].step == 49
  assert 'in 5 updates' in found['never held'].message


def test_what_is_always_held_only_later_is_found():
  # Would catch: a share over the whole run, in which the end does not show.
  anchor = format.Anchor('', 'x', None, False, [1.0])
  header = format.Header(format.FORMAT, 1, '', {}, '', {}, anchor, ['a'], [1])
  watcher, found = advice.Watcher(header, patience=10), []
  one, none = np.ones(1, np.float32), np.zeros(1, bool)
  for i in range(1, 100):
    count, held = np.array([i], np.int32), np.array([max(i - 25, 0)], np.int32)
    record = audit.Record(i, 0.0, count, none, one, one, held, {}, {}, False)
    found += watcher.see(record)
  assert [advice.code for advice in found] == ['never held', 'always held']
  assert 35 <= found[1].step <= 45
