"""Fine-tune a Flax ViT on a few images of a new style without forgetting the old ones.

    python examples/finetune_vit.py                          # makes its own checkpoint
    python examples/finetune_vit.py --checkpoint DIR_OR_HUB_ID

Without a checkpoint a small ViT is first trained on real handwritten digits in
eight styles and saved with `save_pretrained`. A checkpoint whose head has not 10
classes gets a new head without an anchor; it knows no digits, so that "old" then
only says how it does on styles that it was not fine-tuned on. From there every method fine-tunes
on the same few images of a ninth style, in the same order, for several seeds.
"""

import argparse
import functools
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault('TRANSFORMERS_VERBOSITY', 'error')  # its Flax classes announce their end

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib import pyplot as plt
from scipy import ndimage
from transformers import FlaxViTForImageClassification, ViTConfig

import comparison
import digits
import reporting
import training


def small_vit() -> FlaxViTForImageClassification:
  """A ViT for 16×16 grey images: 3 blocks, width 48, 59,146 parameters."""
  config = ViTConfig(
    image_size=digits.SIZE,
    patch_size=4,
    num_channels=1,
    hidden_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    intermediate_size=96,
    num_labels=digits.CLASSES,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
  )
  return FlaxViTForImageClassification(config, seed=0)


def loss_of(model: FlaxViTForImageClassification) -> training.Loss:
  """Cross-entropy of the model's logits."""

  def loss(params: Any, batch: digits.Split) -> jax.Array:
    logits = model(batch.images, params=params).logits
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels).mean()

  return loss


def pixels(split: digits.Split, config: ViTConfig) -> digits.Split:
  """Images as the model takes them: float32[n, channels, size, size] in [−1, 1]."""
  scale = config.image_size / digits.SIZE
  images = ndimage.zoom(split.images, (1, scale, scale), order=1) * 2 - 1
  images = np.repeat(images[:, None], config.num_channels, axis=1)
  return digits.Split(images.astype(np.float32), split.labels)


def pretrain(directory: Path, steps: int, bar: Any) -> None:
  """Trains the small ViT on the old styles and saves it as a checkpoint."""
  model = small_vit()
  pool, _, _ = digits.load()
  styled = [pixels(digits.in_style(pool, style), model.config) for style in digits.OLD]
  data = jax.tree.map(lambda *parts: np.concatenate(parts), *styled)
  order = training.batch_order(1, steps, 128, len(data.labels))
  optimizer = optax.adamw(optax.warmup_cosine_decay_schedule(0, 3e-3, steps // 10, steps))
  task = bar.add_task('pre-train', total=steps)
  params, _ = training.train(
    loss_of(model), optimizer, model.params, data, order, lambda n: bar.advance(task, n)
  )
  model.save_pretrained(directory, params=jax.tree.map(lambda x: x[0], params))


def load(checkpoint: str) -> tuple[FlaxViTForImageClassification, Any]:
  """The model, and its anchor: the pre-trained weights, without a head that is new."""
  model = FlaxViTForImageClassification.from_pretrained(checkpoint)
  if model.config.num_labels == digits.CLASSES:
    return model, model.params
  config = ViTConfig.from_pretrained(checkpoint, num_labels=digits.CLASSES)
  new = FlaxViTForImageClassification(config, seed=0)
  new.params = {**new.params, 'vit': model.params['vit']}
  return new, {**new.params, 'classifier': None}


def accuracies(
  model: FlaxViTForImageClassification, params: Any, tests: dict[str, digits.Split]
) -> dict[str, np.ndarray]:
  """Accuracy in % for each test set: an array over seeds."""
  return {name: np.asarray(_accuracy(model, params, test)) for name, test in tests.items()}


@functools.partial(jax.jit, static_argnums=0)
def _accuracy(model: FlaxViTForImageClassification, params: Any, test: digits.Split) -> jax.Array:
  def accuracy(params: Any) -> jax.Array:
    predictions = jnp.argmax(model(test.images, params=params).logits, -1)
    return 100 * jnp.mean(predictions == test.labels)

  return jax.lax.map(accuracy, params)  # one seed at a time: large models fit


def evaluate(
  model: FlaxViTForImageClassification, params: Any, tests: dict[str, digits.Split], style: str
) -> dict[str, list[float]]:
  """The columns of the table, each a list over seeds."""
  found = accuracies(model, params, tests)
  old = np.stack([found[name] for name in digits.OLD])
  return comparison.columns(
    {
      'new style': found[style],
      'old, mean': old.mean(0),
      'old, worst': old.min(0),
      'moved': comparison.distance(params, model.params),
    }
  )


def compare(args: argparse.Namespace, checkpoint: str, bar: Any) -> dict[str, Any]:
  """Fine-tunes with every method; returns its columns by method."""
  model, anchor = load(checkpoint)
  _, pool, test = digits.load()
  data = pixels(digits.in_style(pool, args.style), model.config)
  tests = {
    style: pixels(digits.in_style(test, style), model.config) for style in (args.style, *digits.OLD)
  }
  order = training.batch_order(args.seeds, args.steps, args.batch, len(data.labels), args.shots)
  return comparison.run(
    comparison.methods(args.lr, anchor),
    loss_of(model),
    model.params,
    anchor,
    data,
    order,
    lambda params: evaluate(model, params, tests, args.style),
    bar,
    args.out / 'audit',
    args.lr,
  )


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
  reporting.scatter(axes, trained, 'new style', 'old, mean')
  axes.axhline(results['pre-trained']['old, mean'][0], color='gray', linestyle=':')
  axes.set(xlabel=f'accuracy on the new style, {style} (%)', ylabel='mean accuracy, old styles (%)')
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
  add('--seeds', type=int, default=4, help='seeds, trained together (default: %(default)s)')
  add('--pretrain-steps', type=int, default=800, help='default: %(default)s')
  add('--out', type=Path, default=Path('runs/finetune_vit'), help='default: %(default)s')
  return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
  """Runs the comparison and writes results.json and results.png."""
  args = parse(arguments)
  with training.progress_bar() as bar:
    checkpoint = args.checkpoint
    if checkpoint is None:
      checkpoint = str(args.out / 'foundation')
      pretrain(Path(checkpoint), args.pretrain_steps, bar)
    results = compare(args, checkpoint, bar)
  reporting.publish(args, f'New style: {args.style}. Accuracy in %, ± standard error', results)
  picture(args.out / 'results.png', results, args.style)
  print(f'Checkpoint: {checkpoint}\nResults: {args.out}/results.json, {args.out}/results.png')
  comparison.show_audit(args.out / 'audit')
  return results


if __name__ == '__main__':
  main()
