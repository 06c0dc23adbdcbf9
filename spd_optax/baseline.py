"""What there is to log of a run without SPD: how far it moves."""

import chex
import jax
import jax.numpy as jnp
import optax

from spd_optax import checks, trees
from spd_optax.anchors import Anchoring
from spd_optax.engine import Engine, ProjectionDecayState
from spd_optax.layers import Arrangement, Group, StackAxis
from spd_optax.patterns import Patterns
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
  free: Patterns | None = None,
  anchor_dtype: jax.typing.DTypeLike | None = None,
  stack_axis: StackAxis = None,
  group: Group = None,
) -> ProjectionDecayState:
  """The SPD state for a run without SPD: no layer is held, and distances are ‖θ − θ_0‖.

  So you can compare a log of plain Adam with a log of `adam_spd`. `layer_report` and `scalars` read
  this state, too. The training step does not change. Call it where you make a record; in
  ``jax.jit`` a call is cheaper. Bind an anchor that has a 0 in it, since jit makes an array of each
  argument: ``jax.jit(functools.partial(spd.baseline_state, anchor=0))``.

  Args:
    params: the params to measure. (The state of SPD has the distance before its last update.)
    anchor: the pre-trained weights, as `projection_decay` takes them, but with values.
    count: updates so far.
    free, anchor_dtype, stack_axis, group: see `projection_decay`. With the values of the other run,
      both logs have the same layers.

  Returns:
    A `ProjectionDecayState`, in which every condition is False, and ratio and constrained are 0.

  Raises:
    TypeError, ValueError: as `projection_decay`; if `anchor` is None or has a `ShapeDtypeStruct`,
      which would stand for the params.

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
  leaves = trees.flatten(anchor).by_path
  structs = [path for path, x in leaves.items() if isinstance(x, jax.ShapeDtypeStruct)]
  checks.raise_all(structs, 'anchor: expected values, found a ShapeDtypeStruct at', TypeError)
  checks.scalar('count', count, 'an integer ≥ 0', lambda v: 0 <= v < 2**31 and v == int(v))
  anchoring = Anchoring(anchor, dtype=anchor_dtype, free=free)
  engine = Engine(_Never(), 0.0, anchoring, Arrangement(stack_axis, group))
  state = engine.init(params)
  view, layers = engine.view(params, state, params)
  _, state = engine.decide(state, view, layers, {})
  return state._replace(count=jnp.asarray(count, jnp.int32))
