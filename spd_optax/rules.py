"""Rules: when a layer is held, and how far it is taken back toward its anchor.

A rule is one value. It says which sums over a layer it needs, which numbers of its own it keeps
for each layer, and decides from both. The engine does everything else.
"""

import dataclasses
import inspect
import math
from collections.abc import Mapping, Sequence
from typing import ClassVar, NamedTuple, dataclass_transform

import chex
import jax
import jax.numpy as jnp
import numpy as np

from spd_optax import checks, formulas

Numbers = Mapping[str, jax.Array]


class Decision(NamedTuple):
  """What a rule decides for one layer at one step; each array has shape [] or [L].

  Attributes:
    condition: bool, whether the layer is held.
    ratio: float, for the reports: how much the layer is moved, 0 if not at all.
    scale: float, how far a held layer is moved back. In a chain the gradient becomes g + scale · d.
      Around an optimizer θ̃ becomes θ̃ − scale · (θ̃ − θ_0).
    numbers: the rule's own numbers after this step, with the names in `Rule.numbers`.
  """

  condition: jax.Array
  ratio: jax.Array
  scale: jax.Array
  numbers: Numbers = {}  # noqa: RUF012  # never written to


@dataclass_transform(frozen_default=True)
class Rule:
  """A rule; subclass it to write your own.

  A subclass becomes a frozen dataclass and a pytree. Its annotated fields are hyperparameters.
  They are traced, so `if self.z > 0` does not work. Declare a string or a flag by
  ``dataclasses.field(metadata={'static': True})``. `decide` must be a pure function of its
  arguments and of the fields, because JAX traces it once for each class.

  The library holds no layer whose ⟨g, d⟩ is not finite. If the strength is negative or not finite,
  it holds none at all.

  Attributes:
    needs: what `decide` needs to know of a layer besides 'inner' and 'distance': any of
      'gradient_norm', 'after' and 'step'. 'after' and 'step' are known only around an optimizer.
    numbers: the names of the rule's own numbers for each layer, and their values before the first
      update. They are float32, and reports show them by name. If a new value is not finite, as
      after a NaN gradient, the old value stays.

  Example:
    Pull a layer toward its anchor while the running mean of ⟨g, d⟩ is positive:

    >>> import optax
    >>> import spd_optax as spd
    >>> class PulledOnAverage(spd.Rule):
    ...   decay: float = 0.9
    ...   numbers = {'mean': 0.0}
    ...
    ...   def decide(self, norms, numbers, strength):
    ...     mean = self.decay * numbers['mean'] + (1 - self.decay) * norms['inner']
    ...     return spd.Decision(mean > 0, mean, strength, {'mean': mean})
    >>> optimizer = optax.chain(spd.projection_decay(rule=PulledOnAverage()), optax.adam(1e-3))
  """

  needs: ClassVar[Sequence[str]] = ()
  numbers: ClassVar[Mapping[str, float]] = {}

  def __init_subclass__(cls) -> None:
    own = inspect.get_annotations(cls)
    above = [name for base in cls.__mro__[1:] for name in inspect.get_annotations(base)]
    hidden = sorted({name for name in above if name in vars(cls)} - {*own, 'needs', 'numbers'})
    if hidden:
      raise TypeError(f'{cls.__name__}: annotate {hidden}, as in margin: float = 0.1')
    if fields := sorted({'needs', 'numbers'} & {*own}):
      raise TypeError(f'{cls.__name__}: {fields} are no hyperparameters; leave out the annotation')
    jax.tree_util.register_dataclass(dataclasses.dataclass(frozen=True)(cls))

  def decide(self, norms: Numbers, numbers: Numbers, strength: chex.Numeric) -> Decision:
    """Decides for one layer, or for the slices of a stacked one.

    Args:
      norms: 'inner' is ⟨g, d⟩, 'distance' ‖d‖, 'gradient_norm' ‖g‖, 'after' ‖θ̃ − θ_0‖ and 'step'
        ‖θ̃ − θ‖, in float32 or wider, each of shape [] or [L].
      numbers: the rule's own numbers before this step.
      strength: λ ≥ 0.
    """
    raise NotImplementedError(f'{type(self).__name__} must define decide')

  def check(self) -> None:
    """Raises an error if a hyperparameter is out of range; runs when a transformation is made."""


def _check_near(near: chex.Numeric) -> None:
  checks.scalar('near', near, 'a finite number ≥ 0', lambda v: 0 <= v < math.inf)


class Projection(Rule):
  """The paper's rule: a turned layer does not move farther away (eq. 3, 4 and 9).

      r = max(0, ‖θ̃ − θ_0‖ − ‖θ − θ_0‖) / ‖θ̃ − θ_0‖
      θ ← θ̃ − λ r (θ̃ − θ_0)     where −⟨g, d⟩ < m ‖g‖ ‖d‖ and ‖d‖ ≥ k ‖θ̃ − θ‖

  The second condition is not from the paper. With k = 0 it is always true. Near the anchor ⟨g, d⟩
  mostly shows how far the last steps overshot, and a layer that is held there may never leave. So a
  layer is free until its distance is k times the length of its current step. That is about k steps
  straight out, or k² of a random walk. If the anchor follows closely (`anchor_ema`), no layer ever
  gets that far.

  Attributes:
    margin: m in [0, 1); 0 is the paper's condition.
    near: k ≥ 0; 0 is the paper's rule. Around Adam we tried 20.

  Example:
    >>> import spd_optax as spd
    >>> optimizer = spd.adam_spd(1e-3, rule=spd.Projection(near=20.0))
  """

  margin: chex.Numeric = 0.0
  near: chex.Numeric = 0.0

  @property
  def needs(self) -> Sequence[str]:  # type: ignore[override]  # depends on the numbers
    margin = () if checks.is_zero(self.margin) else ('gradient_norm',)
    return ('after', *margin, *(() if checks.is_zero(self.near) else ('step',)))

  def check(self) -> None:
    checks.fraction('margin', self.margin)
    _check_near(self.near)

  def decide(self, norms: Numbers, numbers: Numbers, strength: chex.Numeric) -> Decision:
    inner, distance = norms['inner'], norms['distance']
    if 'gradient_norm' in norms:
      size = norms['gradient_norm']
      condition = formulas.not_clearly_outward(inner, size, distance, self.margin)
    else:
      condition = formulas.turned_back(inner)
    if 'step' in norms:
      condition &= (self.near >= 0) & (distance >= self.near * norms['step'])
    ratio = formulas.projection_ratio(distance, norms['after'])
    return Decision(condition, ratio, strength * ratio)


class SignificantProjection(Rule):
  """Projects a layer back, unless moving outward has lately lowered the loss on average.

  The slope p says how fast the loss grows as the layer moves away from its anchor. Its running
  mean μ is compared with the standard error that a mean of 0 would have:

      p = ⟨g, d⟩ / ‖d‖          μ ← β μ + (1 − β) p          s ← β s + (1 − β) p²
      θ ← θ̃ − λ r (θ̃ − θ_0)     where μ > −z √(s (1 − β) / (1 + β)), d ≠ 0 and ‖d‖ ≥ k ‖θ̃ − θ‖

  with r and k as in `Projection`. The noise of p does not grow with the layer, so z means the same
  in a bias and in a large matrix. A margin is a cosine, and the noise of a cosine falls as the
  layer grows. The rule is from this library, not from the paper. In the state and in reports μ is
  'slope' and s is 'slope_square'. Both are 0 at first. At the anchor p is 0. A gradient of 0 does
  not free a layer at once, because the mean continues. In the first 1 / (1 − β) steps the standard
  error is too small, by a factor of up to √2.

  Attributes:
    z: number of standard errors. 0 tests the sign of the mean alone. A larger z holds more. From
      √((1 + β) / (1 − β)) on, 6.2 for the default β, each layer that is far enough is held.
    decay: β in [0, 1). The mean is over about 1 / (1 − β) steps. 0 uses the last gradient alone.
    near: k ≥ 0, as in `Projection`.

  Example:
    >>> import spd_optax as spd
    >>> optimizer = spd.adam_spd(1e-3, rule=spd.SignificantProjection())
  """

  z: chex.Numeric = 0.0
  decay: chex.Numeric = 0.95
  near: chex.Numeric = 20.0
  needs = ('after', 'step')
  numbers = {'slope': 0.0, 'slope_square': 0.0}  # noqa: RUF012  # not written

  def check(self) -> None:
    checks.scalar('z', self.z, 'a finite number', math.isfinite)
    checks.fraction('decay', self.decay)
    _check_near(self.near)

  def decide(self, norms: Numbers, numbers: Numbers, strength: chex.Numeric) -> Decision:
    distance = norms['distance']
    slope = formulas.divide(norms['inner'], distance)
    slope = jnp.where(jnp.isfinite(slope**2), slope, jnp.nan)  # so that neither mean changes
    terms = {'slope': slope, 'slope_square': slope**2}
    new = {name: self.decay * numbers[name] + (1 - self.decay) * x for name, x in terms.items()}
    error = jnp.sqrt(new['slope_square'] * (1 - self.decay) / (1 + self.decay))
    far = (distance > 0) & (distance >= self.near * norms['step'])
    far &= (self.decay >= 0) & (self.decay < 1) & (self.near >= 0) & jnp.isfinite(self.z)
    ratio = formulas.projection_ratio(distance, norms['after'])
    return Decision(far & (new['slope'] > -self.z * error), ratio, strength * ratio, new)


class GradientTurn(Rule):
  """The rule of `projection_decay`: turns a turned gradient farther toward the anchor.

      g' = g + λ (cos + m) ‖g‖ d / ‖d‖     where cos = ⟨g, d⟩ / (‖g‖ ‖d‖) > −m

  Attributes:
    margin: m in [0, 1).
  """

  margin: chex.Numeric = 0.0
  needs = ('gradient_norm',)

  def check(self) -> None:
    checks.fraction('margin', self.margin)

  def decide(self, norms: Numbers, numbers: Numbers, strength: chex.Numeric) -> Decision:
    inner, size, distance = norms['inner'], norms['gradient_norm'], norms['distance']
    condition = formulas.not_clearly_outward(inner, size, distance, self.margin)
    pull = formulas.pull(formulas.cosine(inner, size, distance), self.margin)
    ratio = jnp.where(condition, pull, 0)
    return Decision(condition, ratio, strength * ratio * formulas.divide(size, distance))


class L2SP(Rule):
  """L2-SP: every layer is always pulled, g' = g + λ d."""

  def decide(self, norms: Numbers, numbers: Numbers, strength: chex.Numeric) -> Decision:
    ones = jnp.ones_like(norms['distance'])
    return Decision(ones > 0, ones, strength * ones)


NEEDS = ('gradient_norm', 'after', 'step')


def chosen(
  rule: Rule | None, default: type[Projection | GradientTurn], margin: chex.Numeric
) -> Rule:
  """The rule that was passed, or the default with its margin; checks its hyperparameters."""
  traced = isinstance(margin, jax.core.Tracer)
  if rule is not None and not traced and np.any(jax.device_get(margin) != default.margin):
    raise TypeError(f'margin={margin!r} belongs to the default rule; give it to the one of rule=')
  found = default(margin) if rule is None else rule
  if not isinstance(found, Rule):
    raise TypeError(f'rule: expected an instance of spd.Rule, found {checks.kind_of(found)}')
  needs, name = found.needs, type(found).__name__
  if isinstance(needs, str) or not set(needs) <= set(NEEDS):
    raise TypeError(f'{name}.needs: expected a tuple of names among {NEEDS}, found {needs!r}')
  found.check()
  return found
