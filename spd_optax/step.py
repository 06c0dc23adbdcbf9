"""The step that both forms of Selective Projection Decay share, and its state.

One step, from the gradients g, the params θ and the state:

1. The leaves of θ are matched by path with g and with the anchor, and arranged
   into layers (`layers.find_layers`); all of this happens at trace time.
2. θ_0 comes from the state, is 0, or is captured from θ at the first update.
3. Sums over each layer: ⟨g, d⟩, ‖d‖² with d = θ − θ_0, and what the form needs
   besides. This is the only reduction, and the only communication.
4. From them `formulas` computes, per layer, the condition and the ratio.
5. Where the condition holds, form 1 turns the gradient toward the anchor, and
   form 2 shortens the step of the optimizer that it is wrapped around.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from spd_optax import anchors, checks, formulas, trees
from spd_optax.anchors import Kind
from spd_optax.checks import Number, NumberOrSchedule
from spd_optax.layers import AxisName, Group, Layers, PerLayer, StackAxis, find_layers, layer_key


class ProjectionDecayState(NamedTuple):
  """State of Selective Projection Decay; structure, shapes and dtypes never change.

  The per-layer fields are dicts by layer name: the path of the leaf joined by '~'
  ('encoder~block_0~kernel'; writers of checkpoints join paths by '/' or '.'), or the key of its group. A stacked layer has one value per slice.

  Attributes:
    count: int32[], updates so far.
    anchor: tree like the params: θ_0, or `optax.MaskedNode()` where none is stored.
    condition: bool[] or bool[L] per layer: the test at the last update, true where
      the layer is to be held back. It was moved only where `ratio` > 0, too.
    ratio: float32, same shapes. Form 2: r, the part of the deviation from the
      anchor by which the last step grew (eq. 9), whether held or not. Form 1: the
      size of the pull relative to the gradient at strength 1; 0 where there is none.
    distance: float32, same shapes: ‖θ − θ_0‖ before the last update.
    constrained: int32, same shapes: updates so far with a true `condition`.
    rule_state: the rule's own numbers for each layer: for each by name a dict of float32 like
      the others; empty for a rule that keeps none.
  """

  count: jax.Array  # type: ignore[assignment]  # optax's name; hides tuple.count
  anchor: Any
  condition: dict[str, jax.Array]
  ratio: dict[str, jax.Array]
  distance: dict[str, jax.Array]
  constrained: dict[str, jax.Array]
  rule_state: dict[str, dict[str, jax.Array]]


class Decision(NamedTuple):
  """What one step decides for one layer; every field has shape [] or [L].

  Attributes:
    condition, ratio, distance, constrained: as in the next `ProjectionDecayState`.
    scale: the factor of the direction in which the layer is shifted.
    active: bool, whether it is shifted at all.
  """

  condition: jax.Array
  ratio: jax.Array
  distance: jax.Array
  constrained: jax.Array
  scale: jax.Array
  active: jax.Array


PER_LAYER = ('condition', 'ratio', 'distance', 'constrained')

Norms = dict[str, jax.Array]
Rule = Callable[[jax.Array, Norms], tuple[jax.Array, jax.Array]]  # condition -> ratio, scale


@dataclasses.dataclass(frozen=True)
class Decay:
  """Everything but what happens to a held layer."""

  anchoring: anchors.Anchoring
  strength: NumberOrSchedule
  margin: Number
  stack_axis: StackAxis
  group: Group
  axis_name: AxisName

  def __post_init__(self) -> None:
    checks.number_or_schedule('strength', self.strength)
    checks.fraction('margin', self.margin)
    checks.group(self.group)

  def init(self, params: Any) -> ProjectionDecayState:
    stored = self.anchoring.init(params)
    flat = trees.flatten(params)
    if trees.is_placeholder(params):
      # optax.tree.map_params calls init with a placeholder to learn which parts
      # of the state are like the params. Bare leaves say: these are not.
      return _not_like_params(stored)
    kinds = self.anchoring.kinds(flat)
    layers = self._layers(flat, kinds)
    by_path = zip(flat.paths, flat.leaves, kinds, strict=True)
    constrained = {path: leaf for path, leaf, kind in by_path if kind is not Kind.FREE}
    checks.narrow(constrained)

    def zeros(dtype: Any) -> dict[str, jax.Array]:
      return layers.named(layers.zeros(list(constrained.values()), dtype))

    return ProjectionDecayState(
      count=jnp.zeros([], jnp.int32),
      anchor=stored,
      condition=zeros(jnp.bool_),
      ratio=zeros(jnp.float32),
      distance=zeros(jnp.float32),
      constrained=zeros(jnp.int32),
      rule_state={},
    )

  def _layers(self, params: trees.Flat, kinds: Sequence[Kind]) -> Layers:
    constrained = [kind is not Kind.FREE for kind in kinds]
    return find_layers(params, constrained, self.stack_axis, self.group, self.axis_name)

  def view(self, gradients: Any, state: Any, params: Any) -> tuple[anchors.View, Layers]:
    """The constrained leaves, and their arrangement into layers; checks all arguments."""
    checks.state(state, ProjectionDecayState)
    view = self.anchoring.view(gradients, state.anchor, state.count, params)
    layers = self._layers(view.flat, view.kinds)
    trees.match_shapes(
      {name: steps.shape for name, steps in state.constrained.items()},
      layers.named(layers.shapes),
      'the layers in the optimizer state do not fit `group` and `stack_axis`; '
      'the shapes of their conditions differ:',
    )
    return view, layers

  def sums(
    self, view: anchors.View, layers: Layers, *later: str, **squares: Sequence[jax.Array]
  ) -> dict[str, PerLayer]:
    """⟨g, d⟩ as 'inner', ‖d‖² as 'distance', and the squared norms of `squares` by name.

    Those named in `later` are summed in a loop of their own.
    """
    squares = {'distance': view.deviations(apart(view.params, 'cpu')), **squares}
    if not checks.is_zero(self.margin):
      squares['gradient_norm'] = view.gradients
    products = {key: [_products(x, x) for x in leaves] for key, leaves in squares.items()}
    gradients, params = apart((view.gradients, view.params), 'cpu')
    products['inner'] = [
      _products(g, d) for g, d in zip(gradients, view.deviations(params), strict=True)
    ]
    return layers.sums(products, *later)

  def decide(
    self, state: ProjectionDecayState, layers: Layers, sums: dict[str, PerLayer], rule: Rule
  ) -> list[Decision]:
    """The condition of each layer, and what the form's `rule` makes of it."""

    def one(steps: jax.Array, *values: jax.Array) -> Decision:
      squares = dict(zip(sums, values, strict=True))
      norms = {key: x if key == 'inner' else formulas.norm(x) for key, x in squares.items()}
      condition = self._condition(norms)
      ratio, scale = rule(condition, norms)
      return Decision(
        condition=condition,
        ratio=ratio.astype(jnp.float32),
        distance=norms['distance'].astype(jnp.float32),
        constrained=jnp.where(condition, optax.safe_increment(steps), steps),
        scale=scale,
        # scale == 0 (a schedule at 0, say) must leave every bit alone, also of a NaN or −0;
        # a scale that is not finite comes from norms beyond the range of the dtype.
        active=condition & (scale != 0) & jnp.isfinite(scale),
      )

    steps = [state.constrained[layer_key(name)] for name in layers.names]
    return [one(*values) for values in zip(steps, *sums.values(), strict=True)]

  def _condition(self, norms: Norms) -> jax.Array:
    inner, distance = norms['inner'], norms['distance']
    if 'gradient_norm' not in norms:
      return formulas.turned_back(inner)
    size = norms['gradient_norm']
    condition = (
      formulas.turned_back(inner)
      if checks.is_zero(self.margin)
      else formulas.not_clearly_outward(inner, size, distance, self.margin)
    )
    return condition & formulas.measured(size, distance)

  def next_state(
    self,
    state: ProjectionDecayState,
    view: anchors.View,
    layers: Layers,
    decisions: Sequence[Decision],
  ) -> ProjectionDecayState:
    return ProjectionDecayState(
      count=optax.safe_increment(state.count),
      anchor=self.anchoring.following(view),
      **{name: layers.named([getattr(d, name) for d in decisions]) for name in PER_LAYER},
      rule_state=state.rule_state,
    )


def _products(x: jax.Array, y: jax.Array) -> jax.Array:
  """The elementwise terms of the real inner product Re⟨x, y⟩."""
  if jnp.iscomplexobj(x):
    return x.real * y.real + x.imag * y.imag
  return x * y


def apart(arrays: Any, *platforms: str) -> Any:
  """The arrays, for a use of their own on these platforms; elsewhere the arrays themselves.

  What XLA:CPU computes for two loops (d, say) it writes to a new buffer, whose pages
  cost more than computing it twice; behind a barrier nothing is shared. XLA:TPU on the
  other hand computes an optimizer's step twice, unless a barrier keeps it on the chip.
  XLA:GPU does best without barriers.
  """
  barriers = dict.fromkeys(platforms, _barrier)
  return jax.lax.platform_dependent(arrays, **barriers, default=lambda arrays: arrays)


def _barrier(arrays: Any) -> Any:
  """One barrier for all arrays; in shard_map one for those that vary over the same axes.

  A barrier makes all its results vary over the axes of any.
  """
  leaves, treedef = jax.tree.flatten(arrays)
  groups: dict[Any, list[int]] = {}
  for i, leaf in enumerate(leaves):
    groups.setdefault(_varies_over(leaf), []).append(i)
  for at in groups.values():
    for i, leaf in zip(at, jax.lax.optimization_barrier([leaves[i] for i in at]), strict=True):
      leaves[i] = leaf
  return jax.tree.unflatten(treedef, leaves)


def _varies_over(array: Any) -> Any:
  """The mapped axes of shard_map over which the array is not replicated."""
  kind = jax.typeof(array)
  return kind.vma if hasattr(kind, 'vma') else kind.manual_axis_type.varying  # jax ≥ 0.10


def shift(
  view: anchors.View,
  layers: Layers,
  tree: Any,
  decisions: Sequence[Decision],
  direction: Callable[[jax.Array, jax.Array, Any], jax.Array],
  barriers: Sequence[str],
) -> Any:
  """tree + scale · direction where the layer is held, and the tree's own bits elsewhere.

  `direction` is computed from a leaf of the tree, its param and its anchor. On the
  platforms in `barriers` the leaf is kept apart from the sums that read it, too.
  """
  leaves, treedef = jax.tree.flatten(tree)
  actives = layers.spread([d.active for d in decisions], view.params)
  scales = layers.spread([d.scale for d in decisions], view.params)
  per_leaf = zip(view.at, view.params, view.anchors, actives, scales, strict=True)
  for i, param, anchor, active, scale in per_leaf:
    leaf, active, scale = apart((jnp.asarray(leaves[i]), active, scale), *barriers)
    wide = anchors.wide(leaf)
    shifted = (wide + scale * direction(wide, param, anchor)).astype(leaf.dtype)
    leaves[i] = jnp.where(active, shifted, leaf)
  return jax.tree.unflatten(treedef, leaves)


def _not_like_params(anchor: Any) -> ProjectionDecayState:
  leaf: Any = jnp.zeros([])
  return ProjectionDecayState(leaf, anchor, leaf, leaf, leaf, leaf, leaf)
