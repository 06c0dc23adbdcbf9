"""The table of finetune_vit.py, made anew."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

import comparison
import finetune_vit

pytestmark = pytest.mark.slow

METHODS, SEEDS = ('Adam', 'adam_spd'), 2


def test_the_committed_table_comes_out_again(tmp_path, monkeypatch):
  """Catches results of another version of the library or of the example."""
  make = comparison.methods
  monkeypatch.setattr(
    comparison, 'methods', lambda *args: {name: make(*args)[name] for name in METHODS}
  )
  fresh = finetune_vit.main(['--seeds', str(SEEDS), '--out', str(tmp_path)])
  path = Path(finetune_vit.__file__).parent / 'results/finetune_vit/results.json'
  committed = json.loads(path.read_text())['results']
  for column in ('new − Adam', 'old − Adam'):
    values = committed['adam_spd'][column]
    error = np.std(values, ddof=1) * math.sqrt(1 / SEEDS + 1 / len(values))
    assert abs(np.mean(fresh['adam_spd'][column]) - np.mean(values)) <= 3 * error, column
  moved = [np.mean(fresh[name]['moved']) for name in ('pre-trained', 'adam_spd', 'Adam')]
  assert moved == sorted(moved)
  assert np.mean(fresh['adam_spd']['held']) == pytest.approx(
    np.mean(committed['adam_spd']['held']), abs=10
  )
