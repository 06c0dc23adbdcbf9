"""The T5 of millions of weights in examples/compare.py, on a corpus of a few made sentences."""

from pathlib import Path

import jax
import numpy as np
import pytest

import prose
import t5
from suite import corpora, packages, text

pytestmark = pytest.mark.examples


def sentences() -> list[corpora.Sentence]:
  """Each genre's texts 1 and 2 repeat one letter; it is upper case in text 2."""
  return [
    corpora.Sentence(f'c{genre}0{number}', (genre.upper() if number == 2 else genre) * 90, [])
    for genre in 'aejk'
    for number in (1, 2)
  ]


def letters(examples: prose.Examples) -> set[str]:
  """All letters of the examples, in inputs and labels."""
  tokens = np.concatenate([examples.inputs.ravel(), examples.labels.ravel()])
  return set(t5.Bytes().decode(tokens.tolist())) - {' '}


def test_a_t5_is_tested_on_texts_that_it_has_not_seen(
  monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
  """Catches a genre's test set from another genre, or from what the model is trained on."""
  monkeypatch.setattr(corpora, 'brown', sentences)
  monkeypatch.setattr(packages, 'FOLDER', tmp_path)
  task = text.keywords_t5()
  assert letters(task.old) == set('aejk')
  assert {name: letters(data) for name, data in task.ood.items()} == {
    'press': {'A'},
    'science': {'J'},
    'fiction': {'K'},
  }
  assert len(task.stages[0].pool.inputs) > task.shots
  params = jax.eval_shape(task.init, jax.random.key(0))
  assert set(params) == set(task.blocks)
  assert 3e6 < sum(x.size for x in jax.tree.leaves(params)) < 4e6
  for data in (task.old, *task.ood.values(), task.stages[0].test):
    few = jax.tree.map(lambda x: x[:2], data)
    assert jax.eval_shape(task.loss, params, few).shape == ()
