"""The methods that are compared, and the settings that each is swept over."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import spd_optax as spd

Setting = Mapping[str, float]
Scalar = float | jax.Array
RATES = (3e-4, 1e-3, 3e-3, 1e-2)  # Adam's learning rates


class Method(NamedTuple):
  """A way to fine-tune.

  Attributes:
    optimizer: (learning_rate, blocks, **setting) -> optimizer; `blocks` as in `Task`.
    settings: hyperparameters to sweep. A `rank` is that of low-rank adapters, which alone
      are trained; `kl` weighs the divergence from the base model's answers, added to the loss.
    rate: its learning rates are so many times Adam's.
    ends: methods that go on from its trained weights: `WISE_FT` and `EARLY`.
    alphas: of WiSE-FT.
    apart: whether some of the examples are kept apart, for a second gradient; see `learned`.
  """

  optimizer: Callable[..., optax.GradientTransformation]
  settings: tuple[Setting, ...] = ({},)
  rate: float = 1.0
  ends: tuple[str, ...] = ()
  alphas: tuple[Setting, ...] = ({'alpha': 0.5}, {'alpha': 0.25}, {'alpha': 0.75}, {'alpha': 0.9})
  apart: bool = False


def adam(learning_rate: Scalar, blocks: Any = None) -> optax.GradientTransformation:
  """Adam."""
  return optax.adam(learning_rate)


def adamw(learning_rate: Scalar, blocks: Any, decay: Scalar) -> optax.GradientTransformation:
  """Adam with decoupled weight decay, toward 0."""
  return optax.adamw(learning_rate, weight_decay=decay)


def cautious(learning_rate: Scalar, blocks: Any, decay: Scalar) -> optax.GradientTransformation:
  """Cautious Weight Decay: decay but where the step leads away from 0 (arXiv 2510.12402)."""

  # Each weight has a condition of its own, so this is no `spd.Rule`, whose layers have one.
  def decayed(updates: Any, params: Any) -> Any:
    return jax.tree.map(lambda u, p: u + decay * p * (u * p >= 0), updates, params)

  return optax.chain(
    optax.scale_by_adam(), optax.stateless(decayed), optax.scale_by_learning_rate(learning_rate)
  )


def l2_sp(learning_rate: Scalar, blocks: Any, strength: Scalar) -> optax.GradientTransformation:
  """L2-SP as a penalty: its gradient passes through Adam."""
  return optax.chain(spd.l2_sp(strength=strength), optax.adam(learning_rate))


def decoupled_l2_sp(
  learning_rate: Scalar, blocks: Any, strength: Scalar
) -> optax.GradientTransformation:
  """L2-SP beside Adam, as AdamW decays (Kauldron's `decay_to_init`)."""
  return optax.chain(
    optax.scale_by_adam(),
    spd.l2_sp(strength=strength),
    optax.scale_by_learning_rate(learning_rate),
  )


class Thaw(NamedTuple):
  """State of `thaw`: updates so far, int32[]."""

  count: jax.Array


def thaw(blocks: tuple[str, ...], frozen: Scalar, steps: Scalar) -> optax.GradientTransformation:
  """Behind an optimizer: holds the first share `frozen` of the blocks still for so many steps.

  The last block, the head, is always free.
  """
  held = jnp.minimum(frozen * len(blocks), len(blocks) - 1)

  def depth(path: Any) -> int:
    names = [str(getattr(key, 'key', key)) for key in path]
    whole = '/'.join(names).split('/')
    return next(i for i, block in enumerate(blocks) if block in whole)

  def update(updates: Any, state: Thaw, params: Any = None) -> tuple[Any, Thaw]:
    def thawed(path: Any, u: jax.Array) -> jax.Array:
      is_free = (state.count >= steps) | (depth(path) >= held)
      return jnp.where(is_free, u, 0)

    return jax.tree.map_with_path(thawed, updates), Thaw(optax.safe_increment(state.count))

  return optax.GradientTransformation(lambda params: Thaw(jnp.zeros([], jnp.int32)), update)


def freezing(
  learning_rate: Scalar, blocks: Any, frozen: Scalar, steps: Scalar
) -> optax.GradientTransformation:
  """Adam on the last blocks, at first or for good."""
  return optax.chain(optax.adam(learning_rate), thaw(blocks, frozen, steps))


class DiGraP(spd.Rule):
  """Takes a share of the gradient that leads away from the start out of each layer's.

      g' = g − λ min(0, ⟨g, d⟩) / ‖d‖² d

  The share λ is fixed, and swept; the paper learns one for each layer as it trains.

  Huang, Tian, et al., Directional Gradient Projection for Robust Fine-Tuning of Foundation
  Models, 2025, https://arxiv.org/abs/2502.15895.
  """

  def decide(self, norms: Any, numbers: Any, strength: Any) -> spd.Decision:
    outward = -jnp.minimum(norms['inner'], 0)
    ratio = strength * outward / jnp.maximum(norms['distance'] ** 2, 1e-30)
    return spd.Decision(outward > 0, ratio, ratio)


def digrap(learning_rate: Scalar, blocks: Any, strength: Scalar) -> optax.GradientTransformation:
  """DiGraP in front of Adam."""
  link = spd.projection_decay(strength=strength, rule=DiGraP())
  return optax.chain(link, optax.adam(learning_rate))


def sgd(learning_rate: Scalar, blocks: Any = None) -> optax.GradientTransformation:
  """SGD with momentum."""
  return optax.sgd(learning_rate, momentum=0.9)


def lion(learning_rate: Scalar, blocks: Any = None) -> optax.GradientTransformation:
  """Lion."""
  return optax.lion(learning_rate, weight_decay=0.0)


def around(inner: Callable[..., optax.GradientTransformation]) -> Callable[..., Any]:
  """`with_projection_decay` around an optimizer."""

  def optimizer(
    learning_rate: Scalar, blocks: Any, strength: Scalar, margin: Scalar
  ) -> optax.GradientTransformation:
    return spd.with_projection_decay(inner(learning_rate), strength=strength, margin=margin)

  return optimizer


def chained(
  learning_rate: Scalar, blocks: Any, strength: Scalar, margin: Scalar
) -> optax.GradientTransformation:
  """`projection_decay` in front of Adam."""
  return optax.chain(
    spd.projection_decay(strength=strength, margin=margin), optax.adam(learning_rate)
  )


def waiting(learning_rate: Scalar, blocks: Any, near: Scalar) -> optax.GradientTransformation:
  """`adam_spd` that leaves a layer free until it is some steps away."""
  return spd.adam_spd(learning_rate, rule=spd.Projection(near=near))


def significant(learning_rate: Scalar, blocks: Any, z: Scalar) -> optax.GradientTransformation:
  """`adam_spd` that holds what does not significantly walk outward."""
  return spd.adam_spd(learning_rate, rule=spd.SignificantProjection(z))


def sweep(**values: tuple[float, ...]) -> tuple[Setting, ...]:
  """One hyperparameter at several values."""
  ((name, each),) = values.items()
  return tuple({name: value} for value in each)


def dial(*settings: tuple[float, float]) -> tuple[Setting, ...]:
  """Strengths and margins."""
  return tuple({'strength': strength, 'margin': margin} for strength, margin in settings)


WISE_FT = 'WiSE-FT'  # the weights between the pre-trained ones and a method's
EARLY = 'Early stopping'  # Adam's weights when they did best on the validation data
RANK, KL = 'rank', 'kl'  # settings of what is trained, not of its optimizer
HEAD = 1.0  # all blocks but the last are frozen
FOREVER = 1e9
# How the names of SPD's methods begin.
SPD = ('projection_decay', 'with_projection_decay', 'adam_spd', 'SignificantProjection')

METHODS: dict[str, Method] = {
  'Adam': Method(adam, ends=(WISE_FT, EARLY)),
  'AdamW': Method(adamw, sweep(decay=(0.01, 0.1))),
  'Cautious WD': Method(cautious, sweep(decay=(0.01, 0.1))),
  'L2-SP': Method(l2_sp, sweep(strength=(0.01, 0.001, 0.1))),
  'L2-SP, decoupled': Method(decoupled_l2_sp, sweep(strength=(1.0, 0.1, 10.0))),
  'Freezing': Method(freezing, tuple({'frozen': share, 'steps': FOREVER} for share in (0.5, HEAD))),
  'LP-FT': Method(freezing, tuple({'frozen': HEAD, 'steps': steps} for steps in (50, 100))),
  'LoRA': Method(adam, sweep(rank=(8, 2))),
  'DiGraP': Method(digrap, sweep(strength=(1.0, 0.3, 0.1))),
  'SGD': Method(sgd, rate=5),
  'Lion': Method(lion, rate=0.2),
  'adam_spd': Method(around(adam), dial((1, 0), (2, 0), (1, 0.05))),
  'adam_spd, near': Method(waiting, sweep(near=(20.0,))),
  'SignificantProjection': Method(significant, sweep(z=(0.0, 1.0))),
  'with_projection_decay, SGD': Method(around(sgd), dial((1, 0), (1, 0.05)), rate=5),
  'with_projection_decay, Lion': Method(around(lion), dial((1, 0), (1, 0.05)), rate=0.2),
  'projection_decay': Method(
    chained, dial((0.3, 0), (1, 0), (3, 0), (1, 0.05), (3, 0.05), (10, 0.1))
  ),
}
