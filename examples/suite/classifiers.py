"""Tasks with classes: handwritten digits in styles, and tables whose covariates shift."""

from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn import datasets

import digits
from suite import models
from suite.tasks import Data, Params, Stage, Task, take, together


def cross_entropy(module: nn.Module) -> Callable[[Params, Data], jax.Array]:
  """Mean cross-entropy of (inputs, labels)."""

  def loss(params: Params, batch: Data) -> jax.Array:
    logits = module.apply({'params': params}, batch[0]).astype(jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()

  return loss


def accuracy(module: nn.Module) -> Callable[[Params, Data], jax.Array]:
  """Accuracy in % on (inputs, labels)."""

  def score(params: Params, data: Data) -> jax.Array:
    logits = module.apply({'params': params}, data[0])
    return 100 * jnp.mean(jnp.argmax(logits, -1) == data[1])

  return score


def outputs(module: nn.Module) -> Callable[[Params, Data], jax.Array]:
  """What the module says about (inputs, labels)."""
  return lambda params, batch: module.apply({'params': params}, batch[0])


def initializer(module: nn.Module, inputs: np.ndarray) -> Callable[[jax.Array], Params]:
  """Random key -> params."""
  return lambda key: module.init(key, inputs[:2])['params']


SOME = slice(250)  # test images of each old style


def digits_in_styles(title: str, module: nn.Module, *styles: str, **options: object) -> Task:
  """The model knows digits in eight styles, and learns others in turn."""
  known, pool, test = digits.load()
  parts = np.array_split(np.arange(len(pool.labels)), len(styles))
  stages = [
    Stage(
      digits.in_style(digits.Split(pool.images[part], pool.labels[part]), style),
      digits.in_style(test, style),
    )
    for style, part in zip(styles, parts, strict=True)
  ]
  earlier = {style: stage.test for style, stage in zip(styles[:-1], stages, strict=False)}
  return Task(
    title=title,
    init=initializer(module, known.images),
    loss=cross_entropy(module),
    score=accuracy(module),
    old=together(*(digits.in_style(known, style) for style in digits.OLD)),
    stages=tuple(stages),
    ood={style: take(digits.in_style(test, style), SOME) for style in digits.OLD} | earlier,
    pretrain_steps=800,
    logits=outputs(module),
    **options,
  )


MLP = models.MLP((128, 64), digits.CLASSES)
MLP_BLOCKS = ('hidden_0', 'hidden_1', 'head')
VIT = models.ViT(32, 2, digits.CLASSES)
VIT_BLOCKS = ('embedding', 'position', 'block_0', 'block_1', 'norm', 'head')


def digits_mlp() -> Task:
  """An MLP learns stripes."""
  return digits_in_styles('digits: eight styles → striped (MLP)', MLP, 'striped', blocks=MLP_BLOCKS)


def digits_cnn() -> Task:
  """A CNN learns inverted digits."""
  title = 'digits: eight styles → inverted (CNN)'
  module = models.CNN((16, 32), digits.CLASSES)
  return digits_in_styles(title, module, 'inverted', blocks=('conv_0', 'conv_1', 'head'))


def digits_vit() -> Task:
  """A ViT learns thick digits."""
  return digits_in_styles('digits: eight styles → thick (ViT)', VIT, 'thick', blocks=VIT_BLOCKS)


def digits_lora() -> Task:
  """Adapters of a ViT learn digits that are turned the other way."""
  title = 'digits: eight styles → counter-rotated (ViT, adapters of rank 4)'
  return digits_in_styles(title, VIT, 'counter-rotated', blocks=VIT_BLOCKS, rank=4)


def digits_in_turn() -> Task:
  """An MLP learns three styles, one after the other."""
  title = 'digits: eight styles → thick → striped → inverted (MLP)'
  styles = ('thick', 'striped', 'inverted')
  return digits_in_styles(title, MLP, *styles, blocks=MLP_BLOCKS, shots=70)


def laboratory(features: np.ndarray, drift: float, seed: int) -> np.ndarray:
  """The same patients, measured elsewhere: a gain and an offset of its own for each feature."""
  rng = np.random.default_rng(seed)
  gain = np.exp(drift * rng.standard_normal(features.shape[1]))
  offset = drift * rng.standard_normal(features.shape[1])
  return (gain * features + offset).astype(np.float32)


def split(rows: int, *sizes: int) -> Sequence[np.ndarray]:
  """Disjoint random rows: so many for each part, and the rest."""
  return np.split(np.random.default_rng(0).permutation(rows), np.cumsum(sizes))


def tumours() -> Task:
  """Breast cancer, measured in five laboratories and then in one that drifted far more."""
  inputs, labels = datasets.load_breast_cancer(return_X_y=True)
  inputs = (inputs - inputs.mean(0)) / inputs.std(0)
  known, pool, test = split(len(labels), 250, 120)

  def at(rows: np.ndarray, drift: float, seed: int) -> Data:
    return laboratory(inputs[rows], drift, seed), labels[rows].astype(np.int32)

  old = {f'laboratory {i + 1}': (0.3, i) for i in range(5)}
  module = models.MLP((64, 32), 2)
  return Task(
    title='tumours: five laboratories → one that drifted (MLP, 30 features)',
    init=initializer(module, inputs),
    loss=cross_entropy(module),
    score=accuracy(module),
    old=together(*(at(known, *where) for where in old.values())),
    stages=(Stage(at(pool, 2.0, 5), at(test, 2.0, 5)),),
    ood={name: at(test, *where) for name, where in old.items()},
    blocks=MLP_BLOCKS,
    pretrain_steps=500,
    pretrain_rate=1e-3,
    shots=60,
    logits=outputs(module),
  )


def diabetes() -> Task:
  """The course of diabetes, learned from patients under 50, then from a few older ones."""
  inputs, targets = datasets.load_diabetes(return_X_y=True, scaled=False)
  age = inputs[:, 0]
  inputs = ((inputs - inputs.mean(0)) / inputs.std(0)).astype(np.float32)
  targets = ((targets - targets.mean()) / targets.std()).astype(np.float32)
  module = models.MLP((64, 32), 1)

  def loss(params: Params, batch: Data) -> jax.Array:
    return jnp.mean((module.apply({'params': params}, batch[0])[:, 0] - batch[1]) ** 2)

  def score(params: Params, data: Data) -> jax.Array:
    explained = 1 - loss(params, data) / jnp.var(data[1])
    return 100 * jnp.maximum(explained, 0)  # R² in %, 0 where the mean does better

  def rows(chosen: np.ndarray) -> Data:
    return inputs[chosen], targets[chosen]

  young, old = np.flatnonzero(age < 50), np.flatnonzero(age >= 50)
  known, young_test = split(len(young), len(young) // 2)
  pool, test = split(len(old), len(old) // 2)
  groups = {'under 35': (0, 35), '35 to 42': (35, 42), '42 to 49': (42, 50)}
  test_age = age[young[young_test]]
  return Task(
    title='diabetes: patients under 50 → older ones (MLP, regression, R²)',
    init=initializer(module, inputs),
    loss=loss,
    score=score,
    old=rows(young[known]),
    stages=(Stage(rows(old[pool]), rows(old[test])),),
    ood={
      name: rows(young[young_test][(low <= test_age) & (test_age < high)])
      for name, (low, high) in groups.items()
    },
    blocks=MLP_BLOCKS,
    pretrain_steps=150,
    pretrain_rate=1e-3,
    shots=60,
    logits=outputs(module),
    drift=lambda values, base, batch: jnp.mean((values - base) ** 2),
  )
