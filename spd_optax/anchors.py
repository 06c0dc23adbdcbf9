"""Anchors: from what the user passes to what the state stores, and back.

Per leaf of the params an anchor is *stored* (an array in the state), *zero*
(θ_0 = 0, nothing stored) or *free* (never constrained, nothing stored). In the
state's anchor tree ``optax.MaskedNode()`` stands where nothing is stored.
"""

import dataclasses
import math
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from spd_optax import checks, leafwise, patterns, placement, trees
from spd_optax.patterns import Patterns

Fits = Callable[[jax.typing.DTypeLike, jax.typing.DTypeLike], bool]  # of an anchor and its param


class View(NamedTuple):
  """The constrained leaves of one step, side by side, as they are given."""

  flat: trees.Flat  # all params
  at: list[int]  # where the constrained leaves stand among all
  gradients: list[jax.Array]
  params: list[jax.Array]
  anchors: list[jax.Array | None]  # None is the zero anchor
  stored: optax.Params  # the anchor tree for the next state


@dataclasses.dataclass(frozen=True)
class Anchoring:
  """The anchor as the user gave it; None: the params at the first update."""

  anchor: optax.Params | None
  dtype: jax.typing.DTypeLike | None = None
  memory_kind: str | None = None
  ema: chex.Numeric | None = None
  free: Patterns | None = None

  def __post_init__(self) -> None:
    module = getattr(sys.modules.get('flax.nnx'), 'Module', ())
    for node in jax.tree.leaves(self.anchor, is_leaf=lambda x: isinstance(x, module)):
      if isinstance(node, module):
        found = type(node).__name__
        raise TypeError(f'anchor: found the nnx module {found}; pass nnx.state(model, nnx.Param)')
    if isinstance(self.anchor, optax.GradientTransformation) or checks.is_function(self.anchor):
      raise TypeError(
        f'anchor: expected a tree of arrays, 0 or None, found {checks.kind_of(self.anchor)}; '
        'around an optimizer there is with_projection_decay(optimizer, anchor)'
      )
    if self.dtype is not None and not checks.is_floating(self.dtype):
      found = f'{self.dtype!r:.60}'
      raise TypeError(
        f'anchor_dtype: expected a floating dtype such as jnp.bfloat16, found {found}'
        + checks.STATIC.format('anchor_dtype')
      )
    if not (self.memory_kind is None or str(self.memory_kind) == 'pinned_host'):
      raise ValueError(
        f"anchor_memory_kind: expected 'pinned_host' or None, found {self.memory_kind!r:.60}"
      )
    if self.ema is not None:
      checks.fraction('anchor_ema', self.ema, ', or None')
    if not (self.free is None or patterns.are_patterns(self.free)):
      raise TypeError(
        "free: expected a pattern of paths such as 'head', or a list of patterns, "
        f'found {checks.kind_of(self.free)}'
      )

  def given(self, params: trees.Flat) -> list[Any]:
    """For each leaf of the params None (free), 0 (zero), an array, or its struct (captured).

    Goes by structure alone. Inside shard_map a param is a shard, and the shape of the
    anchor that the user gave says nothing; `init` has checked it.
    """
    is_free = [at is not None for at in patterns.places('free', self.free, params)]
    held = params.without(is_free)  # of the rest the anchor need not speak
    if self.anchor is None:
      values = [jax.ShapeDtypeStruct(jnp.shape(x), checks.dtype_of(x)) for x in held.leaves]
    else:
      values = trees.prefix_values(self.anchor, held, 'anchor')
    by_path = dict(zip(held.paths, values, strict=True))
    each = zip(params.leaves, map(by_path.get, params.paths), strict=True)
    return [
      None if never_held(leaf) else 0 if checks.is_zero(value) else value for leaf, value in each
    ]

  def checked(self, params: trees.Flat, fits: Fits | None = None) -> list[Any]:
    """What is `given`, after a check against the params."""
    values, fits = self.given(params), fits or self._fits
    problems = [
      f'{trees.shown(path)}: {problem}'
      for path, leaf, value in zip(params.paths, params.leaves, values, strict=True)
      if is_stored(value) and (problem := _mismatch(leaf, value, fits))
    ]
    injected = isinstance(self.anchor, jax.Array) and not self.anchor.ndim
    checks.raise_all(
      problems,
      'each leaf of the anchor must be an array like the param, its jax.ShapeDtypeStruct '
      f'(captured), 0, or None (free){checks.STATIC.format("anchor") if injected else ""}:',
    )
    return values

  def _fits(self, dtype: jax.typing.DTypeLike, param: jax.typing.DTypeLike) -> bool:
    return dtype == param or (self.dtype is not None and dtype == self.dtype)

  def init(self, params: optax.Params) -> tuple[trees.Flat, list[int], optax.Params]:
    """The params, where the constrained leaves stand among them, and the anchor tree.

    The anchor tree has copies with the shardings of the params.
    """
    flat = flat_params(params)
    values = self.checked(flat)
    found = [
      placement.copy(leaf if _is_captured(value) else value, leaf, self._store_dtype(leaf))
      if is_stored(value)
      else optax.MaskedNode()
      for value, leaf in zip(values, flat.leaves, strict=True)
    ]
    stored = jax.tree.unflatten(flat.treedef, found)
    if self.ema is not None:
      _check_can_follow(trees.flatten(stored))
    if self.memory_kind is not None and placement.have_pinned_host(jax.tree.leaves(stored)):
      stored = jax.tree.map(placement.on_host, stored)
    return flat, _constrained(values), stored

  def _store_dtype(self, leaf: Any) -> jax.typing.DTypeLike:
    dtype = checks.dtype_of(leaf)
    if self.dtype is None:
      return dtype
    if jnp.issubdtype(dtype, jnp.complexfloating):
      return jnp.promote_types(jnp.complex64, self.dtype)
    return self.dtype

  def view(
    self, gradients: optax.Updates, stored: optax.Params, count: jax.Array, params: optax.Params
  ) -> View:
    """Brings gradients, params and anchors together; checks that they fit."""
    if params is None:
      raise ValueError(
        'the params are compared with their anchor: call update(gradients, state, params)'
      )
    flat = flat_params(params)
    gradient_leaves = trees.leaves_like(gradients, flat, 'gradients')
    values = self.given(flat)
    stored = self._placed(self._captured(stored, flat, values, count))
    by_path = trees.flatten(stored).by_path
    at = _constrained(values)
    found = [by_path.get(flat.paths[i]) for i in at]
    return View(
      flat=flat,
      at=at,
      gradients=[leafwise.like_param(gradient_leaves[i], flat.leaves[i]) for i in at],
      params=[flat.leaves[i] for i in at],
      anchors=[
        None if a is None else placement.explicitly_like(placement.on_device(a), flat.leaves[i])
        for i, a in zip(at, found, strict=True)
      ],
      stored=stored,
    )

  def _placed(self, stored: optax.Params) -> optax.Params:
    """In the host's memory again, after a checkpoint was restored onto the device."""
    device = jax.local_devices()[0]
    if self.memory_kind is None or 'pinned_host' not in placement.memory_kinds(device):
      return stored
    return jax.tree.map(placement.on_host, stored)

  def following(self, view: View) -> optax.Params:
    """The anchor tree for the next state: 1 − β of the way to the params, where asked for.

    It does not follow a param that is not finite: it would never come back.
    """
    if self.ema is None:
      return view.stored
    flat = trees.flatten(view.stored)
    _check_can_follow(flat)
    pairs = zip(view.at, view.params, view.anchors, strict=True)
    ends = {view.flat.paths[i]: (p, a) for i, p, a in pairs}
    moved = [leafwise.followed(*ends[path], self.ema) for path in flat.paths]
    return jax.tree.unflatten(flat.treedef, _cast(flat.leaves, moved))

  def _captured(
    self, stored: optax.Params, params: trees.Flat, values: Sequence[Any], count: jax.Array
  ) -> optax.Params:
    """The anchor in the state, after it was captured where that is asked for.

    The params at the first update replace what `init` saw: many training
    stacks load the pre-trained weights in between.
    """
    flat = trees.flatten(stored)
    given = list(zip(params.paths, params.leaves, values, strict=True))
    trees.match_shapes(
      {path: jnp.shape(a) for path, a in flat.by_path.items()},
      {path: jnp.shape(leaf) for path, leaf, value in given if is_stored(value)},
      'the anchor in the optimizer state does not fit the params; was the state made by another '
      'transformation, for other params, or has its anchor been dropped (put_anchor)?',
    )
    starts = {path: leaf for path, leaf, value in given if _is_captured(value)}
    at = [i for i, path in enumerate(flat.paths) if path in starts]
    if not at:
      return stored
    old, new = [flat.leaves[i] for i in at], [starts[flat.paths[i]] for i in at]
    is_first = count == 0
    if isinstance(is_first, jax.core.Tracer):
      # A conditional leaves the anchor's buffers alone on every later step,
      # where a select would read and write a copy of the model each time.
      taken = jax.lax.cond(is_first, _cast, _first, old, new)
    elif is_first:
      taken = [placement.copy(p, p, a.dtype) for a, p in zip(old, new, strict=True)]
    else:
      return stored
    leaves = dict(enumerate(flat.leaves)) | dict(zip(at, taken, strict=True))
    return jax.tree.unflatten(flat.treedef, leaves.values())


# Functions of the module, because JAX would take those made in each call for new ones.


def _first(old: Sequence[jax.Array], new: Sequence[jax.Array]) -> list[jax.Array]:
  return list(old)


def _cast(old: Sequence[jax.Array], new: Sequence[jax.Array]) -> list[jax.Array]:
  """The new arrays in the dtypes, and in the memory, of the old."""
  cast = [jnp.asarray(x, like.dtype) for like, x in zip(old, new, strict=True)]
  pairs = zip(old, cast, strict=True)
  return [placement.on_host(x) if placement.is_on_host(like) else x for like, x in pairs]


def flat_params(params: optax.Params) -> trees.Flat:
  """The params, taken apart, after a check that they are arrays."""
  if params is None:
    raise TypeError('params: expected a tree of arrays, found None')
  flat = trees.flatten(params)
  checks.arrays('params', flat.by_path)
  return flat


def _check_can_follow(anchor: trees.Flat) -> None:
  """Raises a ValueError that names each array which is too narrow for small steps."""
  narrow = {path: x.dtype for path, x in anchor.by_path.items() if jnp.finfo(x).bits < 32}
  checks.raise_all(
    [f'{trees.shown(path)}: {dtype}' for path, dtype in narrow.items()],
    'anchor_ema: a slowly following anchor needs float32 or wider (anchor_dtype=jnp.float32):',
  )


def _is_captured(value: object) -> bool:
  """Whether a leaf of the anchor stands for the param at the first update."""
  return isinstance(value, jax.ShapeDtypeStruct)


def never_held(leaf: Any) -> bool:
  """Integers have no gradient, and an empty leaf has no weights to hold."""
  return not jnp.issubdtype(checks.dtype_of(leaf), jnp.inexact) or np.size(leaf) == 0


def _constrained(values: Sequence[Any]) -> list[int]:
  """Where the leaves that are not free stand among all."""
  return [i for i, value in enumerate(values) if value is not None]


def is_stored(value: object) -> bool:
  """Whether a value given as an anchor is neither zero nor free."""
  return value is not None and not checks.is_zero(value)


def _mismatch(leaf: Any, value: Any, fits: Fits) -> str | None:
  if isinstance(value, optax.MaskedNode):  # of the anchor in a state
    return 'found MaskedNode; pass 0 if the anchor is zero there, None if the leaf is free'
  problem = None if _is_captured(value) else checks.without_values(value)
  if problem or isinstance(value, bool):
    return f'found {problem or checks.kind_of(value)}'
  number = isinstance(value, int | float | complex)
  both = f'anchor {checks.kind_of(value)}, param {checks.kind_of(leaf)}'
  if jnp.shape(value) != jnp.shape(leaf):
    return both
  # A Python number takes the param's dtype, as everywhere in JAX.
  dtype = jnp.result_type(value, leaf) if number else checks.dtype_of(value)
  if fits(dtype, checks.dtype_of(leaf)):
    return None
  return f'{both}; cast the anchor'


def interpolate(anchor: optax.Params, params: optax.Params, alpha: chex.Numeric) -> optax.Params:
  r"""WiSE-FT: the weights between the anchor and the fine-tuned params.

      (1 − α) θ_0 + α θ

  Args:
    anchor: θ_0, a tree like the params or a prefix of it: arrays of any floating dtype, 0 (zero),
      or None where there is no anchor (θ is kept).
    params: θ, the fine-tuned weights.
    alpha: α; 0 is the anchor, 1 the fine-tuned params, both exactly.

  Returns:
    A tree like `params`, computed in float32 or wider, then cast to the dtypes of `params`.

  Raises:
    ValueError: if anchor and params do not fit; names every such leaf.
    TypeError: if there is no anchor at all.

  References:
    Wortsman et al., `Robust fine-tuning of zero-shot models
    <https://arxiv.org/abs/2109.01903>`_, 2022.

  Example:
    >>> import jax.numpy as jnp
    >>> import spd_optax as spd
    >>> spd.interpolate({'w': jnp.zeros(2)}, {'w': jnp.ones(2)}, 0.5)
    {'w': Array([0.5, 0.5], dtype=float32)}
  """
  if anchor is None or any(map(_is_captured, jax.tree.leaves(anchor))):
    raise TypeError('interpolate(anchor, params, alpha): expected an anchor with values')
  checks.scalar('alpha', alpha, 'a number', math.isfinite)
  flat = flat_params(params)

  def between(start: Any, leaf: Any) -> Any:
    if start is None:
      return leaf
    start = 0.0 if checks.is_zero(start) else leafwise.at_least_float32(start)
    end = leafwise.at_least_float32(leaf)
    mixed = (1 - alpha) * start + alpha * end
    # 0 · ∞ is NaN.
    exact = jnp.where(jnp.equal(alpha, 0), start, jnp.where(jnp.equal(alpha, 1), end, mixed))
    return exact.astype(checks.dtype_of(leaf))

  pairs = zip(Anchoring(anchor).checked(flat, checks.can_replace), flat.leaves, strict=True)
  return jax.tree.unflatten(flat.treedef, [between(start, leaf) for start, leaf in pairs])
