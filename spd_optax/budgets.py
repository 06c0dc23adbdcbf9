"""Budgets: a strength that sets itself in one run, so that no more is lost than was asked for.

Also what may be measured for one: how far a model has drifted from its base, in what it says.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from spd_optax import checks, formulas
from spd_optax.layers import Sums
from spd_optax.rules import Decision, Numbers

POWER = 8.0  # of drift / budget in the strength
PACE = 10.0  # measurements
PRESSING = 10.0  # the strength above which no layer is free


class BudgetState(NamedTuple):
  """State of a strength that a budget sets; scalars, with the symbols of `within_budget`.

  Attributes:
    budget: float32, B.
    drift: float32, y as it was last measured; 0 before the first time.
    strength: float32, λ of the last update; 0 where all layers were free.
    base: float32, b, the strength where y = B.
    measured: int32, n, measurements so far.
    crossed: int32, N, the number of the first measurement with y ≥ B; 0 before that.
  """

  budget: jax.Array
  drift: jax.Array
  strength: jax.Array
  base: jax.Array
  measured: jax.Array
  crossed: jax.Array


@dataclasses.dataclass(frozen=True)
class Budget:
  """A strength that sets itself; `within_budget` and `within_distance` create it."""

  budget: chex.Numeric
  init: chex.Numeric
  bounds: tuple[float, float]
  of_distance: bool

  def init_state(self) -> BudgetState:
    """The state before the first update."""
    budget, drift, strength, base = (
      jnp.array(x, jnp.float32, copy=True) for x in (self.budget, 0, 0, self.init)
    )
    # No buffer of the user's, and none twice: states are donated.
    measured, crossed = (jnp.zeros([], jnp.int32) for _ in range(2))
    return BudgetState(budget, drift, strength, base, measured, crossed)

  def update(
    self, state: BudgetState, totals: Sequence[Sums], extra_args: Mapping[str, Any]
  ) -> BudgetState:
    """The state with the strength of this update; see `within_budget`."""
    drift = _relative_distance(totals) if self.of_distance else _passed(extra_args)
    followed: BudgetState = _followed(state, drift, self.budget, bounds=self.bounds)
    return followed


@functools.partial(jax.jit, static_argnames='bounds')
def _followed(
  state: BudgetState, drift: chex.Numeric, budget: chex.Numeric, *, bounds: tuple[float, float]
) -> BudgetState:
  """The state after a measurement, or after none."""
  low, high = bounds
  drift, budget = jnp.asarray(drift, jnp.float32), jnp.asarray(budget, jnp.float32)
  error = jnp.log(jnp.maximum(drift, 0) / budget)  # −∞ where nothing has moved
  measured = state.measured + 1
  crossed = jnp.where((state.crossed == 0) & (error >= 0), measured, state.crossed)
  wanted = state.base * jnp.exp(POWER * error)
  # A base that cannot act, since the strength is at a bound, learns nothing.
  acts = jnp.where(error < 0, wanted >= low, wanted <= high)
  first, n = crossed.astype(jnp.float32), measured.astype(jnp.float32)
  pace = jnp.where(first > 0, PACE / (PACE + first), 1 / (PACE + n))
  change = jnp.where(acts, pace * jnp.clip(error, -1, 1), 0)
  new = BudgetState(
    budget=budget,
    drift=drift,
    strength=jnp.where(wanted < low, 0, jnp.minimum(wanted, high)),
    base=jnp.clip(state.base * jnp.exp(change), low, high),
    measured=measured,
    crossed=crossed,
  )
  is_measured = jnp.isfinite(drift) & (error < jnp.inf)
  kept = state._replace(budget=budget)  # which may be injected anew
  return BudgetState(
    *(jnp.where(is_measured, x, y).astype(y.dtype) for x, y in zip(new, kept, strict=True))
  )


def pressed(decision: Decision, norms: Numbers, strength: jax.Array) -> Decision:
  """The decision, but none is held at strength 0, and all above PRESSING; see `within_budget`."""
  least = jnp.maximum(strength / PRESSING - 1, 0)
  if 'after' in norms:
    least = least * formulas.projection_ratio(norms['distance'], norms['after'])
  else:
    least = least * formulas.divide(norms['gradient_norm'], norms['distance'])
  scale = jnp.maximum(jnp.where(decision.condition, decision.scale, 0), least)
  return decision._replace(
    condition=(decision.condition | (least > 0)) & (strength > 0),
    scale=jnp.minimum(scale, 1) if 'after' in norms else scale,
  )


def within_budget(
  budget: chex.Numeric,
  *,
  init: chex.Numeric = 1.0,
  bounds: tuple[float, float] = (0.01, 100.0),
) -> Budget:
  r"""A strength that sets itself in one run, so that a measured drift ends within a budget.

  Pass it as the `strength` of any function of this library. Pass the drift y ≥ 0 to each `update`,
  as in ``optimizer.update(gradients, state, params, drift=kl)``. The drift may be anything that
  grows as the model forgets: `kl_from_base`, `cosine_from_base`, or the points lost on an old
  benchmark. At the n-th measurement, with budget B:

      λ = b (y / B)^8          but 0 below the lower bound, and never above the upper one
      b ← b exp(κ clip(log(y / B), −1, 1))          κ = 10 / (10 + N)

  N is the first measurement with y ≥ B. Before that, κ = 1 / (10 + n). b does not change if λ is at
  a bound and the change would move λ farther beyond it. So layers are free while the drift is far
  below the budget, and λ settles where the drift equals the budget. Only y / B matters, so any unit
  works.

  A measurement may be noisy, late, or made only every k-th step. Pass NaN or None in other steps: λ
  changes only if the drift is finite. In some steps the drift is above the budget, mostly early on,
  when the model learns fastest. It ends near the budget, or below it. The drift must be the same
  number on all devices: in shard_map or pmap pass its mean over them. Under `optax.MultiSteps` pass
  the last drift in every micro-step. Only the last micro-step counts.

  Up to λ = 10 the rule alone says which layers are held. If that is not enough, no layer is free:

      g' = g + max(s, (λ / 10 − 1) ‖g‖ / ‖d‖) d              in a chain
      θ ← θ̃ − min(1, max(s, (λ / 10 − 1) r)) (θ̃ − θ_0)       around an optimizer

  Here s is the scale of the rule's own `Decision`, or 0 for a layer that the rule leaves free.
  Around an optimizer a layer goes back to its anchor at most.

  Args:
    budget: B > 0, the largest y allowed at the end, in the unit of y.
    init: the initial b, within the bounds.
    bounds: the smallest and the largest λ.

  Returns:
    A `Budget`. Its `BudgetState` is the `budget_state` of the `ProjectionDecayState`.

  Raises:
    ValueError, TypeError: for a bad argument; in `update`, at trace time, if `drift` is missing or
      not a scalar.

  Example:
    >>> import jax, jax.numpy as jnp, optax
    >>> import spd_optax as spd
    >>> strength = spd.within_budget(0.05)  # nats
    >>> optimizer = optax.chain(spd.projection_decay(strength=strength), optax.adam(1e-3))
    >>> inputs, params = jnp.ones((4, 3)), jnp.zeros((3, 2))
    >>> base, state = params, optimizer.init(params)
    >>> gradients = jnp.ones((3, 2))
    >>> drift = spd.kl_from_base(inputs @ params, inputs @ base)
    >>> updates, state = optimizer.update(gradients, state, params, drift=drift)
    >>> optax.tree.get(state, 'strength')
    Array(0., dtype=float32)
  """
  return _budget('within_budget', budget, init, bounds, False)


def within_distance(
  budget: chex.Numeric,
  *,
  init: chex.Numeric = 1.0,
  bounds: tuple[float, float] = (0.01, 100.0),
) -> Budget:
  """`within_budget` with the relative distance from the anchor as the drift. SPD measures it.

      y = ‖θ − θ_0‖ / ‖θ_0‖          over all constrained layers

  ``strength=spd.within_distance(0.02)`` keeps the weights within 2 % of the anchor's norm. It needs
  no data, no forward pass and no extra argument. But `kl_from_base` predicts forgetting better than
  norms of weights do. Every layer waits for the distance of all layers. So on one TPU chip a step
  reads and writes the params 12 times instead of 8, and stores one more temporary copy of them. On
  64 chips this costs nothing. `within_budget` costs nothing anywhere. In shard_map each layer must
  be whole, or split over `axis_name`. If layers are distributed over devices, use `within_budget`.
  If all of θ_0 is 0, y has no value, and no layer is held.

  Args:
    budget: B > 0, a share of ‖θ_0‖: 0.02 is 2 %.
    init, bounds: see `within_budget`.

  Returns:
    A `Budget`, as `within_budget`.

  Raises:
    ValueError, TypeError: as `within_budget`; in `update`, if the whole anchor is `0`.

  Example:
    >>> import spd_optax as spd
    >>> optimizer = spd.adam_spd(1e-3, strength=spd.within_distance(0.02))
  """
  return _budget('within_distance', budget, init, bounds, True)


def _budget(
  name: str,
  budget: chex.Numeric,
  init: chex.Numeric,
  bounds: tuple[float, float],
  of_distance: bool,
) -> Budget:
  checks.scalar(f'{name}: budget', budget, 'a finite number > 0', lambda v: 0 < v < math.inf)
  if not (isinstance(bounds, tuple | list) and len(bounds) == 2):
    raise TypeError(f'{name}: bounds: expected two numbers, found {checks.kind_of(bounds)}')
  for bound in bounds:
    checks.scalar(f'{name}: bounds', bound, 'finite numbers > 0', lambda v: 0 < v < math.inf)
  low, high = map(float, bounds)
  expected = f'a number from {low:g} to {high:g}, the bounds'
  checks.scalar(f'{name}: init', init, expected, lambda v: low <= v <= high)
  return Budget(budget, init, (low, high), of_distance)


def _passed(extra_args: Mapping[str, Any]) -> Any:
  """The drift that update was given; NaN is none."""
  if 'drift' not in extra_args:
    raise TypeError(
      'the strength is spd.within_budget(…), which needs a drift: update(gradients, state, params, '
      'drift=…), NaN or None in steps in which it was not measured; spd.within_distance needs none'
    )
  drift = extra_args['drift']
  if drift is None:
    return math.nan
  checks.scalar('update: drift', drift, 'a number ≥ 0, or NaN or None', lambda v: True)
  return drift


def _relative_distance(totals: Sequence[Sums]) -> jax.Array:
  """‖θ − θ_0‖ / ‖θ_0‖ over all layers."""
  distance, norm = (
    sum((jnp.sum(sums[name]) for sums in totals), jnp.zeros([]))
    for name in ('distance', 'anchor_norm')
  )
  return formulas.norm(distance / norm)


def kl_from_base(
  logits: jax.typing.ArrayLike,
  base_logits: jax.typing.ArrayLike,
  *,
  where: jax.typing.ArrayLike | None = None,
) -> jax.Array:
  """KL divergence from a base model's predictions to a model's: KL(π_0 ‖ π), in nats.

      KL = mean over examples and tokens of  Σ_c π_0(c) (log π_0(c) − log π(c))

  with π = softmax(logits). New inputs are enough: the KL on them predicts forgetting on old inputs
  (Shenfeld, Pari and Agrawal, `RL's Razor <https://arxiv.org/abs/2509.04259>`_, 2025). But if the
  base model is sure of wrong answers on them, learning itself is such a drift, and a small budget
  forbids it.

  Args:
    logits: of the model, float[..., classes].
    base_logits: of the base model for the same inputs, same shape. They may be stored once.
    where: bool[...], or a shape that broadcasts to it: which tokens count. Leave out padding, and
      tokens that are not predicted.

  Returns:
    float32[]; NaN if no token counts.

  Raises:
    ValueError, TypeError: if the shapes do not fit, or what is passed is no array.

  Example:
    >>> import jax.numpy as jnp
    >>> import spd_optax as spd
    >>> logits, tokens = jnp.array([[[2.0, 0.0], [0.0, 1.0]]]), jnp.array([[5, 0]])
    >>> print(spd.kl_from_base(logits, jnp.zeros_like(logits), where=tokens != 0))
    0.43378088
  """
  arrays = {'logits': logits, 'base_logits': base_logits}
  new, base = _matched('kl_from_base', arrays, where)
  new, base = (jax.nn.log_softmax(x) for x in (new, base))
  # Classes that are ruled out by logits of −∞ count for nothing.
  possible = base > -jnp.inf
  new, base = (jnp.where(possible, x, 0) for x in (new, base))
  terms = jnp.where(possible, jnp.exp(base), 0) * (base - new)
  return jnp.mean(jnp.sum(terms, -1), where=where)


def cosine_from_base(
  embeddings: jax.typing.ArrayLike,
  base_embeddings: jax.typing.ArrayLike,
  *,
  where: jax.typing.ArrayLike | None = None,
) -> jax.Array:
  """Mean cosine distance of embeddings from the embeddings of the base model, from 0 to 2.

      mean over examples of  1 − ⟨e, e_0⟩ / (‖e‖ ‖e_0‖)

  Args:
    embeddings: of the model, float[..., d].
    base_embeddings: of the base model for the same inputs, same shape.
    where: bool[...]: which examples count.

  Returns:
    float32[]; NaN if no example counts.

  Raises:
    ValueError, TypeError: if the shapes do not fit, or what is passed is no array.

  Example:
    >>> import jax.numpy as jnp
    >>> import spd_optax as spd
    >>> print(spd.cosine_from_base(jnp.array([[1.0, 0.0]]), jnp.array([[2.0, 2.0]])))
    0.29289323
  """
  arrays = {'embeddings': embeddings, 'base_embeddings': base_embeddings}
  new, base = _matched('cosine_from_base', arrays, where)
  return jnp.mean(optax.losses.cosine_distance(new, base, epsilon=1e-12), where=where)


def _matched(
  name: str,
  arrays: Mapping[str, jax.typing.ArrayLike],
  where: jax.typing.ArrayLike | None,
) -> list[jax.Array]:
  """Both arrays in float32; raises an error unless all shapes fit."""
  checks.arrays(name, {**arrays, **({} if where is None else {'where': where})})
  shapes = [jnp.shape(x) for x in arrays.values()]
  if shapes[0] != shapes[1] or not shapes[0]:
    raise ValueError(f'{name}: expected two arrays of one shape [..., n], found {shapes}')
  rows, given = shapes[0][:-1], jnp.shape(where) if where is not None else ()
  try:
    fits = jnp.broadcast_shapes(rows, given) == rows
  except ValueError:
    fits = False
  if not fits:
    raise ValueError(f'{name}: where: expected a shape that broadcasts to {rows}, found {given}')
  if where is not None and not jnp.issubdtype(checks.dtype_of(where), jnp.bool_):
    raise TypeError(f'{name}: where: expected bool, as in mask > 0, found {checks.kind_of(where)}')
  return [jnp.asarray(x, jnp.float32) for x in arrays.values()]
