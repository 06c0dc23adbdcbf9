"""Rules that were tried, and are not in the library: docs/understand/tried-rules.md says why."""

import chex
import jax.numpy as jnp

import spd_optax as spd
from spd_optax import formulas
from spd_optax.rules import Numbers


class Relieved(spd.Rule):
  """The paper's rule, that holds a layer less firmly the more often it has been held.

      s ← β s + (1 − β) 1[⟨g, d⟩ > 0]
      θ ← θ̃ − λ min(1, 2 (1 − s)) r (θ̃ − θ_0)     where ⟨g, d⟩ > 0

  A layer of noise alone is held in half of the steps. One that is held in more may be stuck.
  """

  decay: float = 0.9
  needs = ('after',)
  numbers = {'share': 0.5}  # noqa: RUF012  # never written to

  def decide(self, norms: Numbers, numbers: Numbers, strength: chex.Numeric) -> spd.Decision:
    condition, ratio = (
      norms['inner'] > 0,
      formulas.projection_ratio(norms['distance'], norms['after']),
    )
    share = self.decay * numbers['share'] + (1 - self.decay) * condition
    scale = strength * jnp.minimum(1, 2 * (1 - share)) * ratio
    return spd.Decision(condition, ratio, scale, {'share': share})


class NeitherWay(spd.SignificantProjection):
  """Projects a layer back while its mean slope is significantly neither outward nor inward.

      |μ| < z √(s (1 − β) / (1 + β)),     with μ and s as in `spd.SignificantProjection`

  Where the slope points back significantly, the optimizer goes back without help, if it can.
  """

  z: float = 1.0
  near: float = 0.0

  def decide(self, norms: Numbers, numbers: Numbers, strength: chex.Numeric) -> spd.Decision:
    found = super().decide(norms, numbers, strength)
    spread = found.numbers['slope_square'] * (1 - self.decay) / (1 + self.decay)
    inward = found.numbers['slope'] >= self.z * jnp.sqrt(spread)
    return found._replace(condition=found.condition & ~inward)
