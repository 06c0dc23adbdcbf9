"""Selective Projection Decay for optax: fine-tuning without forgetting.

optax.chain(spd.projection_decay(anchor), optax.adam(lr))   # in a chain
spd.with_projection_decay(optax.adam(lr), anchor)           # the paper's rule
spd.adam_spd(lr, anchor)                                    # the same, with Adam
"""

from spd_optax.aliases import adam_spd
from spd_optax.baselines import L2SPState, interpolate, l2_sp
from spd_optax.projection_decay import (
  ProjectionDecayOptimizer,
  WithProjectionDecayState,
  projection_decay,
  with_projection_decay,
)
from spd_optax.step import ProjectionDecayState

__version__ = '0.1.0'

__all__ = [
  'L2SPState',
  'ProjectionDecayOptimizer',
  'ProjectionDecayState',
  'WithProjectionDecayState',
  'adam_spd',
  'interpolate',
  'l2_sp',
  'projection_decay',
  'with_projection_decay',
]
