"""The anchor taken out of a state, put back, replaced, and slowly following."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import ADAM, ANCHORS, every_form, loop, make_step, noise, normal
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from orbax.checkpoint import v1 as ocp

import spd_optax as spd

STEPS, STOP = 8, 3


def run(tx, params, state, gradients):
  return loop(jax.jit(make_step(tx)), params, state, gradients)


def some(gradients, steps):
  return jax.tree.map(lambda g: g[steps], gradients)


def in_chain(anchor=None, **options):
  return optax.chain(optax.clip_by_global_norm(1.0), spd.projection_decay(anchor, **options), ADAM)


def twice(anchor=None, **options):
  """Two states with an anchor, each with a part of the params."""
  kinds = {'body': 'projection', 'head': 'uniform'}
  return optax.partition(
    {
      'projection': spd.with_projection_decay(ADAM, anchor, **options),
      'uniform': spd.l2_sp(anchor),
    },
    kinds,
  )


def accumulated(anchor=None, **options):
  return optax.MultiSteps(spd.adam_spd(0.05, anchor, **options), 2)


NESTED = {'chain': in_chain, 'twice': twice, 'accumulated': accumulated}
nested = pytest.mark.parametrize('make', NESTED.values(), ids=NESTED)


NARROW = {'anchor_dtype': jnp.bfloat16}
STOPPED = {  # l2_sp must not differ between its two anchors, so `twice` has no narrow one
  'chain, captured': (in_chain, 'captured', {}),
  'chain, tree, bfloat16': (in_chain, 'tree', NARROW),
  'twice, captured': (twice, 'captured', {}),
  'twice, tree': (twice, 'tree', {}),
  'accumulated, captured, bfloat16': (accumulated, 'captured', NARROW),
  'accumulated, tree': (accumulated, 'tree', {}),
}


@pytest.mark.parametrize(('make', 'anchor', 'options'), STOPPED.values(), ids=STOPPED)
def test_a_run_that_was_stopped_goes_on_bit_for_bit(make, anchor, options, tmp_path):
  """Catches anything that a checkpoint without the anchor loses."""
  start, gradients = normal(0), some(noise(0), slice(STEPS))
  tx = make(ANCHORS[anchor](start), **options)
  pretrained = jax.tree.map(np.asarray, start if anchor == 'captured' else ANCHORS[anchor](start))
  whole = run(tx, start, tx.init(start), gradients)

  params, state = whole[STOP]
  ocp.save(tmp_path / 'run', {'params': params, 'state': spd.drop_anchor(state)})

  abstract = jax.eval_shape(lambda: (start, tx.init(start)))
  slim = jax.eval_shape(spd.drop_anchor, abstract[1])
  loaded = ocp.load(tmp_path / 'run', {'params': abstract[0], 'state': slim})
  resumed = spd.put_anchor(loaded['state'], pretrained)
  chex.assert_trees_all_equal(resumed, state)
  rest = run(tx, loaded['params'], resumed, some(gradients, slice(STOP, None)))
  chex.assert_trees_all_equal(rest[-1], whole[-1])


@nested
def test_no_array_of_the_anchor_is_left(make):
  """Catches a checkpoint with a second copy of the model."""
  params = {'body': {'kernel': jnp.ones((100, 50))}, 'head': jnp.ones((50, 20))}
  state = make().init(params)

  def size(tree):
    return sum(x.nbytes for x in jax.tree.leaves(tree))

  saved = size(state) - size(spd.drop_anchor(state))
  assert size(params) - 100 < saved < size(params)


def test_another_anchor_is_refused():
  """Catches a run that goes on toward other weights, and one error at a time."""
  params = normal(0)
  slim = spd.drop_anchor(in_chain().init(params))
  spd.put_anchor(slim, params | {'more': jnp.ones(2)})
  other = {'body': {'kernel': params['body']['kernel'].at[1, 2].add(1e-6)}}
  with pytest.raises(ValueError, match=r'(?s)not the anchor that was dropped.*body.*head') as error:
    spd.put_anchor(slim, other)
  assert 'reanchor' in str(error.value)


def test_nnx_optimizer():
  """Catches variables around the state's arrays that hide it, or are lost."""
  model = nnx.Linear(3, 4, rngs=nnx.Rngs(0))
  pretrained = jax.tree.map(jnp.copy, nnx.state(model, nnx.Param))
  optimizer = nnx.Optimizer(model, spd.adam_spd(0.1), wrt=nnx.Param)
  loss = nnx.grad(lambda model: jnp.sum(model(jnp.ones((2, 3))) ** 2))
  optimizer.update(model, loss(model))
  before = nnx.to_pure_dict(nnx.state(optimizer))
  optimizer.opt_state = spd.drop_anchor(optimizer.opt_state)
  optimizer.opt_state = spd.put_anchor(optimizer.opt_state, pretrained)
  chex.assert_trees_all_equal(nnx.to_pure_dict(nnx.state(optimizer)), before)
  optimizer.update(model, loss(model))


def anchors_of(state):
  """All arrays of all anchors, by path: where each lies, optax says."""
  found = {}
  for _, anchor in optax.tree.get_all_with_path(state, 'anchor'):
    for at, leaf in jax.tree_util.tree_leaves_with_path(anchor):
      found[jax.tree_util.keystr(at, simple=True, separator='/')] = leaf
  return found


@pytest.mark.parametrize('jitted', [False, True])
@nested
def test_reanchor_moves_the_anchor_alone(make, jitted):
  """Catches an anchor that stays, one that aliases the params, and lost moments."""
  start, gradients = normal(0), some(noise(0), slice(STEPS))
  tx = make(ANCHORS['tree'](start))
  params, state = run(tx, start, tx.init(start), gradients)[STOP]
  reanchor = jax.jit(spd.reanchor) if jitted else spd.reanchor
  moved = reanchor(state, params)
  chex.assert_trees_all_equal_shapes_and_dtypes(moved, state)
  expected = {'body/kernel': params['body']['kernel'], 'head': params['head']}
  chex.assert_trees_all_equal(anchors_of(moved), expected)
  for leaf, param in zip(anchors_of(moved).values(), expected.values(), strict=True):
    assert leaf.unsafe_buffer_pointer() != param.unsafe_buffer_pointer()
  # Back to the old anchor: everything else was left alone.
  chex.assert_trees_all_equal(spd.reanchor(moved, ANCHORS['tree'](start)), state)
  chex.assert_trees_all_equal(reanchor(spd.drop_anchor(state), params), moved)


@pytest.mark.parametrize('shape', [(), (6,), (3, 2), (2, 3, 1), (2, 1)])
def test_reanchor_knows_the_shapes_of_what_was_dropped(shape):
  """Catches params of another model, where no fingerprint can say so."""
  params, other = ({'s': jnp.ones(()), 'w': jnp.ones(at)} for at in ((2, 3), shape))
  tx = spd.adam_spd(1e-3)
  slim = spd.drop_anchor(tx.init(params))
  with pytest.raises(ValueError, match=r'do not fit.*\n  w: .*, in the state float32\[2, 3\], dr'):
    spd.reanchor(slim, other)
  with pytest.raises(ValueError, match=r'(?s)do not fit.* s: .*float32\[\], dr.* w: '):
    spd.reanchor(slim, {'s': jnp.ones(2), 'w': other['w']})
  if len(shape) == 2:  # under jit the lengths are not known yet; the next update knows them
    chex.assert_shape(jax.eval_shape(spd.reanchor, slim, other).projection_decay.anchor['w'], shape)
    moved = jax.jit(spd.reanchor)(slim, other)
    with pytest.raises(ValueError, match='does not fit the params'):
      tx.update(params, moved, params)
  else:
    with pytest.raises(ValueError, match=r"w: .*, in the state float32\['\?', '\?'\], dropped"):
      jax.jit(spd.reanchor)(slim, other)


def test_the_states_of_several_runs():
  """Catches the axis of the runs taken for one of the array."""
  tx, runs = spd.adam_spd(1e-3), {'w': jnp.arange(12.0).reshape(2, 2, 3)}
  state = jax.vmap(tx.init)(runs)
  moved = jax.tree.map(lambda x: x + 1, runs)
  whole, each = spd.drop_anchor(state), jax.vmap(spd.drop_anchor)(state)
  for slim, reanchors in (
    (whole, [spd.reanchor, jax.jit(spd.reanchor)]),
    (each, [spd.reanchor, jax.jit(spd.reanchor), jax.vmap(spd.reanchor)]),
  ):
    for reanchor in reanchors:
      chex.assert_trees_all_equal(reanchor(slim, moved).projection_decay.anchor, moved)


def test_reanchor_keeps_the_sharding_and_the_numbers():
  """Catches NumPy params that land whole on one device."""
  params = sharded({'kernel': jnp.ones((8, 16))}, (4, 2), both_axes)
  state = spd.adam_spd(1e-3).init(params)
  moved = spd.reanchor(state, jax.tree.map(np.asarray, params))
  assert anchors_of(moved)['kernel'].sharding == params['kernel'].sharding


def reference_ema(start, params, beta):
  """θ_0 before each step."""
  anchors, anchor = [], start.astype(np.float64)
  for at in params:
    anchors.append(anchor)
    anchor = beta * anchor + (1 - beta) * at
  return anchors


@pytest.mark.parametrize('anchor', ['captured', 'tree'])
@every_form
def test_a_following_anchor(make, anchor):
  """Catches β and 1 − β swapped, θ after the step, and an anchor that moves before it is used."""
  start, gradients, beta = normal(0), some(noise(0), slice(STEPS)), 0.8
  given = ANCHORS[anchor](start)
  tx = make(given, anchor_ema=beta)
  trail = run(tx, start, tx.init(start), gradients)
  for name in ('body/kernel', 'head'):
    heads = [np.asarray(dict(flat(params))[name]) for params, _ in trail]
    first = heads[0] if given is None else dict(flat(given))[name]
    anchors = reference_ema(first, heads, beta)
    for (_, state), before, theta, after in zip(
      trail[1:], anchors, heads, anchors[1:], strict=False
    ):
      np.testing.assert_allclose(anchors_of(state)[name], after, rtol=1e-5, atol=1e-6)
      distance = np.linalg.norm(theta - before)
      found = optax.tree.get(state, 'distance')[name.replace('/', '~')]
      np.testing.assert_allclose(found, distance, rtol=1e-5, atol=1e-6)


def flat(tree):
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return [(jax.tree_util.keystr(at, simple=True, separator='/'), x) for at, x in leaves]


@every_form
def test_an_anchor_too_coarse_to_follow(make):
  """Catches steps of the anchor that bfloat16 rounds away."""
  tx, params = make(anchor_ema=0.99, anchor_dtype=jnp.bfloat16), normal(0)
  with pytest.raises(ValueError, match=r'(?s)float32 or wider.*body/kernel: bfloat16.*head: bfl'):
    tx.init(params)
  narrow = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
  with pytest.raises(ValueError, match=r'float32 or wider \(anchor_dtype=jnp.float32\)'):
    make(anchor_ema=0.99).init(narrow)
  make(anchor_ema=0.99, anchor_dtype=jnp.float32).init(narrow)


def sharded(tree, shape, spec):
  devices = np.array(jax.devices()[: np.prod(shape)]).reshape(shape)
  mesh = jax.sharding.Mesh(devices, ('data', 'model'))
  return jax.tree.map(lambda x: jax.device_put(x, NamedSharding(mesh, spec(x))), tree)


def both_axes(x):
  return PartitionSpec('data', 'model') if x.ndim == 2 else PartitionSpec('model')


def test_from_a_checkpoint_over_one_mesh_to_another(tmp_path):
  """Catches an anchor, fingerprint or moment that depends on where its shards lie."""
  rng = np.random.default_rng(0)
  pretrained = {'kernel': rng.normal(size=(8, 16)), 'bias': rng.normal(size=16)}
  pretrained = jax.tree.map(lambda x: np.asarray(x, np.float32), pretrained)
  drift = jax.tree.map(lambda x: np.float32(rng.normal(size=(STEPS, *x.shape))), pretrained)
  ocp.save(tmp_path / 'pretrained', pretrained)

  def start(shape):
    like = sharded(jax.tree.map(np.zeros_like, pretrained), shape, both_axes)
    return spd.load_anchor(tmp_path / 'pretrained', like, strict=True)

  tx = in_chain(stack_axis={'kernel': 0, 'bias': None})
  whole = run(tx, pretrained, tx.init(pretrained), drift)
  first = start((4, 2))
  params, state = run(tx, first, tx.init(first), drift)[STOP]
  ocp.save(tmp_path / 'run', {'params': params, 'state': spd.drop_anchor(state)})

  second = start((2, 2))
  slim = spd.drop_anchor(jax.jit(tx.init)(second))
  loaded = ocp.load(tmp_path / 'run', {'params': second, 'state': slim})
  resumed = spd.put_anchor(loaded['state'], second)
  for leaf in (loaded['params']['kernel'], anchors_of(resumed)['kernel']):
    assert leaf.sharding == second['kernel'].sharding
  rest = run(tx, loaded['params'], resumed, some(drift, slice(STOP, None)))
  chex.assert_trees_all_close(rest[-1][0], whole[-1][0], rtol=1e-5, atol=1e-6)
  held = optax.tree.get(rest[-1][1], 'constrained')
  chex.assert_trees_all_equal(held, optax.tree.get(whole[-1][1], 'constrained'))
  assert 0 < np.sum(held['kernel']) < 8 * STEPS
