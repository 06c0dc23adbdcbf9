"""Settings for every test: one CPU device and eight, reproducible hypothesis runs, shared compiles.

The number of devices of a process is fixed once JAX has started, so the workers of pytest-xdist
share the tests: those with an even number (gw0, gw2, ...) have eight CPU devices, the others one.
A test that is to run on both is two tests, `test_x[1-device]` and `test_x[8-devices]`. If it has
several cases, they take turns: one runs on eight, the next on one, and the other halves are slow
tests. A test that needs eight is `test_x[8-devices]`; any other runs once, on whichever worker is
free.

    python -m pytest                                        # at least two workers
    python -m pytest -n 0                                   # one process with eight devices
    JAX_NUM_CPU_DEVICES=1 python -m pytest -n 0             # one process with one device

In one process the tests for another number of devices are skipped.
"""

import os
import re
import tempfile
import zlib

os.environ.setdefault('JAX_PLATFORMS', 'cpu')

# What one worker has compiled, the others and their subprocesses read: they inherit the variable.
if 'JAX_COMPILATION_CACHE_DIR' not in os.environ:
  compiled = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
  os.environ['JAX_COMPILATION_CACHE_DIR'] = compiled.name
os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0')
os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES', '-1')

import hypothesis  # jax reads the environment at import
import jax
import pytest

try:
  from xdist.scheduler import LoadFileScheduling
except ImportError:  # one process then runs all tests
  LoadFileScheduling = object

# What depends on the number of devices: on one and on eight. A test of what does not runs once, on
# whichever worker is free.
ON_BOTH = {
  'apply_test', 'eager_test', 'forms_test', 'golden_test', 'one_device_mesh_test',
  'scan_layout_test', 'stacks_test', 'sums_test', 'typed_shardings_test',
}  # fmt: skip
# What users do first, on a laptop; XLA treats it in another way where a CPU is alone.
ON_ONE = {'contract_test', 'widths_test'}
# What splits arrays in ways that need all eight.
ON_EIGHT = {'devices_test', 'exchange_test', 'fingerprints_test', 'loading_test', 'reports_test'}
# Few tests, but long ones: they start first.
LONG = ('killed_run_test', 'memory_kind_test', 'docs_test')


def devices_of(worker):
  """The number of CPU devices of a worker of pytest-xdist; None is no worker."""
  return 1 if worker and int(worker.removeprefix('gw')) % 2 else 8


WORKER = os.environ.get('PYTEST_XDIST_WORKER')
# Programs that tests start choose their own number, so they do not inherit one.
CHOSEN = int(os.environ.pop('JAX_NUM_CPU_DEVICES', 8))
DEVICES = devices_of(WORKER) if WORKER else CHOSEN
jax.config.update('jax_num_cpu_devices', DEVICES)

hypothesis.settings.register_profile('default', deadline=None, derandomize=True, max_examples=30)
hypothesis.settings.register_profile('nightly', deadline=None, max_examples=1000)
hypothesis.settings.load_profile(os.environ.get('HYPOTHESIS_PROFILE', 'default'))


@pytest.fixture(autouse=True, scope='session')
def device_count(request):
  """The number of CPU devices that a test asks for; the others take what there is."""
  return getattr(request, 'param', DEVICES)


def pytest_generate_tests(metafunc):
  """Makes one test for each number of devices that it is to run on."""
  module = metafunc.module.__name__
  if module in ON_EIGHT or metafunc.definition.get_closest_marker('eight_devices'):
    counts = [8]
  else:
    counts = [1, 8] if module in ON_BOTH else [1] if module in ON_ONE else []
  if counts:
    names = [COUNTS[count] for count in counts]
    metafunc.parametrize('device_count', counts, ids=names, indirect=True, scope='session')


COUNTS = {1: '1-device', 8: '8-devices'}


def _asked_by(item):
  callspec = getattr(item, 'callspec', None)
  return callspec and callspec.params.get('device_count')


def _take_turns(items):
  """Marks as slow half of the tests that come in two: of each case one of the two."""
  cases = {}
  for item in items:
    if (asked := _asked_by(item)) and item.module.__name__ in ON_BOTH:
      case = item.callspec.id.removeprefix(COUNTS[asked]).removesuffix(COUNTS[asked])
      cases.setdefault((item.parent, item.originalname), {}).setdefault(case, {})[asked] = item
  for by_case in cases.values():
    # In an order of chance, so that no parameter goes with one of the counts.
    for i, case in enumerate(sorted(by_case, key=lambda case: zlib.crc32(case.encode()))):
      if len(by_case) > 1 and len(by_case[case]) > 1:
        by_case[case][8 if i % 2 else 1].add_marker(pytest.mark.slow)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
  """Leaves out, on one device, what only a parameter of the test says is for eight."""
  out = [x for x in items if _asked_by(x) == 1 and x.get_closest_marker('eight_devices')]
  if out:
    config.hook.pytest_deselected(items=out)
    items[:] = [item for item in items if item not in set(out)]
  _take_turns(items)


def pytest_runtest_setup(item):
  """Skips a test that asks for another number of devices than this process has."""
  asked = _asked_by(item)
  if asked not in (None, DEVICES):
    pytest.skip(f'needs {asked} CPU device(s), this process has {DEVICES}: see tests/conftest.py')


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item):
  """Says, of a test that failed, on how many devices it ran."""
  report = yield
  if report.failed:
    report.sections.append(('CPU devices', str(DEVICES)))
  return report


def pytest_report_header(config):
  """Says where tests run."""
  if config.getoption('numprocesses', None):
    return 'CPU devices: 8 for the workers gw0, gw2, ..., 1 for gw1, gw3, ...'
  return f'CPU devices: {DEVICES}; tests that need another number are skipped'


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
  """Runs tests on a worker for each CPU, and two at least, unless `-n` or `--pdb` say otherwise."""
  if WORKER or not config.pluginmanager.hasplugin('xdist'):
    return
  options = config.option
  if options.numprocesses is None and not (options.tx or options.usepdb):
    options.numprocesses = 'auto'


@pytest.hookimpl(optionalhook=True, wrapper=True)
def pytest_xdist_auto_num_workers():
  """One worker with one device and one with eight is the least."""
  return max(2, (yield))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
  """Workers take files as they become free, of those that fit their number of devices."""
  return ByDevices(config, log)


class ByDevices(LoadFileScheduling):
  """Gives the tests of one file, for one number of devices, to a worker that has so many."""

  def _split_scope(self, nodeid):
    return '@'.join([nodeid.split('::')[0], *ASKED.findall(nodeid)[:1]])

  def schedule(self):
    """Begins with the workers that can do something: with few files, the others are not used."""
    if self.collection is None:
      names = next(iter(self.registered_collections.values()))
      wanted = set().union(*map(_asked, names))
      order = sorted(self.assigned_work, key=lambda node: _devices(node) not in wanted)
      self.assigned_work = {node: self.assigned_work[node] for node in order}
    super().schedule()

  def _assign_work_unit(self, node):
    present = set(map(_devices, self.nodes))
    # What no worker has the devices for is given to any, and skipped there.
    fit = [
      scope
      for scope in self.workqueue
      if not (_asked(scope) & present) or _devices(node) in _asked(scope)
    ]
    if not fit:
      node.shutdown()
      return
    self.workqueue.move_to_end(min(fit, key=_rank), last=False)
    super()._assign_work_unit(node)


ASKED = re.compile(r'\b(?:1-device|8-devices)\b')  # in the names of tests, and of their scopes


def _asked(name):
  """{1}, {8} or {}: the number of devices that tests of this name need."""
  return {int(found[0]) for found in ASKED.findall(name)[:1]}


def _devices(node):
  return devices_of(node.gateway.id)


def _rank(scope):
  """Long files first, then those for one kind of worker; the rest fills the gaps."""
  return not any(name in scope for name in LONG), not _asked(scope)
