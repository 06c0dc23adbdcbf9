"""Scores of loaded models from their features."""

from typing import Any

import numpy as np
import pytest

from suite import features

pytestmark = pytest.mark.examples


def test_answers_are_retrieved() -> None:
  """Catches answers that are compared with themselves, and a score that isn't in %."""
  rows = np.random.default_rng(0).normal(size=(8, 5)).astype(np.float32)
  swapped = rows[[1, 0, 2, 3, 4, 5, 6, 7]]
  assert features.score({}, features.Pairs(rows, rows)) == 100
  assert features.score({}, features.Pairs(rows, 3 * swapped)) == 75


def test_what_all_have_in_common_can_be_taken_off() -> None:
  """Catches centred rows that are not, or both sides centred by one mean."""
  rows = np.random.default_rng(0).normal(size=(8, 5)).astype(np.float32)
  far = features.Pairs(1e3 + rows, rows - 1e3)
  assert features.score({}, far) < 100
  assert features.score({}, far, centred=True) == 100


def test_a_label_is_scored_by_the_head() -> None:
  """Catches a head that is left out of the score."""
  head: Any = {'kernel': np.eye(3), 'bias': np.array([0, 0, 9])}
  scored = features.score({'head': head}, (np.eye(3), np.array([2, 2, 1])))
  assert scored == pytest.approx(200 / 3)
