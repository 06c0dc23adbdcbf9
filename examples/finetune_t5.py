"""Fine-tune a Flax nnx T5 to fill in Python keywords without forgetting English.

    python examples/finetune_t5.py                          # makes its own checkpoint
    python examples/finetune_t5.py --checkpoint DIR_OR_HUB_ID

A checkpoint is a directory with config.json and model.safetensors, as PyTorch's T5 in
transformers is saved. Without one a small byte-level T5 is first trained on English
prose by span corruption and saved so. From there every method fine-tunes on
the same snippets of Python, in the same order, for several seeds. A T5 from
elsewhere needs an embedding for every token of its tokenizer; it was not
pre-trained on this prose, so that "old" then only says how it does on English.
"""

import argparse
import dataclasses
import functools
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from matplotlib import pyplot as plt
from rich.console import Console
from rich.table import Table

import checkpoints
import comparison
import prose
import reporting
import t5
import training
from checkpoints import Model

SHOWN = ('pre-trained', 'Adam', 'projection_decay, λ = 10, m = 0.1')  # what generates


def small_t5(tokenizer: Any, blocks: int = 2) -> Model:
  """A byte-level T5: 2 + 2 blocks, width 64."""
  config = {'model_type': 't5', 'vocab_size': tokenizer.get_vocab_size(), 'd_model': 64}
  config |= {'d_kv': 16, 'd_ff': 192, 'num_layers': blocks, 'num_heads': 4}
  return checkpoints.split(t5.T5(config, nnx.Rngs(0)), config)


def logits_of(model: Model, params: Any, batch: prose.Examples) -> jax.Array:
  """float32[n, target, vocabulary]."""
  logits = model(batch.inputs, batch.attention, batch.decoder_inputs, params=params)
  return logits.astype(jnp.float32)


def losses_of(logits: jax.Array, batch: prose.Examples) -> jax.Array:
  """Cross-entropy of each token of the targets, 0 on padding: float32[n, target]."""
  losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels)
  return losses * batch.weights


def loss_of(model: Model) -> training.Loss:
  """Mean cross-entropy per token."""

  def loss(params: Any, batch: prose.Examples) -> jax.Array:
    losses = losses_of(logits_of(model, params, batch), batch)
    return jnp.sum(losses) / jnp.sum(batch.weights)

  return loss


def pretrain(directory: Path, steps: int) -> None:
  """Trains the small T5 on prose and saves it as a checkpoint; bytes need no tokenizer's file."""
  tokenizer = t5.Bytes()
  model = small_t5(tokenizer)
  data, _ = prose.old(tokenizer)
  order = training.batch_order(1, steps, 32, len(data.inputs))
  # Adafactor scales a step by its weights, as T5's large embedding needs.
  optimizer = optax.adafactor(optax.warmup_cosine_decay_schedule(0, 5e-2, steps // 10, steps))
  with training.progress_bar() as bar:
    task = bar.add_task('pre-train', total=steps)
    params, _ = training.train(
      loss_of(model), optimizer, model.params, data, order, lambda n: bar.advance(task, n)
    )
  params = jax.tree.map(lambda x: x[0], params)
  checkpoints.write(directory, dataclasses.replace(model, params=params))


def scores(model: Model, params: Any, test: prose.Examples) -> tuple[np.ndarray, np.ndarray]:
  """Nats per target and exact matches in %: an array over seeds each.

  The most likely token after each right beginning is the right one, for a whole target,
  exactly where greedy generation writes that target.
  """
  losses, matches = _scores(model, params, test)
  return np.asarray(losses), np.asarray(matches)


@functools.partial(jax.jit, static_argnums=0)
def _scores(model: Model, params: Any, test: prose.Examples) -> tuple[jax.Array, jax.Array]:
  def score(params: Any) -> tuple[jax.Array, jax.Array]:
    logits = logits_of(model, params, test)
    exact = jnp.all((jnp.argmax(logits, -1) == test.labels) | (test.weights == 0), -1)
    return jnp.mean(jnp.sum(losses_of(logits, test), -1)), 100 * jnp.mean(exact)

  return jax.lax.map(score, params)  # one seed at a time: large models fit


def evaluate(
  model: Model, params: Any, tests: Mapping[str, prose.Examples]
) -> dict[str, list[float]]:
  """The columns of the table, each a list over seeds."""
  new_loss, new_exact = scores(model, params, tests['new'])
  old_loss, _ = scores(model, params, tests['old'])
  return comparison.columns(
    {
      'exact, code': new_exact,
      'loss, code': new_loss,
      'loss, prose': old_loss,
      'moved': comparison.distance(params, model.params),
    }
  )


def written(
  model: Model, rows: Mapping[str, Any], examples: prose.Examples
) -> dict[str, np.ndarray]:
  """What the model writes, greedily, with the params of each row: tokens int[n, target]."""

  @jax.jit
  def write(params: Any) -> jax.Array:
    module = nnx.merge(model.graph, params)
    encoded = module.encode(examples.inputs, examples.attention)
    # Behind the token that starts it; what it has not written yet, it does not see.
    tokens = jnp.zeros((len(encoded), prose.TARGET + 1), int) + examples.decoder_inputs[:, :1]
    for i in range(prose.TARGET):
      logits = module.decode(encoded, examples.attention, tokens[:, :-1])
      tokens = tokens.at[:, i + 1].set(jnp.argmax(logits[:, i], -1))
    return tokens[:, 1:]

  return {name: np.asarray(write(params)) for name, params in rows.items()}


def text_of(tokenizer: Any, tokens: np.ndarray) -> str:
  """Text on one line, with ⟨i⟩ for sentinel i and ⏎ for a new line; up to its end."""
  end = np.flatnonzero(tokens == tokenizer.token_to_id('</s>'))
  tokens = tokens[: end[0]] if len(end) else tokens
  text = tokenizer.decode(tokens.tolist(), skip_special_tokens=False)
  text = re.sub(r'<extra_id_(\d+)>', r'⟨\1⟩', text).replace('\n', '⏎')
  return re.sub(' +', ' ', text)


def show_generated(
  model: Model,
  tokenizer: Any,
  rows: Mapping[str, Any],
  tests: Sequence[prose.Examples],
  count: int = 3,
) -> None:
  """Prints what the model writes for the first examples of each test set."""
  first = [jax.tree.map(lambda x: x[:count], test) for test in tests]
  examples = jax.tree.map(lambda *parts: np.concatenate(parts), *first)
  texts = [examples.inputs, examples.labels, *written(model, rows, examples).values()]
  table = Table(title='Generated, first seed', title_justify='left', show_lines=True)
  for name in ('masked', 'target', *rows):
    table.add_column(name)
  for line in zip(*texts, strict=True):
    table.add_row(*(text_of(tokenizer, tokens) for tokens in line))
  Console(markup=False, highlight=False).print(table)


def compare(args: argparse.Namespace, checkpoint: str) -> dict[str, Any]:
  """Fine-tunes with every method; returns its columns by method."""
  model, tokenizer = t5.load(checkpoint)
  anchor = model.params  # every weight is pre-trained
  optimizers = comparison.methods(args.lr, anchor)
  data, new = prose.new(tokenizer)
  _, old = prose.old(tokenizer, copies=1)
  order = training.batch_order(args.seeds, args.steps, args.batch, len(data.inputs), args.shots)
  rows = []

  def evaluate_and_keep(params: Any) -> dict[str, list[float]]:
    rows.append(jax.tree.map(lambda x: x[0], params))
    return evaluate(model, params, {'new': new, 'old': old})

  with training.progress_bar() as bar:
    results = comparison.run(
      optimizers,
      loss_of(model),
      model.params,
      anchor,
      data,
      order,
      evaluate_and_keep,
      bar,
      args.out / 'audit',
      args.lr,
    )
  kept = dict(zip(results, rows, strict=True))  # a row is evaluated once, in this order
  show_generated(model, tokenizer, {name: kept[name] for name in SHOWN}, [new, old])
  return results


def picture(path: Path, results: Mapping[str, Any]) -> None:
  """Every method as a point: loss on code against loss on prose."""
  figure, axes = plt.subplots(figsize=(8, 5), layout='constrained')
  trained = {name: row for name, row in results.items() if name != 'pre-trained'}
  reporting.scatter(axes, trained, 'loss, code', 'loss, prose')
  axes.axhline(results['pre-trained']['loss, prose'][0], color='gray', linestyle=':')
  axes.set(
    xlabel='loss on code, the new domain (nats per target; lower is better)',
    ylabel='loss on prose, the old domain (lower is better)',
  )
  axes.set_title('Fine-tuning on code (dotted: prose before it)', fontsize=10)
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
    help='directory or hub id of a T5; default: train a small one first. Its embedding needs a '
    'row for every token of its tokenizer, tokenizer.json; without that file its tokens are bytes',
  )
  add('--lr', type=float, default=3e-3, help='learning rate (default: %(default)s)')
  add('--steps', type=int, default=400, help='fine-tuning steps (default: %(default)s)')
  add('--batch', type=int, default=16, help='batch size (default: %(default)s)')
  add('--shots', type=int, default=2000, help='snippets to fine-tune on (default: %(default)s)')
  add('--seeds', type=int, default=3, help='seeds, trained together (default: %(default)s)')
  add('--pretrain-steps', type=int, default=4000, help='default: %(default)s')
  add('--out', type=Path, default=Path('runs/finetune_t5'), help='default: %(default)s')
  return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
  """Runs the comparison and writes results.json and results.png."""
  args = parse(arguments)
  checkpoint = args.checkpoint
  if checkpoint is None:
    checkpoint = str(args.out / 'foundation')
    pretrain(Path(checkpoint), args.pretrain_steps)
  results = compare(args, checkpoint)
  reporting.publish(args, 'Loss in nats per target, the rest in %; ± standard error', results)
  picture(args.out / 'results.png', results)
  print(f'Checkpoint: {checkpoint}\nResults: {args.out}/results.json, {args.out}/results.png')
  comparison.show_audit(args.out / 'audit')
  return results


if __name__ == '__main__':
  main()
