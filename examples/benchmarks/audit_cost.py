"""What auditing costs: a record at every training step, and the report of a long log.

    python examples/benchmarks/audit_cost.py

A training step of the example's ViT with `adam_spd` and one that is logged take turns, as in
training_step.py; both are of one program. The report, in a process of its own, is of a log of
10,000 records of 200 layers.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))  # examples/, for what follows

import digits
import finetune_vit
import reporting
import spd_optax as spd
import training
from benchmarks import methods, step_time, training_step
from spd_optax.audit import format

PLAIN, LOGGED = 'adam_spd', 'adam_spd, every step logged'


class LoggedRun(training_step.TrainingRun):
  """A training run that records every step."""

  def __init__(self, model: Any, optimizer: Any, batch: digits.Split, path: Path):
    super().__init__(model, optimizer, batch)
    self.log = spd.AuditLog(path, transform='adam_spd', source='itself', patience=10**9)
    self.step = 0

  def seconds(self, turn: int, repeats: int) -> float:
    del turn
    begin = time.perf_counter()
    for _ in range(10 * repeats):
      self.carry = self.program(*self.carry, self.batch)
      self.step += 1
      self.log.record(self.step, self.carry[1], {'loss': 1.0})
    jax.block_until_ready(self.carry)
    return (time.perf_counter() - begin) / (10 * repeats)


def steps(args: argparse.Namespace, folder: Path) -> dict[str, dict[str, list[float]]]:
  """Times of a training step without a record and with one."""
  model = finetune_vit.small_vit()
  pool, _, _ = digits.load()
  data = finetune_vit.pixels(digits.in_style(pool, 'striped'), model.config)
  batch = jax.tree.map(lambda x: x[: args.batch], data)
  make, anchor = methods.OPTIMIZERS[PLAIN], jax.device_get(model.params)
  runs: dict[str, Any] = {
    PLAIN: training_step.TrainingRun(model, make(anchor), batch),
    LOGGED: LoggedRun(model, make(anchor), batch, folder / 'steps.jsonl'),
  }
  with training.progress_bar() as bar:
    task = bar.add_task('train', total=step_time.WARM_UP + args.rounds)
    times = step_time.take_turns(runs, args.rounds, lambda: bar.advance(task))
  runs[LOGGED].log.close()
  found = {}
  for name, seconds in times.items():
    columns = step_time.columns(seconds, seconds / times[PLAIN], None)
    columns['% of adam_spd'] = columns.pop('% of Adam')
    found[name] = columns
  return found


def long_log(path: Path, records: int, layers: int) -> None:
  """Writes a log of states that were made up."""
  rng = np.random.default_rng(0)
  anchor = format.Anchor('', source='made up', captured=False, moving=False, norms=[1.0] * layers)
  header = format.Header(
    format=format.FORMAT,
    schema=format.SCHEMA,
    started='',
    versions={},
    transform='',
    hyperparameters={},
    anchor=anchor,
    layers=[f'encoder/layer/{i // 16}/leaf_{i % 16}/kernel' for i in range(layers)],
    states=[layers],
  )
  constrained, distance = np.zeros(layers, int), np.zeros(layers)
  line, digest = format.seal(header, '')
  with path.open('wb') as file:
    file.write(line)
    for step in range(1, records + 1):
      held = rng.random(layers) < 0.4
      constrained, distance = constrained + held, distance + 1e-4 * rng.random(layers) * ~held
      fields = format.Line(
        step=step,
        time=float(step),
        updates=[step],
        condition=held.astype(int).tolist(),
        ratio=format.numbers(rng.random(layers)),
        distance=format.numbers(distance),
        constrained=constrained.tolist(),
        rule_state={},
        metrics={'loss': 1 / step, 'accuracy': 1 - 1 / step},
      )
      line, digest = format.seal(fields, digest)
      file.write(line)


def report(args: argparse.Namespace, folder: Path) -> dict[str, list[float]]:
  """Times of the whole command and of reading alone."""
  path = folder / 'long.jsonl'
  long_log(path, args.records, args.layers)
  command = [sys.executable, '-m', 'spd_optax.audit', 'report', str(path)]
  begin = time.perf_counter()
  subprocess.run(
    [*command, '--html', str(folder / 'page.html')], check=True, stdout=subprocess.DEVNULL
  )
  whole = time.perf_counter() - begin
  begin = time.perf_counter()
  format.read(path)
  read = time.perf_counter() - begin
  megabytes = path.stat().st_size / 1e6
  found = {'report, s': whole, 'of it reading, s': read, 'log, MB': megabytes}
  return {name: [round(value, 3)] for name, value in found.items()}


def main(argv: list[str] | None = None) -> dict[str, Any]:
  """Runs the benchmark; returns the table."""
  parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
  parser.add_argument('--rounds', type=int, default=31)
  parser.add_argument('--batch', type=int, default=32)
  parser.add_argument('--records', type=int, default=10_000)
  parser.add_argument('--layers', type=int, default=200)
  parser.add_argument('--out', type=Path, default=Path('runs/audit'))
  args = parser.parse_args(argv)
  with tempfile.TemporaryDirectory() as folder:
    results: dict[str, Any] = steps(args, Path(folder))
    name = f'report of {args.records:,} records, {args.layers} layers'
    results[name] = report(args, Path(folder))
  settings = {name: getattr(args, name) for name in ('rounds', 'batch', 'records', 'layers')}
  settings['host'] = step_time.processor()
  reporting.show('What auditing costs', results)
  reporting.write_json(args.out / 'audit_cost.json', settings, results)
  return results


if __name__ == '__main__':
  main()
