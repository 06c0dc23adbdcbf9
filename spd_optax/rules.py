"""Rules: when a layer is held, and how far it is taken back toward its anchor.

A rule is one value. It says which sums over a layer it needs, which numbers of its own it keeps
for each layer, and decides from both. The engine does everything else.
"""

import dataclasses
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, dataclass_transform

import chex
import jax
import jax.numpy as jnp

from spd_optax import checks, formulas

Numbers = Mapping[str, jax.Array]


class Decision(NamedTuple):
  """What a rule decides for one layer at one step; each array has shape [] or [L].

  Attributes:
    condition: bool, whether the layer is held.
    ratio: what the rule reports of its size; 0 where a held layer is not moved.
    scale: how far the layer is taken back where it is held. In a chain the gradient
      becomes g + scale · d, around an optimizer θ̃ becomes θ̃ − scale · (θ̃ − θ_0).
    numbers: the rule's own numbers after this step, with the names in `Rule.init`.
  """

  condition: jax.Array
  ratio: jax.Array
  scale: jax.Array
  numbers: Numbers = {}  # noqa: RUF012  # never written to


@dataclass_transform(frozen_default=True)
class Rule:
  """A rule; subclass it to write your own.

  A subclass becomes a frozen dataclass and a pytree. Its annotated fields are
  hyperparameters, which may be traced. `decide` is a pure function of values per layer.

  Attributes:
    sums: the sums over a layer that `decide` needs besides 'inner' and 'distance': of
      'gradient_norm' and 'after'. Only a rule around an optimizer may ask for 'after'.
    init: the numbers of its own that the rule keeps for each layer, by name, and their
      values before the first update. They are float32, and reports show them by name. Where a
      new value is not finite, as after a NaN gradient, the old one stays.

  Example:
    Hold a layer while the running mean of ⟨g, d⟩ / ‖d‖ is not below −z standard errors:

    >>> import jax.numpy as jnp, optax
    >>> import spd_optax as spd
    >>> class NotSignificantlyOutward(spd.Rule):
    ...   z: float = 2.0
    ...   sums = ('after',)
    ...   init = {'mean': 0.0, 'square': 0.0}
    ...
    ...   def decide(self, norms, numbers, strength):
    ...     outward = norms['inner'] / jnp.maximum(norms['distance'], 1e-30)
    ...     mean = 0.95 * numbers['mean'] + 0.05 * outward
    ...     square = 0.95 * numbers['square'] + 0.05 * outward**2
    ...     error = jnp.sqrt(square * 0.05 / 1.95)
    ...     growth = jnp.maximum(norms['after'] - norms['distance'], 0)
    ...     ratio = growth / jnp.maximum(norms['after'], 1e-30)
    ...     held = (mean > -self.z * error) & jnp.isfinite(outward)
    ...     return spd.Decision(held, ratio, strength * ratio, {'mean': mean, 'square': square})
    >>> optimizer = spd.with_projection_decay(optax.adam(1e-3), rule=NotSignificantlyOutward(z=1.0))
    >>> state = optimizer.init({'kernel': jnp.ones((2, 3))})
    >>> optax.tree.get(state, 'square')
    {'kernel': Array(0., dtype=float32)}
  """

  sums: ClassVar[Sequence[str]] = ()
  init: ClassVar[Mapping[str, float]] = {}

  def __init_subclass__(cls) -> None:
    made: Any = dataclasses.dataclass(frozen=True)(cls)
    names = [field.name for field in dataclasses.fields(made)]

    def build(nothing: None, values: Iterable[Any]) -> Rule:
      rule = object.__new__(cls)
      rule.__dict__.update(zip(names, values, strict=True))
      return rule

    # The treedefs of two classes are equal if jax.tree_util.register_dataclass registered them;
    # jit may then take one for the other.
    jax.tree_util.register_pytree_node(
      cls, lambda rule: ([getattr(rule, name) for name in names], None), build
    )

  def decide(
    self, norms: Mapping[str, jax.Array], numbers: Numbers, strength: chex.Numeric
  ) -> Decision:
    """Decides for one layer, or for the slices of a stacked one.

    Args:
      norms: 'inner' is ⟨g, d⟩, 'distance' ‖d‖, 'gradient_norm' ‖g‖ and 'after' ‖θ̃ − θ_0‖, in
        float32 or wider.
      numbers: the rule's own numbers before this step.
      strength: λ ≥ 0.
    """
    raise NotImplementedError(f'{type(self).__name__} must define decide')


def _condition(norms: Mapping[str, jax.Array], margin: chex.Numeric) -> jax.Array:
  """c < m ‖g‖ ‖d‖, or where ‖g‖ is not known, c < 0."""
  if 'gradient_norm' not in norms:
    return formulas.turned_back(norms['inner'])
  return formulas.not_clearly_outward(
    norms['inner'], norms['gradient_norm'], norms['distance'], margin
  )


def is_zero(number: chex.Numeric) -> bool:
  """Whether a number is known to be 0 at trace time; schedules and traced values are not."""
  return isinstance(number, int | float) and number == 0


class Projection(Rule):
  """The paper's rule: a turned layer does not move farther away (eq. 3, 4 and 9).

      r = max(0, ‖θ̃ − θ_0‖ − ‖θ − θ_0‖) / ‖θ̃ − θ_0‖
      θ ← θ̃ − λ r (θ̃ − θ_0)     where −⟨g, d⟩ < m ‖g‖ ‖d‖

  Attributes:
    margin: m in [0, 1); 0 is the paper's condition.
  """

  margin: chex.Numeric = 0.0

  @property
  def sums(self) -> Sequence[str]:  # type: ignore[override]  # depends on the margin
    return ('after',) if is_zero(self.margin) else ('after', 'gradient_norm')

  def decide(
    self, norms: Mapping[str, jax.Array], numbers: Numbers, strength: chex.Numeric
  ) -> Decision:
    ratio = self.ratio(norms)
    return Decision(self.condition(norms), ratio, strength * ratio)

  def condition(self, norms: Mapping[str, jax.Array]) -> jax.Array:
    """Whether a layer is held."""
    return _condition(norms, self.margin)

  def ratio(self, norms: Mapping[str, jax.Array]) -> jax.Array:
    """r."""
    return formulas.projection_ratio(norms['distance'], norms['after'])


class GradientTurn(Rule):
  """The rule of the chain link: a turned gradient is turned farther toward the anchor.

      g' = g + λ (cos + m) ‖g‖ d / ‖d‖     where cos = ⟨g, d⟩ / (‖g‖ ‖d‖) > −m

  Attributes:
    margin: m in [0, 1).
  """

  margin: chex.Numeric = 0.05
  sums = ('gradient_norm',)

  def decide(
    self, norms: Mapping[str, jax.Array], numbers: Numbers, strength: chex.Numeric
  ) -> Decision:
    size, distance = norms['gradient_norm'], norms['distance']
    condition = self.condition(norms)
    ratio = jnp.where(condition, self.pull(formulas.cosine(norms['inner'], size, distance)), 0)
    return Decision(condition, ratio, strength * ratio * formulas.divide(size, distance))

  def condition(self, norms: Mapping[str, jax.Array]) -> jax.Array:
    """Whether a layer is held."""
    return _condition(norms, self.margin)

  def pull(self, cos: jax.Array) -> jax.Array:
    """The pull toward the anchor relative to ‖g‖, at strength 1."""
    return formulas.pull(cos, self.margin)


class L2SP(Rule):
  """L2-SP: every layer is always pulled, g' = g + λ d."""

  def decide(
    self, norms: Mapping[str, jax.Array], numbers: Numbers, strength: chex.Numeric
  ) -> Decision:
    ones = jnp.ones_like(norms['distance'])
    return Decision(ones > 0, ones, strength * ones)


def check(rule: Any, taken: Collection[str]) -> None:
  """Raises an error unless it is a rule whose numbers have names that are not taken."""
  if not isinstance(rule, Rule):
    advice = '; call it' if isinstance(rule, type) and issubclass(rule, Rule) else ''
    raise TypeError(f'rule: expected a spd.Rule, found {checks.kind_of(rule)}{advice}')
  name, init = type(rule).__name__, rule.init
  if unknown := sorted(set(rule.sums) - {'gradient_norm', 'after'}):
    raise ValueError(f"{name}.sums: expected some of 'gradient_norm' and 'after', found {unknown}")
  if not isinstance(init, Mapping) or not all(isinstance(x, int | float) for x in init.values()):
    raise TypeError(f'{name}.init: expected numbers by name, found {init!r:.60}')
  if both := sorted(set(init) & set(taken)):
    raise ValueError(f'{name}.init: reports have numbers of these names already: {both}')


def chosen(rule: Rule | None, default: type[Rule], margin: chex.Numeric) -> Rule:
  """The rule that was passed, or the default with its margin; checks the margin."""
  first = default.margin  # type: ignore[attr-defined]
  if rule is not None and isinstance(margin, int | float) and margin != first:
    raise TypeError(
      f'margin={margin!r} belongs to the default rule; give it to the rule that you pass, as in '
      f'rule=spd.{default.__name__}(margin={margin!r})'
    )
  found = default(margin=margin) if rule is None else rule  # type: ignore[call-arg]
  if isinstance(found, Projection | GradientTurn):
    checks.fraction('margin', found.margin)
  return found
