"""Fingerprints agree where anchors do, and only there."""

import chex
import hypothesis
import hypothesis.extra.numpy as arrays
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.core import FrozenDict
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from reference import x64

import spd_optax as spd
from spd_optax import exchange

DTYPES = ['float16', 'bfloat16', 'float32', 'float64', 'complex64', 'float8_e4m3fn']


def python_fingerprint(path, array):
  """The definition, in Python's integers."""
  import hashlib

  def mixed(x):
    x = (x ^ x >> 16) * 0x85EBCA6B % 2**32
    x = (x ^ x >> 13) * 0xC2B2AE35 % 2**32
    return x ^ x >> 16

  described = f'{path} {array.dtype.name} {list(array.shape)}'
  seeds = np.frombuffer(hashlib.sha256(described.encode()).digest()[:16], '<u4').tolist()
  width = min(4, array.dtype.itemsize)
  bits = np.frombuffer(array.tobytes(), f'<u{width}').tolist()
  sums = [
    sum(mixed(mixed(x ^ seed) + mixed(i) & 2**32 - 1) for i, x in enumerate(bits)) for seed in seeds
  ]
  return [mixed(total % 2**32 ^ seed) for total, seed in zip(sums, seeds, strict=True)]


@pytest.mark.parametrize('shape', [(), (7,), (3, 5), (2, 3, 4)])
@pytest.mark.parametrize('dtype', DTYPES)
def test_it_is_what_its_definition_says(dtype, shape):
  """Catches an index or a part of an element that does not count, on any dtype."""
  with x64():
    array = np.asarray(jnp.asarray(np.random.default_rng(0).normal(size=shape), dtype))
    found = exchange.of_leaf('a/b', array)
  assert found.tolist() == python_fingerprint('a/b', array)


def anchor():
  rng = np.random.default_rng(0)
  return {
    'body': [np.float32(rng.normal(size=(8, 16))), np.float32(rng.normal(size=16))],
    'head': np.float32(rng.normal(size=(16, 8))),
  }


def test_known_value():
  """Catches a change of definition, which would refuse every old checkpoint."""
  fixed = {'a': np.arange(6, dtype=np.float32).reshape(2, 3), 'b': np.ones(2, jnp.bfloat16)}
  total = [python_fingerprint('a', fixed['a']), python_fingerprint('b', fixed['b'])]
  words = [sum(column) % 2**32 for column in zip(*total, strict=True)]
  assert spd.fingerprint(fixed) == ''.join(f'{word:08x}' for word in words)
  assert spd.fingerprint(fixed) == 'cf51a7da9b739e095223241e9160e63d'


@pytest.mark.parametrize('axis_type', [AxisType.Auto, AxisType.Explicit])
def test_where_and_how_it_is_stored_does_not_count(axis_type):
  """Catches a fingerprint that changes with the mesh, the tree's type, or under jit."""
  expected = spd.fingerprint(anchor())
  mesh = jax.make_mesh((4, 2), ('x', 'y'), axis_types=(axis_type,) * 2)
  for spec in (PartitionSpec('x'), PartitionSpec('y'), PartitionSpec()):
    sharded = jax.device_put(anchor(), NamedSharding(mesh, spec))
    assert spd.fingerprint(sharded) == expected
  frozen = FrozenDict(
    jax.tree.map(jnp.asarray, anchor()) | {'new': None, 'zero': 0, 'n': np.arange(3)}
  )
  assert spd.fingerprint(frozen) == expected
  state = spd.adam_spd(1e-3).init(anchor())
  assert spd.fingerprint(optax.tree.get(state, 'anchor')) == expected
  leaf = jnp.asarray(anchor()['head'])
  jitted = jax.jit(lambda x: exchange.of_leaf('head', x))(leaf)
  chex.assert_trees_all_equal(jitted, exchange.of_leaf('head', leaf))
  with pytest.raises(TypeError, match='traced'):
    jax.jit(spd.fingerprint)(anchor())  # it is a string


def changed(name):
  tree = anchor()
  match name:
    case 'one bit':
      tree['head'].view(np.uint32)[3, 4] ^= 1
    case 'sign of zero':
      tree['head'][0, 0] = 0.0
      tree, other = tree, jax.tree.map(np.copy, tree)
      other['head'][0, 0] = -0.0
      assert spd.fingerprint(tree) != spd.fingerprint(other)
    case 'two elements swapped':
      tree['head'][[0, 1]] = tree['head'][[1, 0]]
    case 'shape':
      tree['head'] = tree['head'].reshape(8, 16)
    case 'path':
      tree['tail'] = tree.pop('head')
    case 'dtype':
      tree['head'] = tree['head'].astype(jnp.bfloat16)
    case 'leaf left out':
      tree['head'] = None
    case 'leaves swapped':
      tree['body'] = [tree['head'].reshape(8, 16), tree['body'][1]]
      tree['head'] = anchor()['body'][0].reshape(16, 8)
  return tree


@pytest.mark.parametrize(
  'name',
  [
    'one bit',
    'sign of zero',
    'two elements swapped',
    'shape',
    'path',
    'dtype',
    'leaf left out',
    'leaves swapped',
  ],
)
def test_everything_else_counts(name):
  """Catches two different anchors with one fingerprint."""
  assert spd.fingerprint(changed(name)) != spd.fingerprint(anchor())


@hypothesis.given(arrays.arrays(np.uint32, (4,)), st.integers(0, 3), st.integers(0, 31))
def test_every_bit_counts_in_every_word(values, at, bit):
  """Catches words that repeat each other, and bits that are shifted out."""
  other = values.copy()
  other[at] ^= np.uint32(1 << bit)
  found = [exchange.of_leaf('', x.view(np.float32)) for x in (values, other)]
  assert (np.asarray(found[0]) != np.asarray(found[1])).all()


def test_a_dropped_anchor_has_its_fingerprint_still():
  """Catches a slim checkpoint that cannot say which anchor it needs."""
  state = spd.adam_spd(1e-3).init(anchor())
  slim = spd.drop_anchor(state)
  assert spd.fingerprint(optax.tree.get(slim, 'anchor')) == spd.fingerprint(anchor())
