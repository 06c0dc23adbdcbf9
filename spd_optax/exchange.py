"""The anchor in an optimizer state: taken out, put back, or replaced by another."""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax

from spd_optax import anchors, checks, fingerprints, placement, trees
from spd_optax.engine import is_state
from spd_optax.fingerprints import DroppedLeaf, is_dropped

State = TypeVar('State')


def drop_anchor(opt_state: State) -> State:
  """The optimizer state without its anchor, for a checkpoint without a second copy of the model.

  Change ``save(opt_state)`` to ``save(spd.drop_anchor(opt_state))``. On resuming put the
  pre-trained weights back by `put_anchor`; the run goes on bit for bit. In place of each
  array its fingerprint, dtype and shape are kept (`DroppedLeaf`). The structure to restore into
  is ``jax.eval_shape(spd.drop_anchor, jax.eval_shape(tx.init, params))``.

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
    words = fingerprints.of_leaf(path, leaf)
    zero = words[0] & 0  # on all the leaf's devices, and so is what is made of it
    dimensions = np.array([leaf.ndim, *leaf.shape], np.uint32)
    return DroppedLeaf(words, zero.astype(leaf.dtype), zero + dimensions)

  return _with_anchors('drop_anchor', opt_state, dropped)


def put_anchor(opt_state: State, anchor: optax.Params) -> State:
  """The optimizer state with its anchor again, after `drop_anchor`.

  Args:
    opt_state: a state whose anchor has been dropped.
    anchor: the same anchor: the pre-trained params, or what `load_anchor` gives. It may
      have more leaves than the state asks for. Arrays are copied and keep their sharding. For a
      model over several devices give JAX arrays that lie where they shall, not NumPy's. They
      get the dtype that the anchor had in the state (`anchor_dtype`). An anchor of
      `anchor_memory_kind` goes to the host at the next update.

  Raises:
    ValueError: if its anchor has not been dropped; naming every leaf that the anchor lacks, or
      whose fingerprint is not that of the anchor that was dropped.
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
    same = np.array_equal(fingerprints.of_leaf(path, value), leaf.fingerprint)
    return value if same else f'{trees.shown(path)}: {checks.kind_of(given)} with other values'

  unlike = 'this is not the anchor that was dropped, by fingerprint (reanchor takes another):'
  return _with_anchors('put_anchor', opt_state, put, f'put_anchor(opt_state, anchor): {unlike}')


def reanchor(opt_state: State, params: optax.Params) -> State:
  """The optimizer state with other weights as its anchor: at the boundary of two tasks, say.

  θ_0 becomes a copy of `params` wherever an array of the anchor is stored, or was
  before `drop_anchor`. Zero and free anchors stay. Moments, counters and reports go on.
  May be called under jit, where of a dropped array only the number of its axes is checked.
  Before the first update it has no effect where the anchor is captured (`anchor=None`): that
  update captures.

  Args:
    opt_state: the state of any optimizer with SPD or `l2_sp` in it, at any depth.
    params: the new anchor, a tree like the params. It may have more leaves than are stored.

  Raises:
    ValueError: naming every leaf that `params` lacks, or that has another shape or complex
      numbers; if the state stores no anchor at all.
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
  complex_too = jnp.issubdtype(kind, jnp.inexact) and jnp.issubdtype(dtype, jnp.complexfloating)
  if same and (jnp.issubdtype(kind, jnp.floating) or complex_too):
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
  found = 0
  problems: list[str] = []

  def changed(node: Any) -> Any:
    nonlocal found
    if not is_state(node):
      return node
    found += 1
    flat = trees.flatten(node.anchor, is_dropped)
    leaves = [change(path, leaf) for path, leaf in flat.by_path.items()]
    problems.extend(x for x in leaves if isinstance(x, str))
    return node._replace(anchor=jax.tree.unflatten(flat.treedef, leaves))

  result: State = jax.tree.map(changed, opt_state, is_leaf=is_state)
  if not found:
    kind = checks.kind_of(opt_state)
    raise TypeError(f'{name}: expected the state of an optimizer with SPD in it, found {kind}')
  checks.raise_all(problems, summary)
  return result
