"""The anchor in an optimizer state: taken out, put back, or replaced by another; fingerprints."""

import hashlib
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from spd_optax import anchors, checks, placement, trees
from spd_optax.engine import is_state, states_of

State = TypeVar('State')


class DroppedLeaf(NamedTuple):
  """The placeholder in a state for an array of the anchor that was dropped.

  Attributes:
    fingerprint: uint32[4], see `fingerprint`.
    zero: a 0 of the array's dtype.
    dimensions: uint32[1 + n], the number n of axes and the length of each. (Orbax saves no empty
      array, so n is there.)
  """

  fingerprint: jax.Array
  zero: jax.Array
  dimensions: jax.Array


def is_dropped(node: object) -> bool:
  """Whether this node of an anchor in a state was dropped."""
  return isinstance(node, DroppedLeaf)


def drop_anchor(opt_state: State) -> State:
  """The optimizer state without its anchor, for a checkpoint without a second copy of the model.

  Change ``save(opt_state)`` to ``save(spd.drop_anchor(opt_state))``. To resume, put the pre-trained
  weights back with `put_anchor`. The run then continues bit for bit. A `DroppedLeaf` replaces each
  array and keeps its fingerprint, dtype and shape. The structure to restore into is
  ``jax.eval_shape(spd.drop_anchor, jax.eval_shape(tx.init, params))``.

  Args:
    opt_state: the state of any optimizer with SPD or `l2_sp` in it, at any depth.

  Raises:
    TypeError: if there is no such state.
    ValueError: if its anchor has been dropped already.

  Example:
    >>> import jax.numpy as jnp
    >>> import spd_optax as spd
    >>> pretrained = {'kernel': jnp.ones((2, 3))}
    >>> state = spd.adam_spd(1e-3).init(pretrained)
    >>> slim = spd.drop_anchor(state)
    >>> state = spd.put_anchor(slim, pretrained)
  """

  def dropped(path: str, leaf: Any) -> DroppedLeaf:
    if is_dropped(leaf):
      raise ValueError('drop_anchor(opt_state): its anchor has been dropped already')
    words = of_leaf(path, leaf)
    zero = words[0] & 0  # on all the leaf's devices, and so is what is made of it
    dimensions = np.array([leaf.ndim, *leaf.shape], np.uint32)
    return DroppedLeaf(words, zero.astype(leaf.dtype), zero + dimensions)

  return _with_anchors('drop_anchor', opt_state, dropped)


def put_anchor(opt_state: State, anchor: optax.Params) -> State:
  """The optimizer state with its anchor put back, after `drop_anchor`.

  Args:
    opt_state: a state whose anchor has been dropped.
    anchor: the same anchor: the pre-trained params, or what `load_anchor` gives. It may have more
      leaves than the state needs. Arrays are copied and keep their sharding, so for a model on
      several devices pass JAX arrays, not NumPy arrays. They get the dtype that the anchor had in
      the state. With `anchor_memory_kind` the anchor moves to the host at the next update.

  Raises:
    ValueError: if the anchor of the state has not been dropped; if `anchor` lacks a leaf, or a leaf
      has another fingerprint than the dropped leaf. The message names every such leaf.
    TypeError: if there is no state of SPD or `l2_sp`; under jit.
  """
  leaves = trees.flatten(anchor).by_path
  checks.arrays('put_anchor(opt_state, anchor): anchor', leaves)
  given = jax.tree.leaves((opt_state, anchor))
  if any(isinstance(x, jax.core.Tracer | jax.ShapeDtypeStruct) for x in given):
    raise TypeError('put_anchor(opt_state, anchor): call it outside jit, with a state of values')

  def put(path: str, leaf: Any) -> Any:
    if not is_dropped(leaf):
      raise ValueError('put_anchor(opt_state, anchor): the state has an anchor; see reanchor')
    given = leaves.get(path)
    if problem := _problem(path, given, leaf):
      return problem
    value = placement.copy(given, given, leaf.zero.dtype)
    same = np.array_equal(of_leaf(path, value), leaf.fingerprint)
    return value if same else f'{trees.shown(path)}: {checks.kind_of(given)} with other values'

  unlike = 'this is not the anchor that was dropped, by fingerprint (reanchor takes another):'
  return _with_anchors('put_anchor', opt_state, put, f'put_anchor(opt_state, anchor): {unlike}')


def reanchor(opt_state: State, params: optax.Params) -> State:
  """The optimizer state with other weights as its anchor, as between two tasks.

  θ_0 becomes a copy of `params` wherever an array of the anchor is stored, or was
  before `drop_anchor`. Zero and free anchors stay. Moments, counters and reports continue. It may
  be called under jit. There, only the number of axes of a dropped array is checked. If the anchor
  is captured (`anchor=None`), it has no effect before the first update: that update captures the
  params.

  Args:
    opt_state: the state of any optimizer with SPD or `l2_sp` in it, at any depth.
    params: the new anchor, a tree like the params. It may have more leaves than are stored.

  Raises:
    ValueError: if `params` lacks a leaf, or a leaf has another shape or complex numbers (the
      message names every such leaf); if the state stores no anchor at all.
    TypeError: if there is no state of SPD or `l2_sp`.

  Example:
    >>> import jax.numpy as jnp, optax
    >>> import spd_optax as spd
    >>> params = {'kernel': jnp.zeros(3)}
    >>> tx = spd.adam_spd(1e-3)
    >>> _, state = tx.update({'kernel': jnp.ones(3)}, tx.init(params), params)
    >>> state = spd.reanchor(state, {'kernel': jnp.ones(3)})
    >>> optax.tree.get(state, 'anchor')
    {'kernel': Array([1., 1., 1.], dtype=float32)}
  """
  leaves = anchors.flat_params(params).by_path
  stored = 0

  def replaced(path: str, leaf: Any) -> Any:
    nonlocal stored
    stored += 1
    new = leaves.get(path)
    if problem := _problem(path, new, leaf):
      return problem
    if is_dropped(leaf):
      return placement.copy(new, new, leaf.zero.dtype)
    # An array that was put somewhere on purpose keeps its own sharding.
    own = isinstance(new, jax.core.Tracer) or getattr(new, 'committed', False)
    array = placement.copy(new, new if own else leaf, leaf.dtype)
    return placement.on_host(array) if placement.is_on_host(leaf) else array

  unlike = 'reanchor(opt_state, params): the params do not fit the anchor:'
  found = _with_anchors('reanchor', opt_state, replaced, unlike)
  if not stored:
    raise ValueError('reanchor(opt_state, params): the state stores no anchor, only zero or free')
  return found


def _problem(path: str, new: Any, old: Any) -> str | None:
  """Why an array cannot take the place of one in the anchor; None where it can."""
  dropped = is_dropped(old)
  dtype, shape = (old.zero.dtype, _lengths(old)) if dropped else (old.dtype, old.shape)
  was = f'in the state {dtype}{list(shape)}{", dropped" * dropped}'
  if new is None:
    return f'{trees.shown(path)}: nothing, {was}'
  kind, here = jnp.result_type(new), jnp.shape(new)
  same = len(here) == len(shape) and all(b in (a, '?') for a, b in zip(here, shape, strict=True))
  if same and checks.can_replace(kind, dtype):
    return None
  return f'{trees.shown(path)}: {checks.kind_of(new)}, {was}'


def _lengths(leaf: DroppedLeaf) -> tuple[int | str, ...]:
  """The shape of the array that was dropped; without values, as under jit, '?' for each axis."""
  count = leaf.dimensions.shape[-1] - 1
  unknown = isinstance(leaf.dimensions, jax.core.Tracer | jax.ShapeDtypeStruct)
  own = ['?'] * count if unknown else np.ravel(leaf.dimensions)[1 : count + 1].tolist()
  return (*leaf.zero.shape, *own)  # the zero has the axes of vmap


def _with_anchors(
  name: str, opt_state: State, change: Callable[[str, Any], Any], summary: str = ''
) -> State:
  """The state with every array of every anchor in it changed; `change` may return a problem."""
  states_of(opt_state, name)
  problems: list[str] = []

  def changed(node: Any) -> Any:
    if not is_state(node):
      return node
    flat = trees.flatten(node.anchor, is_dropped)
    leaves = [change(path, leaf) for path, leaf in flat.by_path.items()]
    problems.extend(x for x in leaves if isinstance(x, str))
    return node._replace(anchor=jax.tree.unflatten(flat.treedef, leaves))

  result: State = jax.tree.map(changed, opt_state, is_leaf=is_state)
  checks.raise_all(problems, summary)
  return result


# Each element contributes a hash of its bits and its index. The contributions are added modulo
# 2³², and integer sums do not depend on the order of their terms. So a fingerprint is the same for
# every sharding and on every backend. It is computed where the array lies, and nothing is gathered.

WORDS = 4  # of 32 bits


def fingerprint(anchor: optax.Params) -> str:
  """A fingerprint of an anchor: 32 hexadecimal digits.

  It depends on the path, shape, dtype and every bit of each array, and on nothing else:
  not on sharding, backend, tree type or the order of the leaves. Leaves that are not stored
  in a state (None, `0`, integers, empty arrays) do not count. Without 64-bit mode float64 counts as
  float32, as JAX converts it. It does not stop somebody from making two anchors with one
  fingerprint on purpose.

  Args:
    anchor: a tree of arrays, as passed to `projection_decay` or found in its state, where it
      may have been dropped.

  Raises:
    TypeError: under jit, where there are no values, and for a leaf that is no array.

  Example:
    >>> import jax.numpy as jnp
    >>> import spd_optax as spd
    >>> spd.fingerprint({'kernel': jnp.ones((2, 3)), 'head': None})
    '8166681abccecf0956171050ebb7c4b0'
  """
  if anchor is None or any(map(is_state, jax.tree.leaves(anchor, is_leaf=is_state))):
    raise TypeError(
      "fingerprint(anchor): expected arrays; of a state give optax.tree.get(state, 'anchor')"
    )
  return as_text(words_of(anchor))


def words_of(anchor: optax.Params) -> np.ndarray:
  """The fingerprint of an anchor as uint32[4]; those of anchors of other leaves may be added."""
  leaves = trees.flatten(anchor, is_dropped).by_path
  dropped = {path: x.fingerprint for path, x in leaves.items() if is_dropped(x)}
  checks.arrays('fingerprint(anchor)', leaves | dropped)
  words = np.zeros(WORDS, np.uint32)
  for path, leaf in leaves.items():
    if path in dropped:
      words += np.asarray(dropped[path])
    elif anchors.is_stored(leaf) and not anchors.never_held(leaf):
      words += np.asarray(of_leaf(path, leaf))
  return words


def as_text(words: np.ndarray) -> str:
  """32 hexadecimal digits."""
  return words.astype('>u4').tobytes().hex()


def of_leaf(path: str, array: Any) -> jax.Array:
  """The fingerprint of one array at a path: uint32[4]; also under jit."""
  array = placement.on_device(jnp.asarray(array))
  described = f'{path} {array.dtype.name} {list(array.shape)}'.encode()
  seeds = np.frombuffer(hashlib.sha256(described).digest(), '<u4')[:WORDS]
  words: jax.Array = _hash(array, jax.device_put(seeds))
  return words


@jax.jit
def _hash(array: jax.Array, seeds: jax.Array) -> jax.Array:
  bits = _bits(array)
  position = _mixed(_positions(bits.shape))
  sums = [
    jnp.sum(_mixed(_mixed(bits ^ seed) + position), dtype=jnp.uint32)
    for seed in seeds  # one after the other: TPU and CUDA then need no temporaries
  ]
  return _mixed(jnp.stack(sums) ^ seeds)


def _bits(array: jax.Array) -> jax.Array:
  """The bits as uint32, in an array of the same shape or with one more axis."""
  if jnp.iscomplexobj(array):
    array = jnp.stack([array.real, array.imag], -1)
  width = jnp.dtype(array.dtype).itemsize
  unsigned = {1: jnp.uint8, 2: jnp.uint16}.get(width, jnp.uint32)
  return lax.bitcast_convert_type(array, unsigned).astype(jnp.uint32)


def _positions(shape: tuple[int, ...]) -> jax.Array:
  """The row-major index of each element, modulo 2³²."""
  at = jnp.zeros(shape, jnp.uint32)
  stride = 1
  for axis in reversed(range(len(shape))):
    at = at + lax.broadcasted_iota(jnp.uint32, shape, axis) * np.uint32(stride % 2**32)
    stride *= shape[axis]
  return at


def _mixed(x: jax.Array) -> jax.Array:
  """MurmurHash3's finalizer (Appleby): every bit of x changes half the bits of the result."""
  x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
  x = (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)
  return x ^ (x >> 16)
