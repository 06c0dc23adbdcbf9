"""Leaves by patterns of their paths: what they match, and that each maker does what it is told."""

import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

import spd_optax as spd
from spd_optax import patterns

MATCHES = {  # pattern: paths down to which it goes, by path; None is no match
  'head': {
    'head': 'head',
    'head/kernel': 'head',
    'params/head/kernel': 'params/head',
    'a/head/b/head/c': 'a/head',
    'overhead/kernel': None,
    'heads': None,
    'Head': None,
    'a.head': None,
  },
  '/head': {'head/kernel': 'head', 'params/head/kernel': None},
  'head/kernel': {'head/kernel': 'head/kernel', 'a/head/kernel': 'a/head/kernel', 'head/b': None},
  'block_*': {'enc/block_10/k': 'enc/block_10', 'block_/k': 'block_', 'enc/block/k': None},
  'block_?/attention': {'block_1/attention/q': 'block_1/attention', 'block_12/attention/q': None},
  'block_[12]': {'block_2/k': 'block_2', 'block_3/k': None},
  'a*c': {'abc': 'abc', 'a/c': None},
  '*': {'head/kernel': 'head', '': ''},
  'a/*/c': {'a/b/c': 'a/b/c', 'a/c': None, 'a/b/b/c': None},
  'a/**/c': {'a/c/d': 'a/c', 'a/b/b/c/c': 'a/b/b/c', 'c/a': None},
  '/**/c': {'c': 'c', 'a/b/c': 'a/b/c', 'a/cc': None},
  'a/**': {'a/b': 'a', 'b': None},
}


@pytest.mark.parametrize('pattern', MATCHES)
def test_what_a_pattern_matches(pattern):
  """Catches parts of names that match, '*' across a '/', and a place that goes too far."""
  found = {path: patterns.place(pattern, path) for path in MATCHES[pattern]}
  assert found == MATCHES[pattern]


NAMES = st.lists(st.sampled_from(['a', 'b', 'ab', '']), min_size=1, max_size=5).map('/'.join)


@given(NAMES, NAMES)
def test_without_stars_it_is_a_run_of_names(pattern, path):
  """Catches a search that misses a run, or takes one that is none."""
  if pattern.startswith('/') or not pattern.strip('/'):
    return
  assert (patterns.place(pattern, path) is not None) == (f'/{pattern}/' in f'/{path}/')


def params():
  rng = np.random.default_rng(0)

  def normal(*shape):
    return jnp.asarray(rng.normal(size=shape), jnp.float32)

  layers = {'kernel': normal(3, 4, 4), 'bias': normal(3, 4)}
  wide = {'kernel': normal(4, 2, 3), 'bias': normal(4, 2)}
  return {
    'params': {
      'overhead': normal(4),
      'encoder': {'layers': layers, 'wide': wide},
      'head': {'kernel': normal(4, 2), 'bias': normal(2)},
    }
  }


HEAD, BODY = {'head': None}, {'encoder': params()['params']['encoder'], 'overhead': 1.0}
STRUCTS = jax.eval_shape(params)
# Anchors for `free='head'`, each with one that says the same without it.
ANCHORS = {
  'captured': (None, {'params': {**STRUCTS['params'], **HEAD}}),
  'zero': (0, {'params': {'encoder': 0, 'overhead': 0, **HEAD}}),
  'without the head': ({'params': {**BODY, 'overhead': 0}},) * 2,
  'with a head of another shape': (
    {'params': {**BODY, 'overhead': 0, 'head': {'kernel': np.ones((4, 9)), 'bias': np.ones(9)}}},
  )
  * 2,
  'None at the head': ({'params': {**BODY, 'overhead': 0, **HEAD}},) * 2,
}
FREED = {'params': {**BODY, 'overhead': 0, **HEAD}}
MAKERS = {
  'projection_decay': spd.projection_decay,
  'with_projection_decay': lambda *a, **k: spd.with_projection_decay(optax.adam(0.1), *a, **k),
  'adam_spd': lambda *a, **k: spd.adam_spd(0.1, *a, **k),
  'l2_sp': spd.l2_sp,
}
make = MAKERS['adam_spd']  # they share what is told them; `test_free_…` has each of them


def run(tx, start=None):
  """Params and state after three steps; the second goes back."""
  theta = params() if start is None else start
  state = tx.init(theta)
  for sign in (1, -1, 1):
    gradients = jax.tree.map(lambda p, sign=sign: sign * jnp.cos(p), theta)
    updates, state = tx.update(gradients, state, theta)
    theta = optax.apply_updates(theta, updates)
  return theta, state


@pytest.mark.parametrize(
  ('anchor', 'make'),
  [('captured', make) for make in MAKERS.values()] + [(anchor, make) for anchor in ANCHORS][1:],
)
def test_free_is_an_anchor_of_none(anchor, make):
  """Catches an argument that is not handed on, and a free leaf that the anchor must have."""
  with_pattern, without = ANCHORS[anchor]
  if with_pattern is without:
    without = FREED
  found, expected = run(make(with_pattern, free='head')), run(make(without))
  chex.assert_trees_all_equal(found, expected)
  layers = set(optax.tree.get(found[1], 'condition'))
  assert 'params~overhead' in layers
  assert not any('head~' in name for name in layers), layers


def test_several_patterns_free_what_any_matches():
  """Catches a list of which only the first pattern counts, and one that needs all."""
  _, state = run(make(free=['head', '**/layers/bias', 'head/bias']))
  names = {'encoder~layers~kernel', 'encoder~wide~kernel', 'encoder~wide~bias', 'overhead'}
  assert set(optax.tree.get(state, 'condition')) == {f'params~{name}' for name in names}


def test_nothing_is_free_by_an_empty_list():
  """Catches a config's empty list that frees all, or is an error."""
  chex.assert_trees_all_equal(run(make(free=[])), run(make()))


def test_stack_axis_by_patterns():
  """Catches an axis that is lost or given to leaves that do not match."""
  rule = {0: ['layers'], 1: 'encoder/wide'}
  for found in (rule, json.loads(json.dumps(rule))):  # JSON makes strings of the keys
    _, state = run(make(stack_axis=found))
    shapes = {name: np.shape(x) for name, x in optax.tree.get(state, 'condition').items()}
    stacked = {'encoder~layers': (3,), 'encoder~wide': (2,)}
    expected = {f'params~{at}~{x}': n for at, n in stacked.items() for x in ('kernel', 'bias')}
    assert shapes == {
      **expected, 'params~overhead': (), 'params~head~kernel': (), 'params~head~bias': ()
    }  # fmt: skip
  axes = {'params': {'overhead': None, 'encoder': {'layers': 0, 'wide': 1}, 'head': None}}
  chex.assert_trees_all_equal(run(make(stack_axis=rule)), run(make(stack_axis=axes)))


@pytest.mark.parametrize('make', MAKERS.values(), ids=MAKERS)
def test_every_maker_hands_patterns_on(make):
  """Catches a maker without one of the arguments."""
  tx = make(free='overhead', stack_axis={0: 'layers'}, group=['layers', 'head'])
  state = tx.init(params())
  shapes = {name: np.shape(x) for name, x in optax.tree.get(state, 'condition').items()}
  wide = {f'params~encoder~wide~{x}': () for x in ('kernel', 'bias')}
  assert shapes == {'params~encoder~layers': (3,), 'params~head': (), **wide}


def test_a_prefix_tree_is_no_pattern():
  """Catches names of a prefix tree that are looked for deeper in the tree."""
  theta = {'layers': jnp.ones((2, 3)), 'head': {'layers': jnp.ones((2, 3))}}
  _, state = run(make(stack_axis={'layers': 0, 'head': None}), theta)
  shapes = {name: np.shape(x) for name, x in optax.tree.get(state, 'condition').items()}
  assert shapes == {'layers': (2,), 'head~layers': ()}


def test_group_by_patterns():
  """Catches one group for all matches of a pattern, and a later pattern that wins."""
  theta = {
    'enc': {f'block_{i}': {'a': jnp.ones(2), 'mlp': {'k': jnp.ones(3)}} for i in range(2)},
    'head': jnp.ones(2),
  }
  _, state = run(make(group=['mlp', 'block_*']), theta)
  names = {f'enc~block_{i}{end}' for i in range(2) for end in ('', '~mlp')}
  assert set(optax.tree.get(state, 'condition')) == names | {'head'}
  keys = {f'enc/block_{i}/{x}': f'enc/block_{i}{end}' for i in range(2) for x, end in
          (('a', ''), ('mlp/k', '/mlp'))}  # fmt: skip
  chex.assert_trees_all_equal(
    run(make(group=['mlp', 'block_*']), theta), run(make(group=keys.get), theta)
  )


def test_all_three_with_a_report():
  """Catches a report that cannot use the patterns of the transformation."""
  rules = {'stack_axis': {0: 'layers'}, 'group': ['layers', 'head']}
  _, state = run(spd.adam_spd(0.1, free='head/bias', **rules))
  records = {record.name: record for record in spd.layer_report(state, **rules)}
  assert {f'params/encoder/layers[{i}]' for i in range(3)} | {'params/head'} <= set(records)
  for i in range(3):
    layers = params()['params']['encoder']['layers']
    norm = np.sqrt(sum(np.sum(np.square(x[i])) for x in layers.values()))
    record = records[f'params/encoder/layers[{i}]']
    np.testing.assert_allclose(record.relative_distance, record.distance / norm, rtol=1e-6)


WRAPPED = {
  'masked': lambda tx: optax.masked(tx, {'params': dict.fromkeys(params()['params'], True)}),
  'masked, head too': lambda tx: optax.masked(
    tx, {'params': {'overhead': True, 'encoder': True, 'head': False}}
  ),
  'inject_hyperparams': lambda tx: optax.inject_hyperparams(lambda scale: optax.chain(tx))(1.0),
  'MultiSteps': lambda tx: optax.MultiSteps(tx, 1).gradient_transformation(),
}


@pytest.mark.parametrize('wrap', WRAPPED.values(), ids=WRAPPED)
def test_inside_wrappers(wrap):
  """Catches a pattern whose leaves a wrapper hides, and that then matches nothing."""
  _, state = run(wrap(make(free='head', stack_axis={0: 'layers'}, group='encoder/layers')))
  names = set(optax.tree.get(state, 'condition'))
  assert {'params~encoder~layers', 'params~overhead'} <= names
  assert not any('head~' in name for name in names)


def test_map_params():
  """Catches a pattern that must match the placeholder that optax passes as params."""
  tx = spd.adam_spd(0.1, free='head', stack_axis={0: 'layers'}, group='layers')
  state = tx.init(params())
  chex.assert_trees_all_equal(optax.tree.map_params(tx, lambda x: x, state), state)


def test_injected_by_name():
  """Catches strings that inject_hyperparams would have to be told of."""
  tx = optax.inject_hyperparams(spd.adam_spd)(0.1, free='head', group=['layers'])
  expected = run(spd.adam_spd(0.1, free='head', group='layers'))[0]
  chex.assert_trees_all_close(run(tx)[0], expected, rtol=1e-4, atol=1e-5)


def test_paths_of_nnx():
  """Catches patterns that see 'head/kernel/value' at init and 'head/kernel' at update."""

  class Net(nnx.Module):
    def __init__(self, rngs):
      self.body, self.head = nnx.Linear(3, 4, rngs=rngs), nnx.Linear(4, 2, rngs=rngs)

  model = Net(nnx.Rngs(0))
  optimizer = nnx.Optimizer(model, spd.adam_spd(0.1, free='head/kernel'), wrt=nnx.Param)
  loss = nnx.grad(lambda m: jnp.sum(m.head(m.body(jnp.ones((1, 3)))) ** 2))
  optimizer.update(model, loss(model))
  found = optax.tree.get(nnx.state(optimizer), 'condition')
  assert set(found) == {'body~kernel', 'body~bias', 'head~bias'}
