"""What JAX refuses when it is asked to: NaNs, promotion of dtypes or ranks, implicit transfers."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import spd_optax as spd

SGD = optax.sgd(0.1, momentum=0.9)  # Adam itself promotes dtypes
SCHEDULE = optax.linear_schedule(0.0, 1.0, 9)
# Every strength, and every rule with numbers of its own, in a chain and around an optimizer.
OPTIONS: dict[str, Any] = {
  'defaults': {},
  'schedule': {'strength': SCHEDULE, 'margin': 0.05},
  'within_budget': {'strength': spd.within_budget(0.1)},
  'within_distance': {'strength': spd.within_distance(0.1)},
  'SignificantProjection': {'rule': spd.SignificantProjection()},
}
LINKS: dict[str, Any] = {'l2_sp': spd.l2_sp} | {
  name: lambda o=options: spd.projection_decay(**o)
  for name, options in OPTIONS.items()
  if 'rule' not in options  # which is for steps
}
MAKERS = {
  f'{name}, in a chain': lambda link=link: optax.chain(link(), SGD) for name, link in LINKS.items()
} | {
  f'{name}, around': lambda o=options: spd.with_projection_decay(SGD, **o)
  for name, options in OPTIONS.items()
}
MODES: dict[str, Any] = {
  'NaNs': lambda: jax.debug_nans(True),
  'dtypes': lambda: jax.numpy_dtype_promotion('strict'),
  'ranks': lambda: jax.numpy_rank_promotion('raise'),
}


def gradients(i: int) -> Any:
  """Away from the anchor, and home."""
  return {'kernel': jnp.full((2, 3), (-1.0) ** i), 'bias': jnp.zeros(3)}


@pytest.mark.parametrize('jit', [True, False], ids=['jit', 'eager'])
@pytest.mark.parametrize('mode', MODES)
@pytest.mark.parametrize('name', MAKERS)
def test_a_step(name, mode, jit):
  """Catches NaN for 'not measured', a count that becomes a float, and a broadcast of ranks."""
  params = {'kernel': jnp.ones((2, 3)), 'bias': jnp.zeros(3)}
  with MODES[mode]():
    tx = MAKERS[name]()
    update = jax.jit(tx.update) if jit else tx.update
    state = tx.init(params)
    for i, drift in enumerate([float('nan'), 0.0, 0.2]):
      updates, state = update(gradients(i), state, params, drift=drift)
      params = optax.apply_updates(params, updates)
  found = spd.scalars(state)
  assert np.isfinite(list(found.values())).all()


def test_a_margin_on_a_device_transfers_nothing_unasked():
  margin = jax.device_put(jnp.float32(0.1))
  with jax.transfer_guard('disallow'):
    spd.with_projection_decay(SGD, margin=margin)


def test_a_log_transfers_nothing_unasked(tmp_path):
  """Not even for the fingerprint in its first line."""
  params = gradients(0)
  tx = spd.with_projection_decay(SGD)
  _, state = tx.update(params, tx.init(params), params)
  with jax.transfer_guard('disallow'), spd.AuditLog(tmp_path / 'run.jsonl') as log:
    log.record(1, state)
    spd.layer_report(state)
