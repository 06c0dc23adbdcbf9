"""A deprecation that our own code meets is an error; one that others meet is not."""

pytest_plugins = ['pytester']

PROBE = """
import warnings

import jax
import jax.numpy as jnp
import spd_optax as spd


def warn(*args, **kwargs):
  warnings.warn('jax.something is deprecated', DeprecationWarning, stacklevel=2)
  return NORM(*args, **kwargs)


NORM = jnp.sqrt


def test_one_that_our_code_meets(monkeypatch):
  jax.clear_caches()  # what was traced before would not call it again
  monkeypatch.setattr(jnp, 'sqrt', warn)
  params = {'w': jnp.ones(2)}
  tx = spd.projection_decay()
  tx.update(params, tx.init(params), params)


def test_one_that_others_meet():
  warn(1.0)
"""


def test_a_deprecation_in_our_code_fails_a_test(pytester, pytestconfig):
  """Catches a filter that names no module of ours, so that it never raises."""
  filters = pytestconfig.getini('filterwarnings')
  pytester.makeini('\n    '.join(['[pytest]\nfilterwarnings =', *filters]))
  pytester.makepyfile(PROBE)
  result = pytester.runpytest_inprocess('-p', 'no:xdist', '-p', 'no:cacheprovider')
  result.assert_outcomes(passed=1, failed=1)
  result.stdout.fnmatch_lines(['*DeprecationWarning: jax.something is deprecated*'])
  result.stdout.fnmatch_lines(['*FAILED*test_one_that_our_code_meets*'])
