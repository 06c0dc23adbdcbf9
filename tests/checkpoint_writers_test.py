"""The optimizer state through writers of checkpoints that join paths: it comes back bit for bit."""

import functools
import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as old
import pytest
import tensorstore
from flax import serialization
from orbax.checkpoint import v1 as ocp
from safetensors.flax import load_file, save_file

import spd_optax as spd


def normal(*shape):
  return jnp.asarray(np.random.default_rng(sum(shape)).normal(size=shape), jnp.float32)


def nested():
  blocks = [{'kernel': normal(3, 4), 'bias': normal(4)} for _ in range(2)]
  return {'encoder': {'blocks': blocks, 'scale': normal()}, 'head': (normal(4, 2),)}


def tilde():
  """Keys as Haiku has them, but for its '/'."""
  return {'mlp~linear_0': {'w': normal(3, 4), 'b~0': normal(4)}, '~': {'~~': normal(2)}}


def stacked():
  layers = {'kernel': normal(3, 4, 4), 'bias': normal(3, 4)}
  return {'decoder': {'layers': layers}, 'head': normal(4, 2)}


STACKED = {'stack_axis': {'decoder': 0, 'head': None}}
MODELS = {
  'nested': (nested, {}),
  'tilde, in bfloat16': (tilde, {'anchor_dtype': jnp.bfloat16}),
  'free and zero': (nested, {'anchor': {'encoder': {'blocks': 0, 'scale': 1.0}, 'head': None}}),
  'stacked': (stacked, STACKED),
  'with a budget': (nested, {'strength': spd.within_distance(0.05, init=2.0)}),
  'stacked and grouped': (stacked, {**STACKED, 'group': lambda path: path.rpartition('/')[0]}),
}


def orbax(use_ocdbt):
  def through(path, state, target):
    with old.Checkpointer(old.PyTreeCheckpointHandler(use_ocdbt=use_ocdbt)) as checkpointer:
      checkpointer.save(path, args=old.args.PyTreeSave(state))
      found = checkpointer.restore(path, args=old.args.PyTreeRestore(target))
      return found, checkpointer.restore(path)

  return through


def orbax_v1(path, state, target):
  ocp.save(path, state)
  return ocp.load(path, target), ocp.load(path)


def msgpack(path, state, target):
  path.write_bytes(serialization.to_bytes(state))
  content = path.read_bytes()
  return serialization.from_bytes(target, content), serialization.msgpack_restore(content)


def nested_again(flat, separator):
  """What a reader makes of joined names that knows nothing but the separator."""
  tree = {}
  for name, leaf in flat.items():
    node = tree
    *above, last = name.split(separator)
    for key in above:
      node = node.setdefault(key, {})
    assert last not in node, name
    node[last] = leaf
  return tree


def in_tensorstore(flat, path):
  """An array in each directory, and an index of them by path."""
  path.mkdir()
  (path / 'index.json').write_text(json.dumps(list(flat)))
  for name, x in flat.items():
    store = {'driver': 'file', 'path': str(path / name)}
    spec = {'driver': 'zarr', 'kvstore': store, 'dtype': x.dtype.name, 'create': True}
    tensorstore.open({**spec, 'metadata': {'shape': x.shape}}).result()[...] = np.asarray(x)


def from_tensorstore(path):
  def read(name):
    spec = {'driver': 'zarr', 'kvstore': {'driver': 'file', 'path': str(path / name)}}
    return jnp.asarray(tensorstore.open(spec).result().read().result())

  return {name: read(name) for name in json.loads((path / 'index.json').read_text())}


def joined(separator, save=save_file, load=load_file):
  def through(path, state, target):
    def name(at):
      return jax.tree_util.keystr(at, simple=True, separator=separator)

    def found(at, leaf):
      node = tree
      for key in at:
        node = node[name((key,))]
      return node

    save({name(at): jnp.asarray(x) for at, x in jax.tree.leaves_with_path(state)}, path)
    tree = nested_again(load(path), separator)
    return jax.tree.map_with_path(found, target), tree

  return through


WRITERS = {
  'orbax': orbax(use_ocdbt=True),
  'orbax without OCDBT': orbax(use_ocdbt=False),
  'orbax v1': orbax_v1,
  'msgpack': msgpack,
  'safetensors, /': joined('/'),
  'safetensors, .': joined('.'),
  'tensorstore': joined('/', in_tensorstore, from_tensorstore),
}


def bits(tree):
  return [(x.dtype.name, x.shape, np.asarray(x).tobytes()) for x in jax.tree.leaves(tree)]


@functools.cache
def stepped(model):
  """Params and state after two steps, with and against the anchor."""
  make, options = MODELS[model]
  params = make()
  tx = optax.chain(optax.clip_by_global_norm(1.0), spd.adam_spd(0.1, **options))
  update, state = jax.jit(tx.update), tx.init(params)
  for sign in (1, -1):
    gradients = jax.tree.map(lambda p, sign=sign: sign * jnp.cos(p), params)
    updates, state = update(gradients, state, params)
    params = optax.apply_updates(params, updates)
  return params, state


def layers(tree):
  """The names of the layers in what a reader makes of a state without a structure to fill."""
  if hasattr(tree, 'keys'):
    found = [set(tree['condition'])] if 'condition' in tree else map(layers, tree.values())
  else:
    found = map(layers, tree) if isinstance(tree, list | tuple) else []
  return set().union(*found)


# Every writer for names that it may take apart; for the other models one that joins them by '.'
# and one that nests them.
NAMED = ('tilde, in bfloat16', 'stacked and grouped', 'with a budget')
PAIRS = [
  (model, writer)
  for model in MODELS
  for writer in WRITERS
  if model in NAMED or writer in ('safetensors, .', 'orbax v1')
]


@pytest.mark.parametrize(('model', 'writer'), PAIRS)
def test_the_state_comes_back_bit_for_bit(model, writer, tmp_path):
  """Catches keys that a writer takes apart or cuts, and arrays that a format cannot hold."""
  params, state = stepped(model)
  saved = [state, spd.drop_anchor(state)]
  target = jax.tree.map(jnp.zeros_like, saved)
  found, untyped = WRITERS[writer](tmp_path / 'saved', saved, target)
  chex.assert_trees_all_equal_structs(found, saved)
  assert bits(found) == bits(saved)
  names = set(optax.tree.get(state, 'condition'))
  budget = optax.tree.get(found[0], 'budget_state')
  assert isinstance(budget, spd.BudgetState) == (model == 'with a budget')
  assert layers(untyped) == names
  assert not [name for name in names if '/' in name or '.' in name]
  whole, dropped = (spd.reanchor(each, params) for each in found)
  chex.assert_trees_all_equal(whole, dropped)
