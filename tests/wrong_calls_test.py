"""Every wrong call of the tables is an error of ours that says where, what and what to do."""

import inspect
import re
import traceback
import warnings
from collections import Counter
from pathlib import Path

import pytest
import wrong_calls
import wrong_calls_of_states as states
from wrong_calls import LEAVES, PARAMS, Row
from wrong_calls_of_budgets import BUDGETS
from wrong_calls_of_reports import AUDIT, BASELINE, REPORTS
from wrong_calls_of_states import EXCHANGE, LOADING

import spd_optax as spd
from spd_optax import audit

PACKAGE = Path(spd.__file__).parent
# Made by the library, or by a user's own rule, which nothing checks before it is used.
RESULTS = {
  'Advice', 'AuditFileError', 'AuditWarning', 'Budget', 'BudgetState', 'Decision', 'DroppedLeaf',
  'LayerRecord', 'ProjectionDecayOptimizer', 'ProjectionDecayState', 'Record', 'Rule', 'Run',
  'WithProjectionDecayState',
}  # fmt: skip
# What optax, JAX or Python answer for themselves.
ADAMS = ('b1', 'b2', 'eps', 'eps_root', 'mu_dtype', 'nesterov')
OTHERS = {('adam_spd', name) for name in ADAMS} | {
  ('advise', 'run'), ('advise', 'patience'), ('AuditLog', 'moving_anchor'), ('AuditLog', 'fsync'),
  ('scalars', 'prefix'),
}  # fmt: skip
CALLS = {
  'AuditLog.record': spd.AuditLog.record,
  **{f'{name}.init': make().init for name, make in wrong_calls.MAKERS.items()},
  **{f'{name}.update': make().update for name, make in wrong_calls.MAKERS.items()},
  **{f'{name}.apply': wrong_calls.MAKERS[name]().apply for name in wrong_calls.FORMS[1:]},
}


def rows():
  yield from wrong_calls.rows()
  yield from states.steps()
  for mistake, (anchor, fragments) in LEAVES.items():
    if mistake == 'dtypes':  # interpolate computes in float32 or wider
      continue
    call = lambda anchor=anchor: spd.interpolate(anchor, PARAMS, 0.5)  # noqa: E731
    yield Row('interpolate', 'anchor', mistake, call, ValueError, fragments)
  for name, call, error, fragments in [*EXCHANGE, *LOADING, *REPORTS, *BASELINE, *AUDIT, *BUDGETS]:
    function, _, argument = name.rpartition('.')
    yield Row(function, argument, fragments, call, error, fragments)


ROWS = list(rows())
# Without the addresses of functions, in which the workers of pytest-xdist differ.
NAMES = [re.sub(r' at 0x\w+', '', f'{row.function}-{row.argument}-{row.mistake}') for row in ROWS]


@pytest.mark.parametrize('row', ROWS, ids=NAMES)
def test_it_is_an_error_of_ours(row):
  """Catches a wrong call that is accepted, or answered from inside jax, optax or NumPy."""
  with warnings.catch_warnings():
    warnings.simplefilter('error')
    with pytest.raises(row.error) as caught:
      row.call()
  message = str(caught.value)
  missing = [x for x in row.fragments.split(' & ') if not re.search(x, message, re.MULTILINE)]
  assert not missing, f'{missing} not in: {message}'
  assert not re.search(r'^\s*: ', message, re.MULTILINE), f'a leaf without a name in: {message}'
  last = traceback.extract_tb(caught.tb)[-1]
  assert Path(last.filename).is_relative_to(PACKAGE), f'raised in {last.filename}'


def test_every_argument_of_every_public_function_is_in_the_tables():
  """Catches a new function or argument without a wrong call."""
  public = {name: getattr(spd, name) for name in spd.__all__}
  public |= {name: getattr(audit, name) for name in audit.__all__}
  assert public.keys() >= RESULTS
  functions = {name: x for name, x in public.items() if name not in RESULTS} | CALLS
  asked = {
    (name, argument.name)
    for name, function in functions.items()
    for argument in inspect.signature(function).parameters.values()
    if argument.name != 'self' and argument.kind is not argument.VAR_KEYWORD
  }
  tried = {(row.function, argument) for row in ROWS for argument in row.argument.split('+')}
  assert asked == tried | OTHERS


def test_every_row_has_a_name_of_its_own():
  """Catches rows that stand twice in the tables."""
  assert not [name for name, count in Counter(NAMES).items() if count > 1]


def test_no_advice_that_does_not_apply():
  """Catches `anchor_dtype`, which `interpolate` has not, in its message."""
  with pytest.raises(ValueError, match='enc/k') as caught:
    spd.interpolate(LEAVES['integers'][0], PARAMS, 0.5)
  assert 'anchor_dtype' not in str(caught.value)
