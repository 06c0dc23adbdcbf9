"""Files that are not as a log was written, or are of another run, are refused and left alone."""

import functools
import json
import tracemalloc

import jax.numpy as jnp
import msgspec
import numpy as np
import pytest
from audited import FACTS, PARAMS, made_up, names, states, write

import spd_optax as spd
from spd_optax import audit
from spd_optax.audit import format


@pytest.fixture
def path(tmp_path):
  return tmp_path / 'run.jsonl'


def sealed(fields):
  """A first line with these fields and a hash that fits."""
  return format.seal(msgspec.defstruct('Any', list(fields))(**fields), '')[0]


def edited(lines):
  return [*lines[:2], lines[2].replace(b'"step":1', b'"step":9'), *lines[3:]]


@pytest.mark.parametrize(
  ('change', 'problem'),
  [
    (edited, 'line 3: its hash does not fit'),
    (lambda lines: [*lines[:2], *lines[3:]], 'line 3: does not continue the line before'),
    (lambda lines: [*lines[:2], lines[3], lines[2], *lines[4:]], 'line 3: does not continue'),
    (lambda lines: [*lines[:2], b'{"step":1}\n', *lines[2:]], 'line 3: its hash does not fit'),
    (lambda lines: [*lines[:2], lines[2][9:], *lines[3:]], 'line 3: its hash does not fit'),
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
    (sealed({'format': format.FORMAT, 'schema': 2}), 'has schema 2'),
    (sealed({'format': format.FORMAT, 'schema': 1}), 'line 1: .* missing required field `started`'),
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
  with pytest.raises(audit.AuditFileError, match=r'a directory or a device; pass the \.jsonl'):
    spd.AuditLog(tmp_path, **FACTS)
  with pytest.raises(FileNotFoundError, match='no such directory'):
    spd.AuditLog(tmp_path / 'nowhere' / 'run.jsonl', **FACTS)
  with pytest.raises(audit.AuditFileError, match='a device'):
    spd.AuditLog('/dev/full', **FACTS)
  with pytest.raises(audit.AuditFileError, match='a directory'):
    audit.read(tmp_path)


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
  assert "layer bias: 'layer 0' in the file, 'nothing' now" in str(error.value)
  assert "layer new: 'nothing' in the file, 'layer 1' now" in str(error.value)
  assert path.read_bytes() == whole


def test_an_anchor_that_is_meant_to_move_may_be_another_on_reopening(path):
  write(path, moving_anchor=True)
  (*_, state) = states(6)
  with spd.AuditLog(path, **FACTS, moving_anchor=True) as log:
    log.record(5, spd.reanchor(state, {**PARAMS, 'bias': jnp.ones(3)}))
  assert np.isnan(audit.verify(path).norms).all()


def sealed_anew(path, change):
  """The first line with other fields and a hash that fits, as a forger would write it."""
  header, *rest = path.read_text().splitlines(keepends=True)
  fields = json.loads(header)
  change(fields)
  del fields['previous'], fields['hash']
  path.write_bytes(sealed(fields) + ''.join(rest).encode())


@pytest.mark.parametrize(
  ('name', 'value'),
  [
    ('schema', '1'),
    ('started', None),
    ('versions', {'jax': 1}),
    ('transform', 3),
    ('hyperparameters', []),
    ('anchor', 5),
    ('layers', 'kernel'),
    ('layers', [1, 2]),
    ('states', [1]),
    ('states', [True, True]),
    ('anchor.norms', 5),
    ('anchor.norms', [1.0]),
    ('anchor.norms', ['1', 2]),
    ('anchor.moving', 0),
    ('anchor.captured', 'yes'),
    ('anchor.source', 1),
    ('anchor.fingerprint', None),
  ],
)
def test_every_field_of_the_header_is_checked_by_name(path, name, value):
  # Would catch: a bare TypeError somewhere behind the reader.
  write(path, 2)

  def change(fields):
    (fields['anchor'] if '.' in name else fields)[name.rpartition('.')[2]] = value

  sealed_anew(path, change)
  for call in (audit.read, functools.partial(spd.AuditLog, **FACTS)):
    with pytest.raises(audit.AuditFileError, match='line 1: was edited') as error:
      call(path)
    assert name in str(error.value)


def test_a_foreign_file_without_lines_is_not_read_whole(path):
  # Would catch: gigabytes in memory of a file that is one line.
  with path.open('wb') as file:
    file.truncate(2**40)  # sparse
  with pytest.raises(audit.AuditFileError, match='no audit log'):
    audit.read(path)


def test_reopening_keeps_no_record_in_memory(path):
  # Would catch: a restart that takes as much memory as the log.
  made_up(path, names(400), steps=100)
  tracemalloc.start()
  lines = format.Lines(path)
  for _ in lines:
    pass
  peak = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  assert (lines.count, lines.whole) == (101, path.stat().st_size)
  assert peak < path.stat().st_size / 4
