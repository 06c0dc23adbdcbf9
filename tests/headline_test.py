"""Runs two experiments of the pages again, and compares with the committed scores."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

import compare
import comparison
import finetune_vit
from suite import choice

pytestmark = pytest.mark.slow

METHODS, SEEDS = ('Adam', 'adam_spd'), 2
RESULTS = Path(compare.__file__).parent / 'results'
# By how much another order of sums may change the scores of one run: of 300 and 200 pictures.
ROUNDING = {'id': 2.5, 'ood': 5.0}


def within_errors(found: list[float], committed: list[float]) -> bool:
  """Whether the means of two samples differ by at most three standard errors."""
  error = np.std(committed, ddof=1) * math.sqrt(1 / len(found) + 1 / len(committed))
  return abs(np.mean(found) - np.mean(committed)) <= 3 * error


def test_a_real_model_scores_as_committed(tmp_path):
  """Catches a README whose table another version of the library or the suite made."""
  rate, seeds = 1e-4, 2
  found = compare.main(
    [
      *('--real', '--tasks', 'digits_by_hand', '--at-once', '1', '--rates', str(rate)),
      *('--methods', *METHODS, '--seeds', str(seeds), '--workers', '1', '--out', str(tmp_path)),
    ]
  )['digits_by_hand']['records']
  lines = (RESULTS / 'digits_by_hand/records.jsonl').read_text().splitlines()
  committed = [json.loads(line) for line in lines]
  for method in METHODS:
    (fresh,) = choice.of(found, method, rate=rate)
    (old,) = choice.of(committed, method, rate=rate)
    for column, points in ROUNDING.items():
      np.testing.assert_allclose(fresh[column], old[column][:seeds], atol=points, err_msg=method)


def test_the_committed_table_comes_out_again(tmp_path, monkeypatch):
  """Catches results of another version of the library or of the example."""
  make = comparison.methods
  monkeypatch.setattr(
    comparison, 'methods', lambda *args: {name: make(*args)[name] for name in METHODS}
  )
  fresh = finetune_vit.main(['--seeds', str(SEEDS), '--out', str(tmp_path)])
  committed = json.loads((RESULTS / 'finetune_vit/results.json').read_text())['results']
  for column in ('new − Adam', 'old − Adam'):
    assert within_errors(fresh['adam_spd'][column], committed['adam_spd'][column]), column
  moved = [np.mean(fresh[name]['moved']) for name in ('pre-trained', 'adam_spd', 'Adam')]
  assert moved == sorted(moved)
  assert np.mean(fresh['adam_spd']['held']) == pytest.approx(
    np.mean(committed['adam_spd']['held']), abs=10
  )
