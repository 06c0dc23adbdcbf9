"""Wrong calls of reports and of the audit log; see `wrong_calls`."""

import itertools
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from wrong_calls import ADAM, PARAMS
from wrong_calls_of_states import FOLDER, NO_STATE, NPZ, STATE, WRAPPED, Table

import spd_optax as spd
from spd_optax import audit

SHAPES = jax.eval_shape(lambda: STATE)
TWO = jax.tree.map(lambda x: jnp.stack([x, x]), STATE)
HELD = optax.tree.set(
  STATE, constrained=jax.tree.map(jnp.ones_like, optax.tree.get(STATE, 'constrained'))
)
NUMBERS = itertools.count()


def log(**options: Any) -> spd.AuditLog:
  return spd.AuditLog(FOLDER / f'{next(NUMBERS)}.jsonl', **{'transform': 'adam_spd'} | options)


def record(step: Any = 1, state: Any = STATE, metrics: Any = None, **options: Any) -> None:
  with log(**options) as file:
    file.record(step, state, metrics)


def twice() -> None:
  with log() as file:
    file.record(3, STATE)
    file.record(3, STATE)


def verified(hash: Any) -> audit.Run:
  with log() as file:
    file.record(1, STATE)
  return audit.verify(file.path, hash)


REPORTS: Table = [
  row
  for name, report in (('layer_report', spd.layer_report), ('scalars', spd.scalars))
  for row in (
    (f'{name}.opt_state', partial(report, None), TypeError, f'{name}: {NO_STATE} NoneType'),
    (f'{name}.opt_state', partial(report, PARAMS), TypeError, f'{name}: {NO_STATE} dict'),
    (
      f'{name}.opt_state',
      partial(report, WRAPPED),
      TypeError,
      f'{name}: {NO_STATE} an optax',
    ),
    (f'{name}.opt_state', partial(report, ADAM.init(PARAMS)), TypeError, f'{NO_STATE} tuple'),
    (f'{name}.opt_state', partial(report, SHAPES), TypeError, f'{name}: .*a step returned'),
    (f'{name}.opt_state', partial(report, TWO), ValueError, r'shape \(2,\) & vmap'),
    (f'{name}.opt_state', partial(jax.jit(report), STATE), TypeError, f'{name}: .*outside jit'),
    (f'{name}.stack_axis', partial(report, STATE, stack_axis=0), ValueError, r'head: .*0.*\(\)'),
    (f'{name}.stack_axis', partial(report, STATE, stack_axis='0'), ValueError, "enc/k: .*'0'"),
    (
      f'{name}.stack_axis',
      partial(report, STATE, stack_axis={'enc': 0, 'head': None}),
      ValueError,
      r'must be those of the transformation & enc/k: \(\) in the state',
    ),
    (f'{name}.group', partial(report, STATE, group=3), TypeError, 'group: .*int 3'),
    (
      f'{name}.group',
      partial(report, STATE, group=lambda path: 'all'),
      ValueError,
      'must be those of the transformation & all: nothing in the state',
    ),
  )
]
BASELINE: Table = [
  (
    'baseline_state.params',
    lambda: spd.baseline_state({'enc': 'x'}, 0, 1),
    TypeError,
    "params & enc: .*'x'",
  ),
  (
    'baseline_state.anchor',
    lambda: spd.baseline_state(PARAMS, None, 1),
    TypeError,
    'anchor: expected the pre-trained weights, found None',
  ),
  (
    'baseline_state.anchor',
    lambda: spd.baseline_state(PARAMS, {'enc': 0}, 1),
    ValueError,
    'anchor & head',
  ),
  (
    'baseline_state.anchor',
    lambda: spd.baseline_state(PARAMS, jax.eval_shape(lambda: PARAMS), 1),
    TypeError,
    'anchor: expected values & enc/k$ & head$',
  ),
  (
    'baseline_state.free',
    lambda: spd.baseline_state(PARAMS, 0, 1, free='no'),
    ValueError,
    "free: & 'no': the params are",
  ),
  (
    'baseline_state.anchor_dtype',
    lambda: spd.baseline_state(PARAMS, 0, 1, anchor_dtype=int),
    TypeError,
    'anchor_dtype: .*floating',
  ),
  ('baseline_state.count', lambda: spd.baseline_state(PARAMS, 0, -1), ValueError, 'count: .*-1'),
  ('baseline_state.count', lambda: spd.baseline_state(PARAMS, 0, 1.5), ValueError, 'count: .*1.5'),
  ('baseline_state.count', lambda: spd.baseline_state(PARAMS, 0, 'x'), TypeError, "count: .*'x'"),
  (
    'baseline_state.stack_axis',
    lambda: spd.baseline_state(PARAMS, 0, 1, stack_axis='0'),
    ValueError,
    "enc/k: .*'0'",
  ),
  (
    'baseline_state.group',
    lambda: spd.baseline_state(PARAMS, 0, 1, group=3),
    TypeError,
    'group: .*int 3',
  ),
]
JSON = 'hyperparameters & finite number, a string, None'
AUDIT: Table = [
  (
    'AuditLog.path',
    lambda: spd.AuditLog(FOLDER, transform='a'),
    audit.AuditFileError,
    'a directory or a device; pass the .jsonl',
  ),
  (
    'AuditLog.path',
    lambda: spd.AuditLog(FOLDER / 'no' / 'a.jsonl', transform='a'),
    FileNotFoundError,
    'no such directory',
  ),
  ('AuditLog.path', lambda: spd.AuditLog(NPZ, transform='a'), audit.AuditFileError, 'no audit log'),
  (
    'AuditLog.hyperparameters',
    lambda: log(hyperparameters={'f': max}),
    TypeError,
    f"{JSON} & 'f': ",
  ),
  (
    'AuditLog.hyperparameters',
    lambda: log(hyperparameters={'x': np.nan}),
    TypeError,
    "'x': .*float nan",
  ),
  ('AuditLog.transform', lambda: log(transform=1e-3), TypeError, 'transform: .*string.*0.001'),
  ('AuditLog.source', lambda: log(source=3), TypeError, 'source: .*path or None.*3'),
  ('AuditLog.captured', lambda: log(captured='no'), TypeError, "captured: .*True.*'no'"),
  ('AuditLog.baseline', lambda: log(baseline='no'), TypeError, "baseline: .*True or False.*'no'"),
  (
    'AuditLog.baseline',
    lambda: record(1, HELD, baseline=True),
    ValueError,
    'has SPD, which held layers',
  ),
  ('AuditLog.patience', lambda: log(patience=0), TypeError, 'patience: .*1 or more.*0'),
  ('AuditLog.patience', lambda: log(patience='x'), TypeError, "patience: .*1 or more.*'x'"),
  ('AuditLog.stack_axis', lambda: record(stack_axis=0), ValueError, r'head: .*0.*\(\)'),
  ('AuditLog.group', lambda: record(group=3), TypeError, 'group: .*int 3'),
  ('AuditLog.record.step', twice, ValueError, 'step 3 after step 3'),
  ('AuditLog.record.opt_state', lambda: record(STATE, 1), TypeError, f'{NO_STATE} int '),
  ('AuditLog.record.opt_state', lambda: record(1, None), TypeError, f'{NO_STATE} NoneType'),
  ('AuditLog.record.opt_state', lambda: record(1, SHAPES), TypeError, 'a step returned'),
  ('AuditLog.record.opt_state', lambda: record(1, TWO), ValueError, r'shape \(2,\) & vmap'),
  (
    'AuditLog.record.opt_state',
    lambda: jax.jit(partial(record, 1))(STATE),
    TypeError,
    'outside jit',
  ),
  ('AuditLog.record.metrics', lambda: record(metrics={'a': 'x'}), TypeError, "'a': str 'x'"),
  (
    'AuditLog.record.metrics',
    lambda: record(metrics={'a': np.ones(2)}),
    TypeError,
    r"'a': .*\[2\]",
  ),
  (
    'read.path',
    lambda: audit.read(FOLDER),
    audit.AuditFileError,
    'a directory or a device; pass the .jsonl',
  ),
  ('read.path', lambda: audit.read(NPZ), audit.AuditFileError, 'no audit log; expected a first'),
  (
    'verify.path',
    lambda: audit.verify(NPZ),
    audit.AuditFileError,
    'no audit log; expected a first',
  ),
  ('verify.hash', lambda: verified('abc'), audit.AuditFileError, 'no line has the hash abc'),
]
