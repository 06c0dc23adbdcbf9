"""A run without SPD in the log, beside one with it."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from audited import run

import spd_optax as spd
from spd_optax import audit

START = {
  'blocks': {'kernel': np.arange(12.0).reshape(2, 2, 3), 'bias': np.ones((2, 3))},
  'head': np.full(3, 2.0),
}
ANCHOR = {'blocks': START['blocks'], 'head': None}
OPTIONS = {'stack_axis': {0: 'blocks'}}


def away(params):
  """The second slice of each block moves by 1 in every weight, the head by 7."""
  moved = {name: np.stack([x[0], x[1] + 1]) for name, x in params['blocks'].items()}
  return {'blocks': moved, 'head': params['head'] + 7}


@pytest.mark.parametrize('wrap', [lambda f: f, jax.jit], ids=['eager', 'jit'])
def test_it_has_the_distance_of_every_layer_and_holds_none(wrap):
  """Catches a distance of another layer, of a free one, or over all slices of a stack."""
  made = wrap(lambda params, count: spd.baseline_state(params, ANCHOR, count, **OPTIONS))
  state = made(away(START), 5)
  report = {record.name: record for record in spd.layer_report(state, **OPTIONS)}
  assert {name: round(x.distance**2) for name, x in report.items()} == {
    'blocks/bias[0]': 0, 'blocks/bias[1]': 3, 'blocks/kernel[0]': 0, 'blocks/kernel[1]': 6,
  }  # fmt: skip
  np.testing.assert_allclose(report['blocks/bias[1]'].relative_distance, 1, rtol=1e-6)
  assert not any(x.condition or x.constrained or x.ratio for x in report.values())
  assert int(state.count) == 5


def test_it_has_the_structure_of_the_state_of_spd():
  """Catches layers that cannot stand beside those of the other log."""
  wanted = spd.projection_decay(ANCHOR, **OPTIONS).init(START)
  state = spd.baseline_state(START, ANCHOR, 0, **OPTIONS)
  assert jax.tree.map(lambda x: (x.shape, x.dtype), state) == jax.tree.map(
    lambda x: (x.shape, x.dtype), wanted
  )


def test_a_log_of_adam_stands_beside_one_with_spd(tmp_path, capsys):
  """Catches advice to a run without SPD, and a report that calls it a run of SPD."""
  paths = [tmp_path / 'adam.jsonl', tmp_path / 'adam_spd.jsonl']
  for path, tx in zip(paths, (optax.adam(0.1), spd.adam_spd(0.1, ANCHOR, **OPTIONS)), strict=True):
    params, state, step = START, tx.init(START), jax.jit(tx.update)
    plain = path == paths[0]
    with warnings.catch_warnings(), spd.AuditLog(path, transform=path.stem, baseline=plain) as log:
      warnings.simplefilter('error')
      for i in range(1, 111):
        gradients = jax.tree.map(lambda x, i=i: jnp.full_like(x, (1, 1, -0.5)[i % 3]), params)
        updates, state = step(gradients, state, params)
        params = optax.apply_updates(params, updates)
        logged = spd.baseline_state(params, ANCHOR, i, **OPTIONS) if plain else state
        log.record(i, logged, {'loss': 1 / i})
  assert audit.read(paths[0]).layers == audit.read(paths[1]).layers
  assert not audit.advise(audit.read(paths[0]))
  assert run('compare', *paths, '--out', tmp_path) == 0
  printed = capsys.readouterr().out
  assert 'A run of 110 updates without SPD. In the end the params are' in printed


def test_a_log_is_of_one_kind(tmp_path):
  """Catches a log of Adam that goes on with SPD."""
  state = spd.baseline_state(START, ANCHOR, 1, **OPTIONS)
  with spd.AuditLog(tmp_path / 'log.jsonl', baseline=True) as log:
    log.record(1, state)
  with (
    spd.AuditLog(tmp_path / 'log.jsonl') as log,
    pytest.raises(ValueError, match='baseline: True in the file, False now'),
  ):
    log.record(2, state)


def test_it_takes_what_the_other_run_has():
  """Catches a head in one log and not in the other, and a narrow anchor that one run refuses."""
  narrow = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), START)
  options = {'free': 'head', 'anchor_dtype': jnp.bfloat16, **OPTIONS}
  tx = spd.projection_decay(narrow, **options)
  with_spd = [record.name for record in spd.layer_report(tx.init(START), **OPTIONS)]
  state = spd.baseline_state(away(START), narrow, 1, **options)
  report = {record.name: record for record in spd.layer_report(state, **OPTIONS)}
  assert [*report] == with_spd
  np.testing.assert_allclose(report['blocks/bias[1]'].distance, 3**0.5, rtol=1e-6)
