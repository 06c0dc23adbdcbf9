"""Fine-tune a Flax nnx ViT on a few images of a new style without forgetting the old ones.

    python examples/finetune_vit.py                          # makes its own checkpoint
    python examples/finetune_vit.py --checkpoint DIR_OR_HUB_ID

A checkpoint is a directory with config.json and model.safetensors, as PyTorch's ViT in
transformers is saved. Without one each seed first trains a small ViT of its own on real handwritten
digits in eight styles, and saves it so. A checkpoint whose head has not 10 classes gets a new head
without an anchor; it knows no digits, so that "old" then only says how it does on styles that it
was not fine-tuned on. From there every method fine-tunes on the same few images of a ninth style,
in the same order. Each seed has its own images and order.
"""

import argparse
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from matplotlib import pyplot as plt
from scipy import ndimage

import checkpoints
import comparison
import digits
import reporting
import spd_optax as spd
import training
import vit
from checkpoints import Model


def small_vit(seed: int = 0, blocks: int = 3) -> Model:
  """A ViT for 16×16 grey images: 3 blocks, width 48, 59,146 parameters."""
  config = {'model_type': 'vit', 'image_size': digits.SIZE, 'patch_size': 4, 'num_channels': 1}
  config |= {'hidden_size': 48, 'intermediate_size': 96, 'num_labels': digits.CLASSES}
  config |= {'num_hidden_layers': blocks, 'num_attention_heads': 4}
  return checkpoints.split(vit.ViT(config, digits.CLASSES, nnx.Rngs(seed)), config)


def loss_of(model: Model) -> training.Loss:
  """Cross-entropy of the model's logits."""

  def loss(params: Any, batch: digits.Split) -> jax.Array:
    logits = model(batch.images, params=params)
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels).mean()

  return loss


def pixels(split: digits.Split, config: Mapping[str, Any]) -> digits.Split:
  """Images as the model takes them: float32[n, size, size, channels] in [−1, 1]."""
  scale = config['image_size'] / digits.SIZE
  images = ndimage.zoom(split.images, (1, scale, scale), order=1) * 2 - 1
  images = np.repeat(images[..., None], config['num_channels'], axis=-1)
  return digits.Split(images.astype(np.float32), split.labels)


def pretrain(folders: Sequence[Path], steps: int, bar: Any) -> None:
  """Trains a small ViT for each folder on the old styles, and saves it as a checkpoint."""
  models = [small_vit(seed) for seed in range(len(folders))]
  pool, _, _ = digits.load()
  styled = [pixels(digits.in_style(pool, style), models[0].config) for style in digits.OLD]
  data = jax.tree.map(lambda *parts: np.concatenate(parts), *styled)
  order = training.batch_order(len(models), steps, 128, len(data.labels))
  optimizer = optax.adamw(optax.warmup_cosine_decay_schedule(0, 3e-3, steps // 10, steps))
  params = jax.tree.map(lambda *x: jnp.stack(x), *(model.params for model in models))
  state = jax.vmap(optimizer.init)(params)
  task = bar.add_task('pre-train', total=steps)
  params, _ = training.train(
    loss_of(models[0]), optimizer, params, data, order, lambda n: bar.advance(task, n), state
  )
  for i, (folder, model) in enumerate(zip(folders, models, strict=True)):
    own = jax.tree.map(lambda x: x[i], params)  # noqa: B023
    checkpoints.write(folder, dataclasses.replace(model, params=own))


def load(checkpoint: str) -> tuple[Model, Any]:
  """The model, and its anchor: the pre-trained weights, without a head that is new."""
  config, tensors, _ = checkpoints.read(checkpoint)
  model = checkpoints.split(vit.ViT(config, digits.CLASSES, nnx.Rngs(0)), config)
  if len(tensors.get('classifier.bias', ())) == digits.CLASSES:
    model = checkpoints.filled(model, tensors)
    return model, model.params
  model = checkpoints.filled(model, tensors, new='classifier')
  return model, {**model.params, 'classifier': None}


def accuracies(model: Model, params: Any, tests: dict[str, digits.Split]) -> dict[str, np.ndarray]:
  """Accuracy in % for each test set: an array over seeds."""
  return {name: np.asarray(_accuracy(model, params, test)) for name, test in tests.items()}


@functools.partial(jax.jit, static_argnums=0)
def _accuracy(model: Model, params: Any, test: digits.Split) -> jax.Array:
  def accuracy(params: Any) -> jax.Array:
    predictions = jnp.argmax(model(test.images, params=params), -1)
    return 100 * jnp.mean(predictions == test.labels)

  return jax.lax.map(accuracy, params)  # one seed at a time: large models fit


def evaluate(
  model: Model,
  params: Any,
  start: Any,
  tests: dict[str, digits.Split],
  style: str,
) -> dict[str, list[float]]:
  """The columns of the table, each a list over seeds."""
  found = accuracies(model, params, tests)
  old = np.mean([found[name] for name in digits.OLD], 0)
  moved = comparison.distance(params, start)
  return comparison.columns({'new style': found[style], 'old styles': old, 'moved': moved})


def compare(args: argparse.Namespace, names: Sequence[str], bar: Any) -> dict[str, Any]:
  """Fine-tunes with every method: all seeds from one checkpoint, or each from its own.

  Returns the columns of each method.
  """
  loaded = [load(name) for name in names]
  model, anchor = loaded[0]
  _, pool, test = digits.load()
  data = pixels(digits.in_style(pool, args.style), model.config)
  tests = {
    style: pixels(digits.in_style(test, style), model.config) for style in (args.style, *digits.OLD)
  }
  order = training.batch_order(args.seeds, args.steps, args.batch, len(data.labels), args.shots)
  # Structures are captured at the first update, so that one program serves all checkpoints.
  structs = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), anchor)
  methods, loss = comparison.methods(args.lr, structs), loss_of(model)
  significant = spd.adam_spd(args.lr, structs, rule=spd.SignificantProjection())
  methods['adam_spd, SignificantProjection'] = significant
  parts = []
  for i, (own, anchor) in enumerate(loaded):
    for task in bar.task_ids:
      bar.remove_task(task)
    parts.append(
      comparison.run(
        methods,
        loss,
        own.params,
        anchor,
        data,
        order[i : i + 1] if len(loaded) > 1 else order,
        lambda params, start=own.params: evaluate(model, params, start, tests, args.style),
        bar,
        args.out / 'audit' / str(i),
        args.lr,
        captured=True,
      )
    )
  joined = {
    name: {column: [x for part in parts for x in part[name][column]] for column in row}
    for name, row in parts[0].items()
  }
  single = {'pre-trained': joined.pop('pre-trained')} if len(loaded) == 1 else {}
  return single | {name: beside(row, joined['Adam']) for name, row in joined.items()}


def beside(row: comparison.Columns, adam: comparison.Columns) -> comparison.Columns:
  """The row with its differences from Adam's, seed by seed."""
  new, old = (np.subtract(row[name], adam[name]) for name in ('new style', 'old styles'))
  return row | comparison.columns({'new − Adam': new, 'old − Adam': old})


def picture(path: Path, results: dict[str, Any], style: str) -> None:
  """The styles as images, and every method as a point: the new style against the old."""
  _, _, test = digits.load()
  figure = plt.figure(figsize=(11, 5), layout='constrained')
  left, right = figure.subfigures(1, 2, width_ratios=(4, 7))
  names = (*digits.OLD, style)
  for axes, name in zip(left.subplots(3, 3).flat, names, strict=True):
    axes.imshow(digits.in_style(test, name).images[0], cmap='gray', vmin=0, vmax=1)
    axes.set_title(f'new: {name}' if name == style else name, fontsize=9)
    axes.axis('off')
  axes = right.subplots()
  trained = {name: row for name, row in results.items() if name != 'pre-trained'}
  reporting.scatter(axes, trained, 'new − Adam', 'old − Adam')
  if before := results['pre-trained'].get('old − Adam'):
    axes.axhline(np.mean(before), color='gray', linestyle=':')
  axes.set(xlabel=f'new style, {style}: accuracy − Adam (points)')
  axes.set(ylabel='old styles: mean accuracy − Adam (points)')
  axes.set_title('Fine-tuning on a new style (dotted: old styles before it)', fontsize=10)
  figure.savefig(path, dpi=120)
  plt.close(figure)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
  """The command line."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  add: Callable[..., Any] = parser.add_argument
  add(
    '--checkpoint',
    help='directory or hub id of a ViT; default: train a small one first. A head without '
    '10 classes is replaced; "old" then says only how it does on styles it never saw',
  )
  add('--style', default='striped', choices=digits.NEW, help='new style (default: %(default)s)')
  add('--lr', type=float, default=1e-3, help='learning rate (default: %(default)s)')
  add('--steps', type=int, default=300, help='fine-tuning steps (default: %(default)s)')
  add('--batch', type=int, default=32, help='batch size (default: %(default)s)')
  add('--shots', type=int, default=200, help='images to fine-tune on (default: %(default)s)')
  add('--seeds', type=int, default=4, help='default: %(default)s')
  add('--pretrain-steps', type=int, default=800, help='default: %(default)s')
  add('--out', type=Path, default=Path('runs/finetune_vit'), help='default: %(default)s')
  return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
  """Runs the comparison and writes results.json and results.png."""
  args = parse(arguments)
  with training.progress_bar() as bar:
    names = [args.checkpoint]
    if not args.checkpoint:
      folders = [args.out / 'foundation' / str(seed) for seed in range(args.seeds)]
      pretrain(folders, args.pretrain_steps, bar)
      names = [str(folder) for folder in folders]
    results = compare(args, names, bar)
  reporting.publish(args, f'New style: {args.style}. Accuracy in %, ± standard error', results)
  picture(args.out / 'results.png', results, args.style)
  print(f'Checkpoints: {", ".join(names)}')
  print(f'Results: {args.out}/results.json, {args.out}/results.png')
  comparison.show_audit(args.out / 'audit' / '0')
  return results


if __name__ == '__main__':
  main()
