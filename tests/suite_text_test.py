import numpy as np
import pytest

from suite import minilm, text

pytestmark = pytest.mark.examples


def test_pieces_of_the_brown_corpus(monkeypatch):
  """Catches tests on texts that were trained on, or of another kind, and bytes with wrong ids."""
  kinds = {'a1': 'p', 'a2': 'P', 'k1': 'f', 'k2': 'F', 'j1': 's', 'j2': 'S'}
  sentences = [minilm.Sentence(f'c{source}', 66 * letter, []) for source, letter in kinds.items()]
  monkeypatch.setattr(minilm, 'brown', lambda: sentences)
  sets = text.brown()
  assert set(np.unique(sets['old'])) == {*b'pfs\n'}
  for kind in ('press', 'fiction', 'science'):
    inputs = text.corrupted(sets)[kind].inputs
    assert {*inputs[inputs < 259].tolist()} == {0, 1, ord(kind[0].upper()) + 3}  # padding, the end
