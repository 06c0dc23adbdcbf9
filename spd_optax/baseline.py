"""What there is to log of a run without SPD: how far it moves."""

import chex
import jax.numpy as jnp
import optax

from spd_optax import checks
from spd_optax.anchors import Anchoring
from spd_optax.engine import Engine, ProjectionDecayState
from spd_optax.layers import Arrangement, Group, StackAxis
from spd_optax.rules import Decision, Numbers, Rule


class _Never(Rule):
  """Holds no layer."""

  def decide(self, norms: Numbers, numbers: Numbers, strength: chex.Numeric) -> Decision:
    zero = jnp.zeros_like(norms['inner'])
    return Decision(zero > 0, zero, zero)


def baseline_state(
  params: optax.Params,
  anchor: optax.Params,
  count: chex.Numeric,
  *,
  stack_axis: StackAxis = None,
  group: Group = None,
) -> ProjectionDecayState:
  """The SPD state for a run without SPD: no layer is held, and distances are ‖θ − θ_0‖.

  So you can compare a log of plain Adam with a log of `adam_spd`. `layer_report` and `scalars` read
  this state, too. The training step does not change.

  Args:
    params: the params to measure. (The state of SPD has the distance before its last update.)
    anchor: the pre-trained weights, in any form that `projection_decay` takes, except None.
    count: updates so far.
    stack_axis, group: see `projection_decay`. With the values of the other run, both logs have the
      same layers.

  Returns:
    A `ProjectionDecayState`, in which every condition is False, and ratio and constrained are 0.

  Raises:
    TypeError, ValueError: as `projection_decay`; if `anchor` is None.

  Example:
    >>> import jax.numpy as jnp, optax, tempfile
    >>> import spd_optax as spd
    >>> path = tempfile.mkdtemp() + '/adam.jsonl'
    >>> pretrained = {'kernel': jnp.ones((2, 2))}
    >>> params, tx = pretrained, optax.adam(0.1)
    >>> state = tx.init(params)
    >>> with spd.AuditLog(path, transform='adam', baseline=True) as log:
    ...   for step in range(1, 4):
    ...     updates, state = tx.update(params, state, params)
    ...     params = optax.apply_updates(params, updates)
    ...     log.record(step, spd.baseline_state(params, pretrained, step), {'loss': 1 / step})
  """
  if anchor is None:
    raise TypeError('anchor: expected the pre-trained weights, found None')
  checks.scalar('count', count, 'an integer ≥ 0', lambda v: v >= 0 and v == int(v))
  engine = Engine(_Never(), 0.0, Anchoring(anchor), Arrangement(stack_axis, group))
  state = engine.init(params)
  view, layers = engine.view(params, state, params)
  _, state = engine.decide(state, view, layers, {})
  return state._replace(count=jnp.asarray(count, jnp.int32))
