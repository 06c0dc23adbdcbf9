"""Anchors: from what the user passes to what the state stores, and back.

Per leaf of the params an anchor is *stored* (an array in the state), *zero*
(θ_0 = 0, nothing stored) or *free* (never constrained, nothing stored). In the
state's anchor tree ``optax.MaskedNode()`` stands where nothing is stored.
"""

import dataclasses
import enum
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental.shard_alike import shard_alike

from spd_optax import trees


class Kind(enum.Enum):
  """What holds a leaf."""

  STORED = 'an array in the state'
  ZERO = 'zero, not stored'
  FREE = 'nothing'


def real_dtype(dtype: Any) -> Any:
  """The dtype to compute in: float32 or wider, real for complex leaves."""
  return jnp.promote_types(jnp.float32, jnp.finfo(dtype).dtype)


def wide(array: Any) -> jax.Array:
  """The array in float32 or wider (complex64 or wider)."""
  return jnp.asarray(array, jnp.promote_types(jnp.float32, jnp.result_type(array)))


class View(NamedTuple):
  """The constrained leaves of one step, side by side, in float32 or wider."""

  flat: trees.Flat  # all params
  kinds: list[Kind]  # of all params
  at: list[int]  # where the constrained leaves stand among all
  gradients: list[jax.Array]
  params: list[jax.Array]
  anchors: list[jax.Array]  # the scalar 0 where the anchor is zero
  stored: Any  # the anchor tree for the next state

  @property
  def deviations(self) -> list[jax.Array]:
    """d = θ − θ_0."""
    return [p - a for p, a in zip(self.params, self.anchors, strict=True)]


@dataclasses.dataclass(frozen=True)
class Anchoring:
  """The anchor as the user gave it; None: the params at the first update."""

  anchor: Any
  dtype: Any = None

  def __post_init__(self) -> None:
    if isinstance(self.anchor, optax.GradientTransformation) or callable(self.anchor):
      raise TypeError(
        f'anchor: expected a tree of arrays, 0 or None, found {_describe(self.anchor)}. '
        'To constrain an optimizer use with_projection_decay(optimizer, anchor); '
        'projection_decay(anchor) is a link of its own in front of it.'
      )
    if self.dtype is not None and not jnp.issubdtype(self.dtype, jnp.inexact):
      raise TypeError(f'anchor_dtype: expected a floating dtype, found {self.dtype!r}')

  @property
  def captured(self) -> bool:
    """Whether the anchor is the params that training starts from."""
    return self.anchor is None

  def kinds(self, params: trees.Flat) -> list[Kind]:
    """What holds each leaf of the params; raises as `resolve`."""
    return [kind for kind, _ in self.resolve(params)]

  def resolve(self, params: trees.Flat) -> list[tuple[Kind, Any]]:
    """What holds each leaf of the params, and the value given for it.

    Raises:
      ValueError: naming every leaf where anchor and params differ in
        structure, shape or dtype.
    """
    if self.captured:
      kinds = [Kind.FREE if _never_held(leaf) else Kind.STORED for leaf in params.leaves]
      return list(zip(kinds, params.leaves, strict=True))
    values = trees.prefix_values(self.anchor, params, 'anchor')
    problems, found = [], []
    for path, leaf, value in zip(params.paths, params.leaves, values, strict=True):
      kind = _kind(value)
      problem = _mismatch(leaf, value, self.dtype) if kind is Kind.STORED else None
      if problem:
        problems.append(f'{path}: {problem}')
      found.append((Kind.FREE if _never_held(leaf) else kind, value))
    trees.raise_all(
      problems, 'each leaf of the anchor must be an array like the param, 0, or None (free):'
    )
    return found

  def init(self, params: Any) -> Any:
    """The anchor tree for the state: copies with the shardings of the params."""
    flat = trees.flatten(params)
    return jax.tree.unflatten(
      flat.treedef,
      [
        _copy(value, leaf, self._store_dtype(leaf)) if kind is Kind.STORED else optax.MaskedNode()
        for (kind, value), leaf in zip(self.resolve(flat), flat.leaves, strict=True)
      ],
    )

  def _store_dtype(self, leaf: Any) -> Any:
    dtype = jnp.result_type(leaf)
    if self.dtype is None:
      return dtype
    if jnp.issubdtype(dtype, jnp.complexfloating):
      return jnp.promote_types(jnp.complex64, self.dtype)
    return self.dtype

  def view(self, gradients: Any, stored: Any, count: jax.Array, params: Any) -> View:
    """Brings gradients, params and anchors together; checks that they fit.

    Raises:
      ValueError: naming every leaf that does not fit.
    """
    if params is None:
      raise ValueError(
        'the params are compared with their anchor: call update(gradients, state, params)'
      )
    flat = trees.flatten(params)
    gradient_leaves = trees.match_leaves(gradients, flat).leaves
    kinds = self.kinds(flat)
    starts = [p for p, kind in zip(flat.leaves, kinds, strict=True) if kind is Kind.STORED]
    stored = self._captured(stored, starts, count)
    arrays = iter(jax.tree.leaves(stored))
    anchors = [next(arrays) if kind is Kind.STORED else 0 for kind in kinds]
    at = [i for i, kind in enumerate(kinds) if kind is not Kind.FREE]
    return View(
      flat=flat,
      kinds=kinds,
      at=at,
      gradients=[wide(gradient_leaves[i]) for i in at],
      params=[wide(flat.leaves[i]) for i in at],
      anchors=[wide(anchors[i]) for i in at],
      stored=stored,
    )

  def _captured(self, stored: Any, params: Sequence[Any], count: jax.Array) -> Any:
    """The anchor in the state, after it was captured where that is asked for.

    The params at the first update replace what `init` saw: many training
    stacks load the pre-trained weights in between.
    """
    anchors, treedef = jax.tree.flatten(stored)
    if [jnp.shape(a) for a in anchors] != [jnp.shape(p) for p in params]:
      raise ValueError(
        'the anchor in the optimizer state does not fit the params: '
        f'{len(anchors)} arrays in the state, {len(params)} expected. Was the state made by '
        'another transformation, for other params, or has its anchor been dropped?'
      )
    if self.captured and anchors:
      # A conditional leaves the anchor's buffers alone on every later step,
      # where a select would read and write a copy of the model each time.
      anchors = jax.lax.cond(count == 0, lambda a, p: _cast(p, a), lambda a, p: a, anchors, params)
    return jax.tree.unflatten(treedef, anchors)


def _cast(params: Sequence[Any], like: Sequence[jax.Array]) -> list[jax.Array]:
  return [jnp.asarray(p, a.dtype) for p, a in zip(params, like, strict=True)]


def _never_held(leaf: Any) -> bool:
  """Integers have no gradient, and an empty leaf has no weights to hold."""
  return not jnp.issubdtype(jnp.result_type(leaf), jnp.inexact) or np.size(leaf) == 0


def _kind(value: Any) -> Kind:
  if value is None:
    return Kind.FREE
  if isinstance(value, int | float) and not isinstance(value, bool) and value == 0:
    return Kind.ZERO
  return Kind.STORED


def _mismatch(leaf: Any, value: Any, anchor_dtype: Any) -> str | None:
  try:
    shape, dtype = jnp.shape(value), jnp.result_type(value)
  except (TypeError, ValueError):
    return f'found {_describe(value)}'
  if shape != jnp.shape(leaf):
    return f'anchor {_describe(value)}, param {_describe(leaf)}'
  # A Python number takes the param's dtype, as everywhere in JAX.
  if isinstance(value, int | float | complex) or dtype == jnp.result_type(leaf):
    return None
  if anchor_dtype is not None and dtype == anchor_dtype:
    return None
  return (
    f'anchor {_describe(value)}, param {_describe(leaf)}; cast the anchor, '
    'or pass anchor_dtype to store it in another dtype'
  )


def _describe(value: Any) -> str:
  if isinstance(value, optax.GradientTransformation):
    return 'an optax transformation'
  if hasattr(value, 'shape') and hasattr(value, 'dtype'):
    return f'{np.dtype(value.dtype).name}{list(value.shape)}'
  return f'{type(value).__name__} {value!r}'[:80]


def _copy(value: Any, leaf: Any, dtype: Any) -> jax.Array:
  """A new array with the sharding of the param; never an alias of what was passed."""
  if value is leaf:
    return jnp.array(value, dtype, copy=True)
  if isinstance(leaf, jax.core.Tracer):
    # Inside jit the param's sharding is not known yet: ask the compiler for it.
    anchor, _ = shard_alike(jnp.array(value, dtype, copy=True), leaf)
    return jnp.asarray(anchor)
  if not getattr(leaf, 'committed', False):
    return jnp.array(value, dtype, copy=True)
  if not isinstance(value, jax.Array):
    value = np.asarray(value)
  # Straight to the shards: the whole array may not fit on one device.
  placed: jax.Array = jax.device_put(value.astype(dtype), leaf.sharding, may_alias=False)
  return placed
