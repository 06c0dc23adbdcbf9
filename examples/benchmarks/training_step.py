"""Time of a whole training step of the example's ViT, with SPD and without.

    python examples/benchmarks/training_step.py

Forward, backward and optimizer in one program; the methods take turns as in step_time.py.
"""

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))  # examples/, for what follows

import digits
import finetune_vit
import reporting
import training
from benchmarks import methods, step_time


class TrainingRun:
  """A `step_time.Run` of a training step with the params and state that it trains."""

  def __init__(self, model: Any, optimizer: Any, batch: digits.Split):
    step, loss = methods.make_step(optimizer), finetune_vit.loss_of(model)

    def train(params: Any, state: Any, batch: digits.Split) -> Any:
      return step(params, state, jax.grad(loss)(params, batch))

    params = jax.tree.map(np.array, model.params)
    self.carry, self.batch = (params, optimizer.init(params)), batch
    self.program = jax.jit(train, donate_argnums=(0, 1)).lower(*self.carry, batch).compile()
    self.carry = jax.block_until_ready(self.program(*self.carry, batch))

  def seconds(self, turn: int, repeats: int) -> float:
    del turn
    begin = time.perf_counter()
    for _ in range(10 * repeats):
      self.carry = self.program(*self.carry, self.batch)
    jax.block_until_ready(self.carry)
    return (time.perf_counter() - begin) / (10 * repeats)


def main(argv: list[str] | None = None) -> dict[str, Any]:
  """Runs the benchmark; returns the table."""
  parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
  parser.add_argument('--rounds', type=int, default=31)
  parser.add_argument('--batch', type=int, default=32)
  parser.add_argument('--out', type=Path, default=Path('runs/training_step'))
  args = parser.parse_args(argv)
  model = finetune_vit.small_vit()
  pool, _, _ = digits.load()
  data = finetune_vit.pixels(digits.in_style(pool, 'striped'), model.config)
  batch = jax.tree.map(lambda x: x[: args.batch], data)
  anchor = jax.device_get(model.params)
  runs = {
    name: TrainingRun(model, make(anchor), batch) for name, make in methods.OPTIMIZERS.items()
  }
  with training.progress_bar() as bar:
    task = bar.add_task('train', total=step_time.WARM_UP + args.rounds)
    times = step_time.take_turns(runs, args.rounds, lambda: bar.advance(task))
  reference = times[methods.REFERENCE]
  results = {name: step_time.columns(t, t / reference, None) for name, t in times.items()}
  settings = {'rounds': args.rounds, 'batch': args.batch, 'host': step_time.processor()}
  count = sum(x.size for x in jax.tree.leaves(model.params))
  reporting.show(f'A training step of the example ViT, {count:,} parameters', results)
  reporting.write_json(args.out / 'results.json', settings, results)
  return results


if __name__ == '__main__':
  main()
