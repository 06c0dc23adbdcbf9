"""A rule that asks the mean of many gradients instead of one."""

from typing import Any

import jax.numpy as jnp

import spd_optax as spd


class SignificantProjection(spd.Rule):
  """Projects every layer that does not significantly walk outward.

  The slope p is how fast the loss grows as the layer moves away from its anchor. Its running
  mean is held against its own standard error:

      p = ⟨g, d⟩ / ‖d‖
      μ ← β μ + (1 − β) p          s ← β s + (1 − β) p²          w ← β w + (1 − β)
      e² = s / w · (1 − β) / (1 + β) · (2 − w) / w
      θ ← θ̃ − λ r (θ̃ − θ_0)     where μ / w > −z e

  with r as in `spd.Projection`. So a layer is free only while the loss has gone on falling outward
  for some 1 / (1 − β) steps, by more than z standard errors. The slope's noise does not grow with
  the layer, so z means the same in a bias and in a large matrix; a margin, which is a cosine, does
  not. A layer that stands on its anchor is free.

  Attributes:
    z: standard errors; 0 asks for the sign of the mean alone. More holds more.
    decay: β in [0, 1).
  """

  z: Any = 0.0
  decay: Any = 0.95
  needs = ('after',)
  numbers = {'slope': 0.0, 'slope_square': 0.0, 'slope_weight': 0.0}  # noqa: RUF012  # not written

  def decide(self, norms: Any, numbers: Any, strength: Any) -> spd.Decision:
    slope = norms['inner'] / jnp.maximum(norms['distance'], 1e-30)
    seen = norms['distance'] > 0
    terms = {'slope': slope, 'slope_square': slope**2, 'slope_weight': jnp.ones_like(slope)}
    new = {
      name: jnp.where(seen, self.decay * numbers[name] + (1 - self.decay) * term, numbers[name])
      for name, term in terms.items()
    }
    mean, square, weight = new['slope'], new['slope_square'], new['slope_weight']
    # e w, so that nothing is divided by a weight of 0.
    error = jnp.sqrt(square * (1 - self.decay) / (1 + self.decay) * (2 - weight))
    growth = jnp.maximum(norms['after'] - norms['distance'], 0)
    ratio = growth / jnp.maximum(norms['after'], 1e-30)
    return spd.Decision(seen & (mean > -self.z * error), ratio, strength * ratio, new)
