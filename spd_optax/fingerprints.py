"""Fingerprints of anchors: short, and the same wherever and however the arrays are stored.

Each element contributes a hash of its bits and its index. The contributions are added modulo
2³², and integer sums do not depend on the order of their terms. So a fingerprint is the same for
every sharding and on every backend. It is computed where the array lies, and nothing is gathered.
"""

import hashlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from spd_optax import anchors, checks, placement, trees
from spd_optax.engine import is_state

WORDS = 4  # of 32 bits


def fingerprint(anchor: optax.Params) -> str:
  """A fingerprint of an anchor: 32 hexadecimal digits.

  It depends on the path, shape, dtype and every bit of each array, and on nothing else:
  not on sharding, backend, tree type or the order of the leaves. Leaves that are not stored
  in a state (None, `0`, integers, empty arrays) do not count. Without 64-bit mode float64
  counts as the float32 that JAX makes of it. It is no defence against somebody who wants two
  anchors to agree.

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
  if any(map(is_state, jax.tree.leaves(anchor, is_leaf=is_state))):
    raise TypeError(
      "fingerprint(anchor): of an optimizer state give optax.tree.get(state, 'anchor')"
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


class DroppedLeaf(NamedTuple):
  """What stands in a state for an array of the anchor that was dropped.

  Attributes:
    fingerprint: uint32[4], see `fingerprint`.
    zero: a 0 of the array's dtype.
    dimensions: uint32[1 + n], their number n and the length of each. (Not the lengths alone, for
      Orbax saves no empty array.)
  """

  fingerprint: jax.Array
  zero: jax.Array
  dimensions: jax.Array


def is_dropped(node: Any) -> bool:
  """Whether this node of an anchor in a state was dropped."""
  return isinstance(node, DroppedLeaf)


def of_leaf(path: str, array: Any) -> jax.Array:
  """The fingerprint of one array at a path: uint32[4]; also under jit."""
  array = placement.on_device(jnp.asarray(array))
  described = f'{path} {array.dtype.name} {list(array.shape)}'.encode()
  seeds = np.frombuffer(hashlib.sha256(described).digest(), '<u4')[:WORDS]
  words: jax.Array = _hash(array, jnp.asarray(seeds))
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
