"""Fingerprints of anchors: short, and the same wherever and however the arrays are stored.

An element contributes a hash of its bits and its index, and the contributions are
added modulo 2³². Integer sums do not depend on the order of their terms. So a
fingerprint is the same for every sharding and on every backend, is computed where the
array lies, also under jit, and nothing is gathered.
"""

import hashlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from spd_optax import anchors, trees

WORDS = 4  # of 32 bits


def fingerprint(anchor: Any) -> str:
  """A fingerprint of an anchor: 32 hexadecimal digits.

  It depends on the path, shape, dtype and every bit of each array, and on nothing else:
  not on sharding, backend, tree type or the order of the leaves. Leaves that are not stored
  in a state (None, `0`, integers, empty arrays) do not count. It tells anchors apart that
  differ by mistake; it is no defence against somebody who wants two to agree.

  Args:
    anchor: a tree of arrays, as passed to `projection_decay` or found in its state.

  Returns:
    32 hexadecimal digits.

  Raises:
    TypeError: under jit, where there are no values.

  Example:
    >>> import jax.numpy as jnp
    >>> import spd_optax as spd
    >>> spd.fingerprint({'kernel': jnp.ones((2, 3)), 'head': None})
    '8166681abccecf0956171050ebb7c4b0'
  """
  flat = trees.flatten(anchor)
  total = np.zeros(WORDS, np.uint32)
  for path, leaf in zip(flat.paths, flat.leaves, strict=True):
    if isinstance(leaf, jax.core.Tracer):
      raise TypeError('fingerprint(anchor): call it outside jit; it returns a string')
    if anchors.kind(leaf) is anchors.Kind.STORED and not anchors.never_held(leaf):
      total = total + np.asarray(of_leaf(path, leaf))
  return total.astype('>u4').tobytes().hex()


def of_leaf(path: str, array: Any) -> jax.Array:
  """The fingerprint of one array at a path: uint32[4]; also under jit."""
  array = jnp.asarray(array)
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
    for seed in seeds  # one after the other: no array has an axis more than the bits
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
