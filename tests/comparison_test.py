"""What the examples share: the optimizers that they compare, and what the audit logs say."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import comparison
import spd_optax as spd
from spd_optax import audit

pytestmark = pytest.mark.examples

PARAMS, ANCHOR = {'w': jnp.ones(3)}, {'w': jnp.zeros(3)}


def course(tx):
  """The updates of two steps, of which SPD is to hold the second."""
  state, params, found = tx.init(PARAMS), PARAMS, []
  step = jax.jit(tx.update)
  for gradient in (-1.0, 0.1):
    updates, state = step(jax.tree.map(lambda p, g=gradient: g * p, PARAMS), state, params)
    params = optax.apply_updates(params, updates)
    found.append(updates['w'])
  return np.array(found)


def test_the_settings_that_are_logged_are_those_of_the_optimizer():
  """Catches a log that says another strength, or none."""
  courses = {}
  for name, optimizer in comparison.methods(0.1, ANCHOR).items():
    settings = comparison.settings(name, 0.1)
    if not name.startswith(('projection_decay', 'adam_spd')):
      assert settings == {}
      continue
    lr = settings.pop('learning_rate')
    if name == 'adam_spd':
      expected = spd.adam_spd(lr, ANCHOR, **settings)
    else:
      expected = optax.chain(spd.projection_decay(ANCHOR, **settings), optax.adam(lr))
    courses[name] = course(optimizer)
    np.testing.assert_array_equal(courses[name], course(expected))
  assert len({values.tobytes() for values in courses.values()}) == len(courses) == 3


def test_settings_are_known_for_the_methods_of_every_example():
  """Catches a new method whose log has no hyperparameters."""
  firm, exact = {'strength': 10.0, 'margin': 0.1}, {'strength': 1.0, 'margin': 0.0}
  for name, expected in {
    'projection_decay, firm, anchor 0': firm,
    'projection_decay, anchor 0': comparison.DEFAULT,
    'projection_decay, firm, following': firm,
    'projection_decay, λ = 10, m = 0.1': firm,
    'adam_spd, frozen embedding': exact,
    'adam_spd, SignificantProjection': {'strength': 1.0, 'z': 0.0, 'decay': 0.95, 'near': 20.0},
  }.items():
    assert comparison.settings(name, 0.1) == {'learning_rate': 0.1, **expected}


def test_a_log_of_an_example_has_them_and_is_begun_anew(tmp_path):
  """Catches a second run of an example that goes on with the log of the first."""
  tx = spd.adam_spd(1e-3, ANCHOR)
  _, state = tx.update(PARAMS, tx.init(PARAMS), PARAMS)
  for _ in range(2):
    facts = {'strength': 1.0}
    with comparison.audit_log(tmp_path, 'adam_spd', facts, ANCHOR, captured=False) as record:
      record(1, PARAMS, state)
  run = audit.verify(tmp_path / 'adam_spd.jsonl')
  assert len(run.records) == 1
  assert run.header.hyperparameters == {'strength': 1.0}
  assert run.header.anchor.captured is False


def test_a_method_without_spd_has_a_log_of_distances(tmp_path):
  """Catches a baseline that is missing beside the others, or is measured from elsewhere."""
  moved = jax.tree.map(lambda x: x + 1, PARAMS)
  with comparison.audit_log(tmp_path, 'Adam', {}, PARAMS, captured=False) as record:
    record(1, moved, optax.adam(1e-3).init(PARAMS))
  run = audit.verify(tmp_path / 'Adam.jsonl')
  assert run.header.baseline
  sizes = [x.size for x in jax.tree.leaves(PARAMS)]
  np.testing.assert_allclose(np.sort(run.records[0].distance), np.sqrt(np.sort(sizes)), rtol=1e-6)
