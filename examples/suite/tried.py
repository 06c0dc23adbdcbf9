"""Rules that were tried, and are not in the library: docs/understand/tried-rules.md says why."""

import chex
import jax
import jax.numpy as jnp

import spd_optax as spd
from spd_optax.rules import Numbers


def growth(norms: Numbers) -> jax.Array:
  """r = max(0, ‖θ̃ − θ_0‖ − ‖θ − θ_0‖) / ‖θ̃ − θ_0‖."""
  after = norms['after']
  return jnp.where(after > 0, jnp.maximum(after - norms['distance'], 0) / after, 0)


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
    condition, ratio = norms['inner'] > 0, growth(norms)
    share = self.decay * numbers['share'] + (1 - self.decay) * condition
    scale = strength * jnp.minimum(1, 2 * (1 - share)) * ratio
    return spd.Decision(condition, ratio, scale, {'share': share})


class NeitherWay(spd.Rule):
  """Projects a layer back while its mean slope is significantly neither outward nor inward.

      |μ| < z √(s (1 − β) / (1 + β)),     with μ and s as in `spd.SignificantProjection`

  Where the slope points back significantly, the optimizer goes back without help, if it can.
  """

  z: float = 1.0
  decay: float = 0.95
  needs = ('after',)
  numbers = {'slope': 0.0, 'slope_square': 0.0}  # noqa: RUF012  # never written to

  def decide(self, norms: Numbers, numbers: Numbers, strength: chex.Numeric) -> spd.Decision:
    distance, ratio = norms['distance'], growth(norms)
    slope = jnp.where(distance > 0, norms['inner'] / distance, 0)
    terms = {'slope': slope, 'slope_square': slope**2}
    new = {name: self.decay * numbers[name] + (1 - self.decay) * x for name, x in terms.items()}
    error = jnp.sqrt(new['slope_square'] * (1 - self.decay) / (1 + self.decay))
    return spd.Decision(jnp.abs(new['slope']) < self.z * error, ratio, strength * ratio, new)
