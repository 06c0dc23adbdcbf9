"""Checkpoints from outside: cut off, with bits turned over, or made to harm.

Each is an error that names the file, or loads what was saved: it never runs code, ends the
process, or takes memory on the word of the file.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import chex
import hostile_files
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as old
import pytest
from hypothesis import strategies as st
from loading_test import (
  FILES,
  orbax_standard,
  orbax_training,
  orbax_v1,
  pretrained,
  zeros,
)

import spd_optax as spd

TREE = {
  'body': {'kernel': np.arange(6, dtype=np.float32).reshape(2, 3)},
  'b': np.ones(4, np.float32),
}
CHECKED = ('.npz',)  # formats with a checksum: what loads is what was saved
fewer = hypothesis.settings(
  max_examples=hypothesis.settings.default.max_examples // 2,
  suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)


@st.composite
def damages(draw):
  """A function that damages bytes: cuts them, turns bits over, writes or inserts large numbers."""
  kind = draw(st.sampled_from(['cut', 'bits', 'large', 'insert']))
  places = draw(st.lists(st.floats(0, 1, exclude_max=True), min_size=1, max_size=4))
  bit = draw(st.integers(0, 7))

  def damage(content: bytes) -> bytes:
    found = bytearray(content)
    at = [int(place * len(found)) for place in places]
    if kind == 'cut':
      return bytes(found[: at[0]])
    if kind == 'insert':
      return bytes(found[: at[0]] + b'\xff' * (1 + bit) + found[at[0] :])
    for i in at:
      if kind == 'bits':
        found[i] ^= 1 << bit
      else:
        found[i : i + 1 + bit] = b'\xff' * len(found[i : i + 1 + bit])
    return bytes(found)

  return damage


def load(path):
  """The anchor, or None after an error that names the file."""
  try:
    return spd.load_anchor(path, zeros(TREE))
  except ValueError as error:
    message = str(error)
  assert str(path) in message
  return None


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
  folder = tmp_path_factory.mktemp('saved')
  return {save.__name__: Path(save(folder / 'checkpoint', TREE)) for save in FILES}


@pytest.mark.parametrize('save', FILES)
@pytest.mark.filterwarnings('ignore:.*have not the same leaves:UserWarning')
@fewer
@hypothesis.given(damage=damages())
def test_a_damaged_file(saved, tmp_path, save, damage):
  """Catches a library's error without the path, an anchor of other shapes, or a crash."""
  path = tmp_path / saved[save.__name__].name
  content = saved[save.__name__].read_bytes()
  path.write_bytes(damage(content))
  saved_at = dict(jax.tree.leaves_with_path(TREE))
  for at, leaf in jax.tree.leaves_with_path(load(path)):
    assert (leaf.shape, leaf.dtype) == (saved_at[at].shape, saved_at[at].dtype)
    assert np.isfinite(leaf).all()
    if path.suffix in CHECKED:
      np.testing.assert_array_equal(leaf, saved_at[at])


@pytest.mark.parametrize('save', FILES)
@pytest.mark.parametrize('keep', [0, 1, 0.5, -1])
def test_a_truncated_file(save, keep, tmp_path):
  """Catches half an anchor, and a library's traceback without the path."""
  tree = pretrained()
  path = tmp_path / save(tmp_path / 'checkpoint', tree)
  content = path.read_bytes()
  path.write_bytes(content[: int(len(content) * keep) if keep == 0.5 else keep])
  with pytest.raises(ValueError, match=r'checkpoint\.\w+: cannot be read'):
    spd.load_anchor(path, zeros(tree))


@pytest.fixture(scope='module')
def directory(tmp_path_factory):
  path = orbax_v1(tmp_path_factory.mktemp('orbax') / 'checkpoint', TREE)
  return {at.relative_to(path): at.read_bytes() for at in path.rglob('*') if at.is_file()}


@hypothesis.settings(fewer, max_examples=max(10, fewer.max_examples // 4))
@hypothesis.given(damage=damages(), data=st.data())
def test_a_damaged_file_of_orbax(directory, tmp_path, damage, data):
  """Catches other numbers than were saved: each file has a checksum."""
  names = sorted(name for name, content in directory.items() if content)
  hurt = data.draw(st.sampled_from(names))
  for name, content in directory.items():
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_bytes(damage(content) if name == hurt else content)
  anchor = load(tmp_path)
  if anchor is not None:
    chex.assert_trees_all_equal(anchor, jax.tree.map(jnp.asarray, TREE))


@pytest.mark.parametrize('save', [orbax_v1, orbax_standard])
def test_a_damaged_orbax_directory(save, tmp_path):
  """Catches arrays of zeros in place of missing or damaged data."""
  tree = pretrained()
  path = save(tmp_path / 'checkpoint', tree)
  for file in path.rglob('d/*'):
    if file.is_file():
      file.write_bytes(b'\0' * file.stat().st_size)
  with pytest.raises(ValueError, match='checkpoint: cannot be read'):
    spd.load_anchor(path, zeros(tree))


def test_a_name_that_leads_out_of_an_orbax_directory(tmp_path):
  """Catches an array that is read from beside the checkpoint."""
  handler = old.PyTreeCheckpointHandler(use_ocdbt=False)  # a directory for each array
  old.Checkpointer(handler).save(tmp_path / 'a', {'w': np.ones(3, np.float32)})
  (tmp_path / 'a' / 'w').rename(tmp_path / 'outside')
  metadata = tmp_path / 'a' / '_METADATA'
  text = metadata.read_text()
  metadata.write_text(text.replace("('w',)", "('../outside',)").replace('"w"', '"../outside"'))
  assert metadata.read_text() != text
  with pytest.raises(ValueError, match='a: cannot be read'):
    spd.load_anchor(tmp_path / 'a', {'..': {'outside': jnp.zeros(3)}})


def test_links_and_pipes(tmp_path):
  """Catches a read that waits forever or never ends; a link to a file is as good as the file."""
  orbax_v1(tmp_path / 'real', TREE)
  (tmp_path / 'link').symlink_to('real')
  anchor = spd.load_anchor(tmp_path / 'link', zeros(TREE))
  chex.assert_trees_all_equal(anchor, jax.tree.map(jnp.asarray, TREE))
  metadata = next((tmp_path / 'real').rglob('_METADATA'))
  metadata.unlink()
  metadata.symlink_to('/dev/zero')
  os.mkfifo(tmp_path / 'pipe.npz')
  (tmp_path / 'endless.msgpack').symlink_to('/dev/zero')
  for name in ('real', 'pipe.npz', 'endless.msgpack'):
    with pytest.raises(ValueError, match=f'{name}: neither a file nor a directory'):
      spd.load_anchor(tmp_path / name, zeros(TREE))
  (tmp_path / 'round.npz').symlink_to('round.npz')
  with pytest.raises(FileNotFoundError, match=r'round\.npz: no such file'):
    spd.load_anchor(tmp_path / 'round.npz', zeros(TREE))


def test_files_made_to_harm(tmp_path):
  """Catches code that runs, a process that ends, and memory taken on the word of a file."""
  run = subprocess.run(
    [sys.executable, '-W', 'ignore', hostile_files.__file__, tmp_path],
    capture_output=True,
    text=True,
    timeout=100,
  )
  assert run.returncode == 0, run.stderr
  found = json.loads(run.stdout)
  for name, outcome in found['outcomes'].items():
    wanted = 'loaded' if name in hostile_files.LOADED else f'ValueError: {tmp_path / name}: '
    assert outcome.startswith(wanted), (name, outcome[:300])
  assert len(found['outcomes']) == len(hostile_files.LOADED | hostile_files.REFUSED)
  assert not (tmp_path / hostile_files.MARKER).exists()
  largest = max(map(len, (hostile_files.LOADED | hostile_files.REFUSED).values()))
  assert found['kilobytes'] * 1024 < 16 * largest


def test_paths_that_are_no_checkpoint(tmp_path):
  """Catches a library's guess where the user has to choose."""
  like = {'kernel': jnp.zeros(2)}
  (tmp_path / 'a.pt').write_bytes(b'')
  with pytest.raises(ValueError, match=r"unknown kind of checkpoint '.pt'; expected an Orbax"):
    spd.load_anchor(tmp_path / 'a.pt', like)
  orbax_training(tmp_path / 'steps', {'kernel': np.ones(2)})
  with pytest.raises(ValueError, match=r'steps: cannot .* path of one step .* here: 7$'):
    spd.load_anchor(tmp_path / 'steps', like)
  with pytest.raises(ValueError, match=r'one tree; found here: model, other$'):
    spd.load_anchor(tmp_path / 'steps' / '7', like)
