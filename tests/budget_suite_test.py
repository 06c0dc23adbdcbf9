"""examples/budgets.py at a tiny size, and its tables against hand-made cases."""

import json
import math
from typing import Any

import numpy as np
import pytest
import smoke

import budgets
import compare

pytestmark = pytest.mark.examples


@pytest.fixture(scope='module')
def run(tmp_path_factory: pytest.TempPathFactory) -> Any:
  """Few strengths on one task, run in this process: the folder and the records."""
  out = tmp_path_factory.mktemp('budgets')

  def each_task(run: Any, args: Any) -> dict[str, Any]:
    return {name: run(name, args) for name in args.tasks}

  with smoke.quick_compiles(), pytest.MonkeyPatch.context() as patch:
    patch.setattr(compare, 'each_task', each_task)
    patch.setattr(budgets, 'STRENGTHS', (1.0, 100.0))
    return out, budgets.main(['--quick', '--out', str(out)])['tumours']


def test_records_are_those_of_each_method(run: Any) -> None:
  """Catches lost configurations, seeds that are copies, and budgets that no one stated."""
  out, records = run
  counts = {name: len(budgets.choice.of(records, name)) for name in budgets.METHODS}
  assert counts == dict(zip(budgets.METHODS, (6, 2, 2, 2, 2), strict=True))
  adam = budgets.choice.of(records, budgets.ADAM)[0]
  mean = np.mean(adam['drift'])
  assert budgets.budgets_of(records) == [float(f'{share * mean:.2g}') for share in (0.5, 0.2)]
  for record in records:
    assert len(record.get('trace', [])) in (0, 30)
    first, second = record['drift']
    assert first != second or record['method'] == budgets.WISE
  np.testing.assert_allclose(adam['trace'][-1], mean, rtol=1e-3)
  lines = (out / 'records.jsonl').read_text().splitlines()
  assert [json.loads(line) for line in lines] == [{'task': 'tumours'} | r for r in records]
  results = json.loads((out / 'results.json').read_text())['results']
  assert list(results) == list(budgets.TABLES)
  assert (out / 'drift.png').read_bytes().startswith(b'\x89PNG')


def test_the_budget_holds_and_mixes_drift_as_much(run: Any) -> None:
  """Catches a drift that never reaches the optimizer, and α and 1 − α swapped."""
  _, records = run
  adam = np.array(budgets.choice.of(records, budgets.ADAM)[0]['drift'])
  for budget in budgets.budgets_of(records):
    mixed = budgets.at(records, budgets.WISE, budget)
    np.testing.assert_allclose(mixed['drift'], np.minimum(adam, budget), rtol=1e-2)
    for method in (budgets.LINK, budgets.AROUND):
      own = budgets.at(records, method, budget)
      assert np.all(np.array(own['drift']) < 1.2 * np.maximum(budget, adam.min())), method
      assert np.mean(own['drift']) < np.mean(adam)
      assert max(own['last']) > 0


def record(method: str, setting: Any, drift: float, scores: tuple[float, float]) -> dict[str, Any]:
  values = {'drift': [drift] * 2, 'drift, test': [drift] * 2}
  score, old = scores
  values['last'] = [1.0 if drift < 0.9 else 2.0] * 2
  return {'method': method, 'setting': setting, 'id': [score] * 2, 'ood': [old] * 2} | values


def hand_made() -> dict[str, list[dict[str, Any]]]:
  """At a drift of 1 the sweep has 70 / 50, halfway between its neighbours."""
  found = [record(budgets.ADAM, {}, 4.0, (80, 40))]
  found += [record(budgets.FIXED, {'strength': 1.0}, 0.25, (60, 60))]
  for method, (_, dials) in budgets.BUDGETED.items():
    for dial in dials:
      drift = {10.0: 1.2, 0.1: 0.8}.get(dial, 1.0)
      found.append(record(method, {'budget': 1.0, 'init': dial}, drift, (73, 51)))
  found.append(record(budgets.WISE, {'budget': 1.0}, 1.0, (70, 49)))
  return {'task': found}


def test_tables_say_what_the_records_do(monkeypatch: pytest.MonkeyPatch) -> None:
  """Catches a line in the drift itself, differences of the wrong sign, and a miscount."""
  monkeypatch.setattr(budgets, 'SHARES', (0.25,))
  records = hand_made()
  assert budgets.interpolated(records['task'], 1.0, 'id') == pytest.approx(70)
  assert budgets.interpolated(records['task'], 1 / math.e**9, 'ood') == 60
  table = budgets.at_equal_drift(records)
  assert table[budgets.LINK]['ID − sweep'] == pytest.approx([3])
  assert table[budgets.LINK]['OOD − sweep, 0.25'] == pytest.approx([1])
  assert table[budgets.LINK]['OOD − WiSE-FT'] == pytest.approx([2])
  assert table[budgets.WISE]['OOD − sweep'] == pytest.approx([-1])
  out_of_reach = [r for r in records['task'] if r['method'] != budgets.FIXED]
  out_of_reach.append(record(budgets.FIXED, {'strength': 1.0}, 1.3, (60, 60)))
  assert budgets.at_equal_drift({'task': out_of_reach})[budgets.LINK]['ID − sweep'] == '–'
  table = budgets.reached(records)
  assert table['task, 1']['Adam'] == '4.00 ± 0.00'
  table = budgets.met(records)
  expected = {
    'tasks with both budgets within 10 %': ['0 of 1', '1 of 1', '0 of 1', '1 of 1', '1 of 1'],
    'budgets within 10 %': ['0 of 1', '1 of 1', '0 of 1', '1 of 1', '1 of 1'],
    'runs within 10 %': ['0 of 2', '2 of 2', '0 of 2', '2 of 2', '2 of 2'],
    'runs more than 10 % above': ['0', '0', '2', '0', '0'],
    'runs more than 10 % below': ['2', '0', '0', '0', '0'],
    'of these with λ at its default or below at the end': ['2', '0', '0', '0', '0'],
  }
  assert {title: list(table[title].values()) for title in expected} == expected
  assert budgets.scores(records)['task, 1']['a fixed strength'] == '70.0 / 50.0'
