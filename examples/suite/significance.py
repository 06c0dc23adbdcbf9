"""A rule that asks the mean of many gradients instead of one."""

from typing import Any

import jax.numpy as jnp

import spd_optax as spd
from spd_optax import formulas


class SignificantProjection(spd.Rule):
  """Projects a layer back unless its loss has lately fallen outward, on average.

  The slope p is how fast the loss grows as the layer moves away from its anchor. Its running
  mean is compared with the standard error e that a mean of 0 would have:

      p = ⟨g, d⟩ / ‖d‖
      μ ← β μ + (1 − β) p          s ← β s + (1 − β) p²          w ← β w + (1 − β)
      e² = s / w · (1 − β) / (1 + β) · (2 − w) / w
      θ ← θ̃ − λ r (θ̃ − θ_0)     where μ / w > −z e and ‖d‖ ≥ k ‖θ̃ − θ‖ and d ≠ 0

  with r as in `spd.Projection`. The noise of p does not grow with the layer, so z means the same in
  a bias and in a large matrix. A margin is a cosine, whose noise does depend on the size.

  The second condition is that of `spd.Projection`. In the state and in reports 'slope' is μ,
  'slope_square' s and 'slope_weight' w, all 0 at first.

  Attributes:
    z: standard errors ≥ 0; 0 asks for the sign of the mean alone. More holds more; from
      √((1 + β) / (1 − β)) on, which is 6.2 for the default β, every layer that is far enough.
    decay: β in [0, 1). The mean is over some 1 / (1 − β) steps; 0 asks for the last gradient alone.
    near: k ≥ 0.
  """

  z: Any = 0.0
  decay: Any = 0.95
  near: Any = 20.0
  needs = ('after', 'step')
  numbers = {'slope': 0.0, 'slope_square': 0.0, 'slope_weight': 0.0}  # noqa: RUF012  # not written

  def decide(self, norms: Any, numbers: Any, strength: Any) -> spd.Decision:
    distance = norms['distance']
    slope = formulas.divide(norms['inner'], distance)
    terms = {'slope': slope, 'slope_square': slope**2, 'slope_weight': jnp.ones_like(slope)}
    seen = (distance > 0) & jnp.isfinite(slope**2)
    new = {
      name: jnp.where(seen, self.decay * old + (1 - self.decay) * terms[name], old)
      for name, old in numbers.items()
    }
    mean, square, weight = new['slope'], new['slope_square'], new['slope_weight']
    # e w, so that nothing is divided by a weight of 0.
    error = jnp.sqrt(square * (1 - self.decay) / (1 + self.decay) * (2 - weight))
    far = (distance > 0) & (distance >= self.near * norms['step'])
    ratio = formulas.projection_ratio(distance, norms['after'])
    return spd.Decision(far & (mean + self.z * error > 0), ratio, strength * ratio, new)
