"""Audit logs that were cut off, or have bits turned over: an error, or records as they were."""

import tracemalloc

import hypothesis
import jax.numpy as jnp
import numpy as np
import pytest
from damaged_files_test import damages, fewer

import spd_optax as spd
from spd_optax import audit

STEPS = 4


@pytest.fixture(scope='module')
def written(tmp_path_factory):
  """The bytes of a log, its records, and its last hash."""
  params = {'w': jnp.ones((2, 3)), 'b': jnp.ones(2)}
  tx = spd.projection_decay()
  state = tx.init(params)
  path = tmp_path_factory.mktemp('log') / 'run.jsonl'
  with spd.AuditLog(path, transform='projection_decay') as log:
    for step in range(STEPS):
      _, state = tx.update(params, state, params)
      log.record(step, state, {'loss': step / 3})
  return path.read_bytes(), audit.read(path).records, log.hash


@fewer
@hypothesis.given(damage=damages())
def test_a_damaged_log(written, tmp_path, damage):
  """Catches a record that is not as it was written, and an end that is missing unnoticed."""
  content, records, last = written
  path = tmp_path / 'run.jsonl'
  path.write_bytes(damage(content))
  try:
    found = audit.read(path)
  except audit.AuditFileError as error:
    message = str(error)
    found = None
  if found is None:
    assert str(path) in message
    return
  for record, before in zip(found.records, records, strict=False):
    for a, b in zip(record, before, strict=True):
      np.testing.assert_array_equal(a, b)
  if len(found.records) == STEPS:
    assert audit.verify(path, last).records
  else:
    with pytest.raises(audit.AuditFileError, match='no line has the hash'):
      audit.verify(path, last)


@pytest.mark.parametrize(
  'line', [b'0' * (1 << 20), b'{"step":' + b'9' * (1 << 20) + b'}', b'\n' * 9999]
)
def test_lines_without_end(written, tmp_path, line):
  """Catches memory beyond a small factor of the file's size, and numbers that take an age."""
  path = tmp_path / 'run.jsonl'
  path.write_bytes(written[0] + line + b'\n')
  tracemalloc.start()
  with pytest.raises(audit.AuditFileError, match=r'run\.jsonl: not as it was written'):
    audit.read(path)
  peak = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  assert peak < 8 * path.stat().st_size + (1 << 20)
