"""Fine-tune a Flax nnx ViT with LoRA adapters, and with a part of it frozen.

    python examples/finetune_lora.py

A small ViT is first trained on real handwritten digits in eight styles. Then every
linear layer gets an adapter (W becomes W + A B with B = 0), and the adapters alone
are trained on a few images of a ninth style: by Adam, and by SPD with three anchors.
At last all weights are trained, except the embedding, which `optax.partition` freezes.
`finetune` is all that one run needs; the other code compares.

Anchors of the adapters: 0 stores nothing and also pulls A toward 0; A₀, B₀ is where
the adapters start; 0 for B stores nothing either, and leaves A free. "Firm" is
strength 10 and margin 0.1; all else is at its defaults.
"""

import argparse
import functools
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from matplotlib import pyplot as plt

import comparison
import digits
import reporting
import spd_optax as spd
import training

WIDTH, HEADS, BLOCKS, PATCH = 48, 4, 2, 4
PARTS = 'LoRA: ', 'all weights: '


class Embedding(nnx.Module):
  """Images float[n, 16, 16] to tokens float[n, 16, width], one per patch."""

  def __init__(self, rngs: nnx.Rngs):
    self.patches = nnx.Linear(PATCH**2, WIDTH, rngs=rngs)
    tokens = (digits.SIZE // PATCH) ** 2
    self.positions = nnx.Param(0.02 * jax.random.normal(rngs.params(), (tokens, WIDTH)))

  def __call__(self, images: jax.Array) -> jax.Array:
    rows = digits.SIZE // PATCH
    patches = (2 * images - 1).reshape(-1, rows, PATCH, rows, PATCH).swapaxes(2, 3)
    return self.patches(patches.reshape(-1, rows**2, PATCH**2)) + self.positions


class Block(nnx.Module):
  """A transformer block."""

  def __init__(self, rngs: nnx.Rngs):
    self.attention_norm = nnx.LayerNorm(WIDTH, rngs=rngs)
    self.mix = nnx.Linear(WIDTH, 3 * WIDTH, rngs=rngs)
    self.out = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
    self.mlp_norm = nnx.LayerNorm(WIDTH, rngs=rngs)
    self.up = nnx.Linear(WIDTH, 2 * WIDTH, rngs=rngs)
    self.down = nnx.Linear(2 * WIDTH, WIDTH, rngs=rngs)

  def __call__(self, x: jax.Array) -> jax.Array:
    mixed = self.mix(self.attention_norm(x)).reshape(*x.shape[:2], HEADS, -1)
    attended = jax.nn.dot_product_attention(*jnp.split(mixed, 3, axis=-1))
    x = x + self.out(attended.reshape(x.shape))
    return x + self.down(nnx.gelu(self.up(self.mlp_norm(x))))


class ViT(nnx.Module):
  """A ViT for 16×16 grey images: 2 blocks, width 48, 40,090 parameters."""

  def __init__(self, rngs: nnx.Rngs):
    self.embedding = Embedding(rngs)
    self.blocks = nnx.List([Block(rngs) for _ in range(BLOCKS)])
    self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)
    self.head = nnx.Linear(WIDTH, digits.CLASSES, rngs=rngs)

  def __call__(self, images: jax.Array) -> jax.Array:
    x = self.embedding(images)
    for block in self.blocks:
      x = block(x)
    return self.head(self.norm(x).mean(1))


def with_adapters(model: ViT, rank: int) -> ViT:
  """A copy of the model with a LoRA adapter around every linear layer."""
  model, rngs = nnx.clone(model), nnx.Rngs(1)
  for _, module in list(nnx.iter_modules(model)):
    for name, layer in list(vars(module).items()):
      if isinstance(layer, nnx.Linear):
        inner, outer = layer.in_features, layer.out_features
        setattr(module, name, nnx.LoRA(inner, rank, outer, base_module=layer, rngs=rngs))
  return model


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
  """Mean over a batch."""
  return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def finetune(model: ViT, batches: Iterable[digits.Split], lr: float) -> None:
  """Trains the adapters of the model in place: the plain nnx way, to copy from."""
  optimizer = nnx.Optimizer(model, spd.adam_spd(lr, anchor=0), wrt=nnx.LoRAParam)

  @nnx.jit
  def step(model: ViT, optimizer: nnx.Optimizer, batch: digits.Split) -> None:
    def loss(model: ViT) -> jax.Array:
      return cross_entropy(model(batch.images), batch.labels)

    gradients = nnx.grad(loss, argnums=nnx.DiffState(0, nnx.LoRAParam))(model)
    optimizer.update(model, gradients)

  for batch in batches:
    step(model, optimizer, batch)


class Trained(NamedTuple):
  """Those params of a model that are trained, for the loop that all examples share.

  Attributes:
    start: the params as they are, a dict.
    loss: (params, batch) -> scalar; the rest of the model stays what it is.
    accuracy: (params with a seed axis, test set) -> accuracy in %, an array over seeds.
  """

  start: Any
  loss: training.Loss
  accuracy: Callable[[Any, digits.Split], jax.Array]


def trained(model: ViT, kind: type[nnx.Param]) -> Trained:
  """The params of one kind: `nnx.LoRAParam` or `nnx.Param`."""
  graph, start, rest = nnx.split(model, kind, ...)

  def loss(params: Any, batch: digits.Split) -> jax.Array:
    return cross_entropy(nnx.merge(graph, params, rest)(batch.images), batch.labels)

  def accuracy(params: Any, test: digits.Split) -> jax.Array:
    found = jnp.argmax(nnx.merge(graph, params, rest)(test.images), -1)
    return 100 * jnp.mean(found == test.labels)

  return Trained(nnx.to_pure_dict(start), loss, jax.jit(jax.vmap(accuracy, (0, None))))


def pretrain(steps: int, bar: Any) -> ViT:
  """The ViT, trained on the old styles."""
  model = ViT(nnx.Rngs(0))
  pool, _, _ = digits.load()
  styled = [digits.in_style(pool, style) for style in digits.OLD]
  data = jax.tree.map(lambda *parts: np.concatenate(parts), *styled)
  order = training.batch_order(1, steps, 128, len(data.labels))
  optimizer = optax.adamw(optax.warmup_cosine_decay_schedule(0, 3e-3, steps // 10, steps))
  task = bar.add_task('pre-train', total=steps)
  part = trained(model, nnx.Param)
  params, _ = training.train(
    part.loss, optimizer, part.start, data, order, lambda n: bar.advance(task, n)
  )
  nnx.update(model, jax.tree.map(lambda x: x[0], params))
  return model


def zero_for_b(adapters: Any) -> Any:
  """The anchor 0 for each B, none for each A."""
  return jax.tree_util.tree_map_with_path(
    lambda path, _: 0 if path[-1].key == 'lora_b' else None, adapters
  )


def lora_methods(lr: float, adapters: Any) -> dict[str, optax.GradientTransformation]:
  """The optimizers of the adapters; each differs from the first in one line."""
  adam = optax.adam(lr)
  methods = {'Adam': adam}
  for name, anchor in {'0': 0, 'A₀, B₀': None, '0 for B': zero_for_b(adapters)}.items():
    default, firm = (
      spd.projection_decay(anchor, **own) for own in (comparison.DEFAULT, comparison.FIRM)
    )
    methods[f'adam_spd, anchor {name}'] = spd.adam_spd(lr, anchor, **comparison.ADAM_SPD)
    methods[f'projection_decay, anchor {name}'] = optax.chain(default, adam)
    methods[f'projection_decay, firm, anchor {name}'] = optax.chain(firm, adam)
  return methods


def all_methods(lr: float) -> dict[str, optax.GradientTransformation]:
  """The optimizers of all weights; all but the first leave the embedding as it is, bit for bit."""

  def frozen(optimizer: optax.GradientTransformation) -> Any:
    return optax.partition(
      {'frozen': optax.set_to_zero(), 'trained': optimizer},
      lambda params: {name: 'frozen' if name == 'embedding' else 'trained' for name in params},
    )

  adam = optax.adam(lr)
  return {
    'Adam': adam,
    'Adam, frozen embedding': frozen(adam),
    'adam_spd, frozen embedding': frozen(spd.adam_spd(lr, **comparison.ADAM_SPD)),
    'projection_decay, frozen embedding': frozen(
      optax.chain(spd.projection_decay(**comparison.DEFAULT), adam)
    ),
  }


def change(params: Any, start: Any) -> Any:
  """What training has added to the weights: A B for an adapter, θ − θ_0 for the others."""
  if not isinstance(params, dict):
    return params - start
  if 'lora_a' in params:
    return params['lora_a'] @ params['lora_b']
  return {name: change(below, start[name]) for name, below in params.items()}


def evaluate(
  part: Trained, size: jax.Array, tests: Sequence[digits.Split], params: Any
) -> comparison.Columns:
  """The columns of the table; the first test is the new style, `size` is that of all weights."""
  new, *old = (np.asarray(part.accuracy(params, test)) for test in tests)
  moved = jax.vmap(lambda p: optax.tree.norm(change(p, part.start)))(params)
  values = {'new style': new, 'old, mean': np.mean(old, 0), 'old, worst': np.min(old, 0)}
  return comparison.columns(values | {'moved': 100 * moved / size})


def anchor_bytes(optimizer: optax.GradientTransformation, params: Any) -> comparison.Columns:
  """Bytes of the anchor in the optimizer's state, per param; empty without SPD."""
  state = jax.eval_shape(optimizer.init, params)
  if optax.tree.get(state, 'constrained') is None:
    return {}
  stored = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(optax.tree.get(state, 'anchor')))
  weights = sum(x.size for x in jax.tree.leaves(params))
  return comparison.columns({'anchor, bytes/param': [stored / weights]})


def compare(args: argparse.Namespace, model: ViT, bar: Any) -> dict[str, comparison.Columns]:
  """Fine-tunes with every method; returns its columns by method."""
  _, pool, test = digits.load()
  data = digits.in_style(pool, args.style)
  tests = [digits.in_style(test, style) for style in (args.style, *digits.OLD)]
  order = training.batch_order(args.seeds, args.steps, args.batch, len(data.labels), args.shots)
  weights = trained(model, nnx.Param)
  adapters = trained(with_adapters(model, args.rank), nnx.LoRAParam)
  # WiSE-FT is then halfway from W to W + A B: B halved, A kept.
  parts = (
    (adapters, lora_methods(args.lr, adapters.start), zero_for_b(adapters.start), None),
    (weights, all_methods(args.lr), weights.start, True),
  )
  results = {}
  for prefix, (part, methods, anchor, captured) in zip(PARTS, parts, strict=True):
    score = functools.partial(evaluate, part, optax.tree.norm(weights.start), tests)
    audit = args.out / 'audit' / prefix.rstrip(': ').replace(' ', '_')
    rows = comparison.run(
      methods,
      part.loss,
      part.start,
      anchor,
      data,
      order,
      score,
      bar,
      audit,
      args.lr,
      captured,
    )
    for name, row in rows.items():
      stored = anchor_bytes(methods[name], part.start) if name in methods else {}
      results[name if name == 'pre-trained' else prefix + name] = row | stored
  return results


def picture(path: Path, results: dict[str, Any], style: str) -> None:
  """Every method as a point, the new style against the old: adapters, and all weights."""
  figure = plt.figure(figsize=(12, 6), layout='constrained')
  panels = figure.subplots(1, 2, sharex=True, sharey=True)
  for axes, part in zip(panels, PARTS, strict=True):
    rows = {k.removeprefix(part): row for k, row in results.items() if k.startswith(part)}
    reporting.scatter(axes, rows, 'new style', 'old, mean')
    axes.axhline(results['pre-trained']['old, mean'][0], color='gray', linestyle=':')
    axes.set(xlabel=f'accuracy on the new style, {style} (%)', ylabel='', title=part.rstrip(': '))
  panels[0].set_ylabel('mean accuracy, old styles (%; dotted: before fine-tuning)')
  figure.savefig(path, dpi=120)
  plt.close(figure)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
  """The command line."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  add: Callable[..., Any] = parser.add_argument
  add('--style', default='striped', choices=digits.NEW, help='new style (default: %(default)s)')
  add('--rank', type=int, default=4, help='of the adapters (default: %(default)s)')
  add('--lr', type=float, default=3e-3, help='learning rate (default: %(default)s)')
  add('--steps', type=int, default=300, help='fine-tuning steps (default: %(default)s)')
  add('--batch', type=int, default=32, help='batch size (default: %(default)s)')
  add('--shots', type=int, default=200, help='images to fine-tune on (default: %(default)s)')
  add('--seeds', type=int, default=4, help='seeds, trained together (default: %(default)s)')
  add('--pretrain-steps', type=int, default=800, help='default: %(default)s')
  add('--out', type=Path, default=Path('runs/finetune_lora'), help='default: %(default)s')
  return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
  """Runs the comparison and writes results.json and results.png."""
  args = parse(arguments)
  with training.progress_bar() as bar:
    results = compare(args, pretrain(args.pretrain_steps, bar), bar)
  reporting.publish(args, f'New style: {args.style}. Accuracy in %, ± standard error', results)
  picture(args.out / 'results.png', results, args.style)
  print(f'Results: {args.out}/results.json, {args.out}/results.png')
  comparison.show_audit(args.out / 'audit' / 'LoRA')
  return results


if __name__ == '__main__':
  main()
