"""A task on a model that is trained here: on grey noise, without a block."""

import argparse
from pathlib import Path

import jax
import numpy as np
import pytest
import smoke

import compare
from suite import packages, printed

pytestmark = pytest.mark.examples


def test_a_model_trained_here_is_compared_as_loaded_ones_are(
  tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  """Catches layers without a size or a share of the steps, and blocks that are none."""
  rng = np.random.default_rng(0)
  arrays: dict[str, np.ndarray] = {
    f'emoji/{name}': np.zeros(1) for name in ('turned', 'google', 'twitter')
  }
  for name in ('', 'pool/', 'test/', *(f'{kind}/' for kind in printed.PRINTED)):
    arrays[f'{name}pictures'] = rng.integers(0, 256, (8, 64, 64)).astype(np.uint8)
    arrays[f'{name}labels'] = np.arange(8, dtype=np.int32)
  np.savez(tmp_path / 'printed.npz', **{key: arrays.pop(key) for key in ('pictures', 'labels')})
  np.savez(tmp_path / 'letters.npz', **arrays)
  monkeypatch.setattr(packages, 'FOLDER', tmp_path)
  task = printed.letters_vit(depth=0)._replace(steps=1, shots=4, pace=(1.0,))
  start = jax.vmap(task.init)(jax.random.split(jax.random.key(0), 1))
  monkeypatch.setattr(compare, 'scaled', lambda *_: task)
  monkeypatch.setattr(compare, 'foundation', lambda *_: start)
  args = argparse.Namespace(
    real=True, methods=['adam_spd'], seeds=1, rates=(1e-3,), quick=True, bfloat16=False
  )
  args.no_warmup, args.steps, args.out, args.at_once = False, None, tmp_path, None
  with smoke.quick_compiles():
    found = compare.run_task('letters_vit', args)
  assert {name.split('/')[0] for name in found['sizes']} == set(task.blocks)
  assert set(found['records'][0]['layers']) == set(found['sizes'])
