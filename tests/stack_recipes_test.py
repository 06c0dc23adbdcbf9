"""The recipes for training stacks run; each asserts what it shows."""

import importlib.util
import os
import pathlib
import subprocess
import sys

import pytest

pytestmark = pytest.mark.stacks

HERE = pathlib.Path(__file__).parents[1] / 'examples' / 'stacks'
RECIPES = sorted(path.stem for path in HERE.glob('with_*.py'))
# The module that a stack's package has, where it is not called as the recipe.
MODULES = {
  'with_easydel': ['easydel', 'torch'],
  'with_equinox': ['equinox'],
  'with_gemma': ['gemma'],
  'with_haiku': ['haiku'],
  'with_jimm': ['jimm', 'huggingface_hub'],
  'with_kauldron': ['kauldron'],
  'with_keras': ['keras', 'h5py'],
  'with_maxtext': ['maxtext'],
  'with_tunix': ['tunix'],
}


@pytest.mark.parametrize('recipe', RECIPES)
def test_a_recipe_runs_as_written(recipe):
  """Catches a stack whose new version keeps another anchor, or resumes to something else."""
  missing = [name for name in MODULES[recipe] if importlib.util.find_spec(name) is None]
  if missing:
    pytest.skip(f'not installed: {", ".join(missing)}; see the docstring of {recipe}.py')
  # A recipe chooses its own devices, and compiles what no other test does.
  ours = ('JAX_', 'XLA_')
  environment = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
  command = [sys.executable, str(HERE / f'{recipe}.py')]
  done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
  assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
