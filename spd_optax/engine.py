"""The step that all transformations of the library share, and its state.

One step, from the gradients g, the params θ and the state:

1. The leaves of θ are matched by path with g and with the anchor, and arranged
   into layers; all of this happens at trace time.
2. θ_0 comes from the state, is 0, or is captured from θ at the first update.
3. Sums over each layer: ⟨g, d⟩, ‖d‖² with d = θ − θ_0, and what the rule needs
   besides. This is the only reduction, and the only communication.
4. From them the rule decides, per layer, whether it is held and how far it is taken back.
5. A held layer is taken back: in a chain its gradient, around an optimizer its step.
"""

import dataclasses
import functools
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from spd_optax import budgets, checks, formulas, leafwise, stacked, trees
from spd_optax.anchors import Anchoring, View
from spd_optax.budgets import Budget, BudgetState
from spd_optax.layers import Arrangement, Layers, Sums, layer_name
from spd_optax.rules import Decision, Rule


class ProjectionDecayState(NamedTuple):
  """State of Selective Projection Decay; structure, shapes and dtypes never change.

  The per-layer fields are dicts. The key of a layer is the path of its leaf joined by '~', as
  in 'encoder~block_0~kernel', or the key of its group. (Writers of checkpoints join paths by
  '/' or '.'.) A stacked layer has one value per slice.

  Attributes:
    count: int32[], updates so far.
    anchor: tree like the params: θ_0, or `optax.MaskedNode()` where none is stored.
    condition: bool[] or bool[L] per layer: whether the rule held the layer at the last update.
      The layer was moved only if `ratio` > 0, too.
    ratio: float32, same shapes. Around an optimizer: r, the growth of the distance in the last step
      relative to the distance after it (eq. 9), whether held or not. In a chain: the size of the
      pull relative to the gradient, at strength 1; 0 without a pull.
    distance: float32, same shapes: ‖θ − θ_0‖ before the last update.
    constrained: int32, same shapes: updates so far with a true `condition`.
    rule_state: the rule's own numbers, by name; each a dict of float32, same shapes.
    budget_state: a `BudgetState` if a budget sets the strength, else `optax.EmptyState()`.
  """

  count: jax.Array  # type: ignore[assignment]  # optax's name; hides tuple.count
  anchor: optax.Params
  condition: dict[str, jax.Array]
  ratio: dict[str, jax.Array]
  distance: dict[str, jax.Array]
  constrained: dict[str, jax.Array]
  rule_state: dict[str, dict[str, jax.Array]]
  budget_state: BudgetState | optax.EmptyState = optax.EmptyState()


def is_state(node: object) -> bool:
  """Whether a node of an optimizer state is the state of SPD, which holds an anchor."""
  return isinstance(node, ProjectionDecayState)


def states_of(opt_state: optax.OptState, name: str) -> list[ProjectionDecayState]:
  """Every state of SPD in an optimizer state, at any depth; raises a TypeError without any."""
  found = [x for x in jax.tree.leaves(opt_state, is_leaf=is_state) if is_state(x)]
  if not found:
    kind = checks.kind_of(opt_state)
    raise TypeError(
      f'{name}: expected the state of an optimizer with SPD in it, found {kind}; of an '
      'nnx.Optimizer pass its opt_state'
    )
  return found


PER_LAYER = ('condition', 'ratio', 'distance', 'constrained')
TAKEN = {*ProjectionDecayState._fields, 'constrained_share', 'relative_distance', 'inner_state'}


Outcome = tuple[dict[str, Any], jax.Array, jax.Array]


class Step(NamedTuple):
  """One step, decided: the constrained leaves, their layers, and what becomes of these.

  An outcome has the layer's entries in the next state, whether it is taken back, and how far.
  """

  view: View
  layers: Layers
  outcomes: list[Outcome]


@dataclasses.dataclass(frozen=True)
class Engine:
  """A rule, its strength, and the arguments that all transformations have."""

  rule: Rule
  strength: optax.ScalarOrSchedule | Budget
  anchoring: Anchoring
  arrangement: Arrangement

  def __post_init__(self) -> None:
    anchor = self.anchoring.anchor
    if isinstance(anchor, float | Budget) or (type(anchor) is int and anchor):
      raise TypeError(
        f'anchor: expected a tree of arrays, 0 or None, found {checks.kind_of(anchor)}; a strength '
        'is passed by its name: strength=…'
      )
    if not isinstance(self.strength, Budget):
      checks.number_or_schedule('strength', self.strength)
    if taken := sorted(TAKEN & set(self.rule.numbers)):
      name = type(self.rule).__name__
      raise ValueError(f'{name}.numbers: reports have numbers of these names already: {taken}')

  def init(self, params: optax.Params) -> ProjectionDecayState:
    """The state before the first update."""
    flat, at, stored = self.anchoring.init(params)
    if trees.is_placeholder(params):
      # optax.tree.map_params calls init with a placeholder to learn which parts
      # of the state are like the params. Bare leaves say: these are not.
      leaf: Any = jnp.zeros([])
      return ProjectionDecayState(leaf, stored, leaf, leaf, leaf, leaf, leaf, leaf)
    layers = self.arrangement.find_layers(flat, at)
    _warn_of_narrow({flat.paths[i]: flat.leaves[i] for i in at})
    if self.arrangement.stack_axis is None:
      stacked.warn([flat.paths[i] for i in at], [jnp.shape(flat.leaves[i]) for i in at])
    zeros = layers.zeros([flat.leaves[i] for i in at])
    has_budget = isinstance(self.strength, Budget)
    budget = self.strength.init_state() if has_budget else optax.EmptyState()

    def filled(value: float, dtype: jax.typing.DTypeLike) -> dict[str, jax.Array]:
      return layers.by_key([(x + value).astype(dtype) for x in zeros])

    return ProjectionDecayState(
      count=jnp.zeros([], jnp.int32),
      anchor=stored,
      condition=filled(0, jnp.bool_),
      ratio=filled(0, jnp.float32),
      distance=filled(0, jnp.float32),
      constrained=filled(0, jnp.int32),
      rule_state={name: filled(value, jnp.float32) for name, value in self.rule.numbers.items()},
      budget_state=budget,
    )

  def view(
    self, gradients: optax.Updates, state: ProjectionDecayState, params: optax.Params
  ) -> tuple[View, Layers]:
    """The constrained leaves, and their arrangement into layers; checks all arguments."""
    check_state(state, ProjectionDecayState)
    view = self.anchoring.view(gradients, state.anchor, state.count, params)
    layers = self.arrangement.find_layers(view.flat, view.at)
    trees.match_shapes(
      {layer_name(key): steps.shape for key, steps in state.constrained.items()},
      dict(zip(map(layer_name, layers.keys), layers.shapes, strict=True)),
      'the layers in the optimizer state do not fit `group` and `stack_axis`; '
      'the shapes of their conditions differ:',
    )
    if set(state.rule_state) != set(self.rule.numbers):
      own, found = sorted(self.rule.numbers), sorted(state.rule_state)
      raise ValueError(f'the optimizer state is of another rule: it has {found}, not {own}')
    if isinstance(state.budget_state, BudgetState) != isinstance(self.strength, Budget):
      raise ValueError(
        'the optimizer state was made with a strength that is no budget, and strength is one now'
        if isinstance(self.strength, Budget)
        else 'the optimizer state was made with a budget, and strength is none now'
      )
    return view, layers

  def decide(
    self,
    state: ProjectionDecayState,
    view: View,
    layers: Layers,
    extra_args: Mapping[str, Any],
    after: Sequence[jax.Array | None] = (),
  ) -> tuple[Step, ProjectionDecayState]:
    """What becomes of each layer, and the next state.

    `after` has θ̃ for each constrained leaf, where the rule is around an optimizer.
    """
    needed = {*self.rule.needs, *self._needed_by_budget(view, bool(after))}
    moved = after or [None] * len(view.at)
    each = zip(view.gradients, view.params, view.anchors, moved, layers.stack_axes, strict=True)
    per_leaf = [
      leafwise.sums(*arrays, stack_axis=axis, needed=tuple(sorted(needed)))
      for *arrays, axis in each
    ]
    totals = layers.totals(per_leaf)
    strength, budget = self._strength(state, totals, extra_args)
    outcomes = [
      _outcome(
        self.rule,
        sums,
        {name: values[key] for name, values in state.rule_state.items()},
        strength,
        state.constrained[key],
        decide=(type(self.rule), type(self.rule).decide),
        has_budget=isinstance(self.strength, Budget),
      )
      for key, sums in zip(layers.keys, totals, strict=True)
    ]
    fields = [fields for fields, _, _ in outcomes]
    next_state = ProjectionDecayState(
      count=optax.safe_increment(state.count),
      anchor=self.anchoring.following(view),
      **{name: layers.by_key([one[name] for one in fields]) for name in PER_LAYER},
      rule_state={
        name: layers.by_key([one['rule_state'][name] for one in fields])
        for name in state.rule_state
      },
      budget_state=budget,
    )
    return Step(view, layers, outcomes), next_state

  def _needed_by_budget(self, view: View, is_around: bool) -> Sequence[str]:
    """What a budget needs to know of each layer."""
    if not isinstance(self.strength, Budget):
      return ()
    if self.strength.of_distance and view.at and all(x is None for x in view.anchors):
      raise ValueError('within_distance: the anchor is zero, so no distance is relative to it')
    norm = ('anchor_norm',) if self.strength.of_distance else ()
    return ('after' if is_around else 'gradient_norm', *norm)

  def _strength(
    self, state: ProjectionDecayState, totals: Sequence[Sums], extra_args: Mapping[str, Any]
  ) -> tuple[chex.Numeric, BudgetState | optax.EmptyState]:
    """λ of this update, and the state of the budget that sets it."""
    if isinstance(self.strength, Budget):
      budget = self.strength.update(state.budget_state, totals, extra_args)
      return budget.strength, budget
    strength = self.strength(state.count) if callable(self.strength) else self.strength
    checks.scalar('strength', strength, 'a schedule that returns a number ≥ 0', lambda v: True)
    return strength, state.budget_state


def check_state(value: object, expected: type) -> None:
  """Raises a TypeError unless it is the state that init returned."""
  name = expected.__name__
  if not isinstance(value, expected):
    raise TypeError(
      f'expected the {name} that init returns, found {type(value).__name__}; '
      'restore checkpoints into the structure of init(params)'
    )
  conditions = value.condition if isinstance(value, ProjectionDecayState) else {}
  if any(flag.dtype != bool for flag in conditions.values()):
    raise TypeError(
      f'expected the {name} that init returns, found a condition that is not bool; '
      'in optax.contrib.sam pass opaque_mode=True'
    )


def _warn_of_narrow(params: dict[str, jax.Array]) -> None:
  """Warns of params, by path, whose dtype is too coarse to add small steps to."""
  dtypes = {path: checks.dtype_of(x) for path, x in params.items()}
  narrow = {path: dtype for path, dtype in dtypes.items() if jnp.finfo(dtype).bits < 32}
  if narrow:
    path, dtype = next(iter(narrow.items()))
    checks.warn(
      f'{len(narrow)} of {len(params)} constrained params are narrower than float32 (first: '
      f'{trees.shown(path)!r}, {dtype.name}). Adding an update to them rounds away steps below '
      f'about {25 * float(jnp.finfo(dtype).eps):.2g} % of a weight, those of SPD among them. '
      'Keep float32 params, and cast them inside the loss.'
    )


@functools.partial(jax.jit, static_argnames=('decide', 'has_budget'))
def _outcome(
  rule: Rule,
  sums: Sums,
  numbers: dict[str, jax.Array],
  strength: chex.Numeric,
  constrained: jax.Array,
  *,
  decide: Hashable,
  has_budget: bool,
) -> Outcome:
  """What the rule decides for one layer.

  A sum, or a strength, that is not finite holds nothing, nor does a negative strength.
  `decide` has the class and its method: the treedefs of two rules may be equal.
  """
  del decide
  norms = {name: x if name == 'inner' else formulas.norm(x) for name, x in sums.items()}
  inner = norms['inner']
  strength = jnp.asarray(strength, inner.dtype)
  numbers = {name: x.astype(inner.dtype) for name, x in numbers.items()}
  usable = (strength >= 0) & jnp.isfinite(strength)
  decision = rule.decide(norms, numbers, jnp.where(usable, strength, 0.0))
  decision = _per_layer(rule, decision, inner)
  condition, ratio, scale, new = (
    budgets.pressed(decision, norms, strength) if has_budget else decision
  )
  condition = condition & usable & jnp.isfinite(inner)
  fields = {
    'condition': condition,
    'ratio': ratio.astype(jnp.float32),
    'distance': norms['distance'].astype(jnp.float32),
    'constrained': jnp.where(condition, optax.safe_increment(constrained), constrained),
    # A single NaN gradient must not stay in a running mean for good.
    'rule_state': {
      name: jnp.where(jnp.isfinite(x), x, numbers[name]).astype(jnp.float32)
      for name, x in new.items()
    },
  }
  # scale == 0 (a schedule at 0, say) must leave every bit alone, also of a NaN or −0;
  # a scale that is not finite comes from norms beyond the range of the dtype.
  return fields, condition & (scale != 0) & jnp.isfinite(scale), scale


def _per_layer(rule: Rule, decision: object, like: jax.Array) -> Decision:
  """The decision as arrays of one shape; raises an error that names the rule if it has none."""
  name = f'{type(rule).__name__}.decide'
  if not isinstance(decision, Decision):
    raise TypeError(f'{name}: expected an spd.Decision, found {checks.kind_of(decision)}')
  numbers = decision.numbers
  if set(numbers) != set(rule.numbers):
    raise ValueError(
      f'{name}: expected the numbers {sorted(rule.numbers)}, found {sorted(numbers)}'
    )

  def broadcast(field: str, value: Any, kind: jax.typing.DTypeLike) -> jax.Array:
    fits = checks.is_array(value) and jnp.shape(value) in ((), like.shape)
    if not (fits and jnp.can_cast(jnp.result_type(value), kind, 'same_kind')):
      expected = f'{jnp.dtype(kind).name}{list(like.shape)}'
      raise TypeError(f'{name}: {field}: expected {expected}, found {checks.kind_of(value)}')
    return jnp.broadcast_to(jnp.asarray(value, kind), like.shape)

  return Decision(
    broadcast('condition', decision.condition, bool),
    broadcast('ratio', decision.ratio, like.dtype),
    broadcast('scale', decision.scale, like.dtype),
    {key: broadcast(f'numbers[{key!r}]', x, like.dtype) for key, x in numbers.items()},
  )


def replaced(
  tree: optax.Updates, step: Step, leaves: list[jax.Array], function: Callable[..., jax.Array]
) -> optax.Updates:
  """The tree with function(leaf, param, anchor, active, scale) for each constrained leaf."""
  every, treedef = jax.tree.flatten(tree)
  view, layers = step.view, step.layers
  outcomes = [step.outcomes[i] for i in layers.layer_of]
  each = zip(view.at, leaves, view.params, view.anchors, outcomes, layers.stack_axes, strict=True)
  for i, leaf, param, anchor, (_, active, scale), axis in each:
    every[i] = function(leaf, param, anchor, active, scale, axis=axis)
  return jax.tree.unflatten(treedef, every)
