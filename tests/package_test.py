"""The package as it would be published: built, checked, and installed where nothing else is."""

import os
import re
import subprocess
import sys
import tarfile
import venv
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

pytestmark = pytest.mark.examples

ROOT = Path(__file__).parent.parent
SESSION = """
import importlib.util, pathlib, sys
import jax, jax.numpy as jnp, optax
import spd_optax as spd

assert pathlib.Path(spd.__file__).is_relative_to(sys.prefix)
assert importlib.util.find_spec('flax') is None and importlib.util.find_spec('matplotlib') is None
params = {'w': jnp.ones((2, 2))}
tx = spd.adam_spd(1e-3)
params, state = tx.apply(params, tx.init(params), params)
with spd.AuditLog('run.jsonl', transform='adam_spd') as log:
  log.record(1, state, {'loss': 0.5})
print(spd.__version__)
"""


def run(*command, cwd, **variables):
  environment = {
    k: v for k, v in os.environ.items() if k not in ('PYTHONPATH', 'GITHUB_REPOSITORY')
  }
  result = subprocess.run(
    list(map(str, command)), cwd=cwd, env=environment | variables, capture_output=True, text=True
  )
  assert result.returncode == 0, result.stdout + result.stderr
  return result.stdout


@pytest.fixture(scope='module')
def built(tmp_path_factory):
  """The sdist, and the wheel that is made of it."""
  out = tmp_path_factory.mktemp('dist')
  repository = {'GITHUB_REPOSITORY': 'owner/name', 'GITHUB_REF_NAME': 'v0'}
  run(sys.executable, '-m', 'build', '--outdir', out, ROOT, cwd=out, **repository)
  (sdist,), (wheel,) = out.glob('*.tar.gz'), out.glob('*.whl')
  return sdist, wheel


def test_the_index_would_take_both(built):
  """Catches a description that a package index refuses."""
  run(sys.executable, '-m', 'twine', 'check', '--strict', *built, cwd=built[0].parent)


def test_the_sdist_has_what_the_tests_need(built):
  """Catches a page or an example that is left out, and what nobody wants."""
  with tarfile.open(built[0]) as archive:
    names = {name.partition('/')[2] for name in archive.getnames()}
  wanted = {'README.md', 'LICENSE', 'CITATION.cff', 'CHANGELOG.md', 'mkdocs.yml', 'hatch_build.py'}
  assert wanted <= names
  for folder in ('docs', 'examples', 'spd_optax', 'tests'):
    files = run('git', 'ls-files', folder, cwd=ROOT).split() if (ROOT / '.git').exists() else []
    assert set(files) <= names, sorted(set(files) - names)[:5]
  assert not any(part in name for name in names for part in ('__pycache__', 'site/', '.cache'))


def test_the_wheel_has_the_library_alone(built):
  """Catches tests that are installed, and a README whose links go nowhere on an index."""
  with zipfile.ZipFile(built[1]) as archive:
    names = archive.namelist()
    (metadata,) = (name for name in names if name.endswith('METADATA'))
    found = Parser().parsestr(archive.read(metadata).decode())
  assert {name.partition('/')[0].partition('-')[0] for name in names} == {'spd_optax'}
  assert 'spd_optax/py.typed' in names
  assert 'Paper, https://arxiv.org/abs/2411.01713' in found.get_all('Project-URL')
  assert 'Repository, https://github.com/owner/name' in found.get_all('Project-URL')
  links = re.findall(r'\]\(([^)]+)\)', found.get_payload())
  assert len(links) > 10
  assert all(link.startswith('https://') for link in links), links
  assert 'https://github.com/owner/name/raw/v0/docs/pictures/condition.png' in links


def test_the_wheel_runs_in_an_empty_environment(built, tmp_path):
  """Catches a dependency that only the tests install."""
  venv.create(tmp_path / 'empty', with_pip=True)
  python = tmp_path / 'empty/bin/python'
  run(python, '-m', 'pip', 'install', '--quiet', built[1], cwd=tmp_path)
  version = run(python, '-c', SESSION, cwd=tmp_path, JAX_PLATFORMS='cpu').strip()
  assert f'-{version}-' in built[1].name
