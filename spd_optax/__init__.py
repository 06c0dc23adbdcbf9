"""Selective Projection Decay for optax: fine-tuning with less forgetting.

optax.chain(spd.projection_decay(anchor), optax.adam(lr))   # in a chain
spd.with_projection_decay(optax.adam(lr), anchor)           # the paper's rule
spd.adam_spd(lr, anchor)                                    # the same, with Adam
"""

from spd_optax.anchors import interpolate
from spd_optax.audit import AuditLog
from spd_optax.baseline import baseline_state
from spd_optax.budgets import (
  Budget,
  BudgetState,
  cosine_from_base,
  kl_from_base,
  within_budget,
  within_distance,
)
from spd_optax.engine import ProjectionDecayState
from spd_optax.exchange import DroppedLeaf, drop_anchor, fingerprint, put_anchor, reanchor
from spd_optax.loading import load_anchor
from spd_optax.projection_decay import l2_sp, projection_decay
from spd_optax.reports import LayerRecord, layer_report, scalars
from spd_optax.rules import (
  L2SP,
  Decision,
  GradientTurn,
  Projection,
  Rule,
  SignificantProjection,
)
from spd_optax.with_projection_decay import (
  ProjectionDecayOptimizer,
  WithProjectionDecayState,
  adam_spd,
  with_projection_decay,
)

__version__ = '0.2.0'

__all__ = [
  'L2SP',
  'AuditLog',
  'Budget',
  'BudgetState',
  'Decision',
  'DroppedLeaf',
  'GradientTurn',
  'LayerRecord',
  'Projection',
  'ProjectionDecayOptimizer',
  'ProjectionDecayState',
  'Rule',
  'SignificantProjection',
  'WithProjectionDecayState',
  'adam_spd',
  'baseline_state',
  'cosine_from_base',
  'drop_anchor',
  'fingerprint',
  'interpolate',
  'kl_from_base',
  'l2_sp',
  'layer_report',
  'load_anchor',
  'projection_decay',
  'put_anchor',
  'reanchor',
  'scalars',
  'with_projection_decay',
  'within_budget',
  'within_distance',
]
