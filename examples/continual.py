"""Fine-tune on one task after the other, and see what is left of each at the end.

    python examples/continual.py

The small ViT of finetune_vit.py, which knows handwritten digits in eight styles, learns
three new styles one after the other, from a few images each and without those of the
tasks before. Adam, and SPD with three anchors: the pre-trained weights throughout;
the weights at each task's beginning (`spd.reanchor`); and an anchor that follows slowly
(`anchor_ema`). After every task: accuracy on this task, on all earlier ones, on the old styles.
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from matplotlib import pyplot as plt

import comparison
import digits
import finetune_vit
import reporting
import spd_optax as spd
import training

TASKS = ('thick', 'striped', 'inverted')


class Method(NamedTuple):
  """An optimizer; whether every task begins with a new anchor, and whether that follows."""

  optimizer: optax.GradientTransformation
  reanchored: bool = False
  follows: bool = False


def methods(lr: float, anchor: Any, ema: float) -> dict[str, Method]:
  """Adam, and `adam_spd` and a firm `projection_decay` with each kind of anchor."""

  def firm(**options: Any) -> optax.GradientTransformation:
    return optax.chain(spd.projection_decay(anchor, **comparison.FIRM, **options), optax.adam(lr))

  return {
    'Adam': Method(optax.adam(lr)),
    'adam_spd': Method(spd.adam_spd(lr, anchor)),
    'adam_spd, reanchored': Method(spd.adam_spd(lr, anchor), reanchored=True),
    'adam_spd, following': Method(spd.adam_spd(lr, anchor, anchor_ema=ema), follows=True),
    'projection_decay, firm': Method(firm()),
    'projection_decay, firm, reanchored': Method(firm(), reanchored=True),
    'projection_decay, firm, following': Method(firm(anchor_ema=ema), follows=True),
  }


class Stage(NamedTuple):
  """What there is to learn in a task, and the order of its batches."""

  style: str
  data: digits.Split
  order: np.ndarray


def stages(args: argparse.Namespace, config: Any) -> list[Stage]:
  """The tasks, each with its own digits."""
  _, pool, _ = digits.load()
  parts = np.array_split(np.arange(len(pool.labels)), len(TASKS))
  found = []
  for style, part in zip(TASKS, parts, strict=True):
    own = digits.Split(pool.images[part], pool.labels[part])
    data = finetune_vit.pixels(digits.in_style(own, style), config)
    found.append(
      Stage(style, data, training.batch_order(args.seeds, args.steps, args.batch, len(part)))
    )
  return found


def learn(
  model: Any,
  method: Method,
  tasks: Sequence[Stage],
  tests: dict[str, digits.Split],
  advance: Callable[[int], None],
  record: Callable[[int, Any, Any], None],
) -> list[dict[str, list[float]]]:
  """Learns the tasks in turn; accuracies on every test set after each: lists over seeds."""
  loss = finetune_vit.loss_of(model)
  params, state, found, done = model.params, None, [], 0
  for task in tasks:
    if method.reanchored and state is not None:
      state = jax.jit(jax.vmap(spd.reanchor))(state, params)
    params, state = training.train(
      loss,
      method.optimizer,
      params,
      task.data,
      task.order,
      advance,
      state,
      record=lambda step, *arrays, before=done: record(before + step, *arrays),
    )
    done += task.order.shape[1]
    found.append(comparison.columns(finetune_vit.accuracies(model, params, tests)))
  return found


def compare(args: argparse.Namespace, checkpoint: str, bar: Any) -> dict[str, Any]:
  """The course of every method: `learn`."""
  model, anchor = finetune_vit.load(checkpoint)
  _, _, test = digits.load()
  tests = {
    style: finetune_vit.pixels(digits.in_style(test, style), model.config)
    for style in (*TASKS, *digits.OLD)
  }
  tasks, courses = stages(args, model.config), {}
  for name, method in methods(args.lr, anchor, args.anchor_ema).items():
    progress = bar.add_task(name, total=len(TASKS) * args.steps)
    moving = method.reanchored or method.follows
    settings = comparison.settings(name, args.lr)
    settings |= {'anchor_ema': args.anchor_ema} if method.follows else {}
    with comparison.audit_log(
      args.out / 'audit', name, settings, anchor, captured=False, moving_anchor=moving
    ) as record:
      courses[name] = learn(
        model, method, tasks, tests, lambda n, p=progress: bar.advance(p, n), record
      )
  return courses


def summary(after: Sequence[dict[str, list[float]]]) -> dict[str, list[float]]:
  """The columns of the table: 'striped 3' is the accuracy on striped after the third task."""
  stages = [{name: np.array(values) for name, values in stage.items()} for stage in after]
  found = {
    f'{task} {j + 1}': stages[j][task] for i, task in enumerate(TASKS) for j in range(i, len(TASKS))
  }
  for j, stage in enumerate(stages):
    found[f'old {j + 1}'] = np.mean([stage[style] for style in digits.OLD], axis=0)
  lost = [stage[task] - stages[-1][task] for stage, task in zip(stages, TASKS[:-1], strict=False)]
  return comparison.columns(found | {'forgotten': np.mean(lost, axis=0)})


def picture(path: Path, courses: dict[str, list[dict[str, list[float]]]]) -> None:
  """Accuracy on the old styles and on each task, as the tasks come."""
  panels = {'old styles': tuple(digits.OLD)} | {task: (task,) for task in TASKS}
  figure, axes = plt.subplots(1, len(panels), figsize=(13, 4), sharey=True, layout='constrained')
  for ax, (title, styles) in zip(axes, panels.items(), strict=True):
    for name, course in courses.items():
      values = np.array([np.mean([stage[style] for style in styles], axis=0) for stage in course])
      error = values.std(1, ddof=1) / values.shape[1] ** 0.5 if values.shape[1] > 1 else None
      ax.errorbar(TASKS, values.mean(1), error, marker='o', capsize=2, label=name)
    ax.set(title=f'accuracy on {title} (%)', xlabel='after learning')
    ax.grid(alpha=0.3)
  figure.legend(*axes[0].get_legend_handles_labels(), loc='outside lower center', ncols=4)
  figure.savefig(path, dpi=110)
  plt.close(figure)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
  """The command line."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  add = parser.add_argument
  add('--checkpoint', help='ViT with the classes of the digits; default: train a small one first')
  add('--lr', type=float, default=1e-3, help='learning rate (default: %(default)s)')
  add('--anchor-ema', type=float, default=0.99, help='β of the anchor that follows')
  add('--steps', type=int, default=200, help='steps in a task (default: %(default)s)')
  add('--batch', type=int, default=32, help='batch size (default: %(default)s)')
  add('--seeds', type=int, default=4, help='seeds, trained together (default: %(default)s)')
  add('--pretrain-steps', type=int, default=800, help='default: %(default)s')
  add('--out', type=Path, default=Path('runs/continual'), help='default: %(default)s')
  return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
  """Runs the sequence with every method; writes results.json and results.png."""
  args = parse(arguments)
  with training.progress_bar() as bar:
    checkpoint = args.checkpoint or str(args.out / 'foundation')
    if args.checkpoint is None:
      finetune_vit.pretrain([Path(checkpoint)], args.pretrain_steps, bar)
    courses = compare(args, checkpoint, bar)
  results = {name: summary(course) for name, course in courses.items()}
  reporting.publish(
    args, f'{" → ".join(TASKS)}. Accuracy in % after task 1, 2, 3, ± standard error', results
  )
  picture(args.out / 'results.png', courses)
  print(f'Results: {args.out}/results.json, {args.out}/results.png')
  comparison.show_audit(args.out / 'audit')
  return results


if __name__ == '__main__':
  main()
