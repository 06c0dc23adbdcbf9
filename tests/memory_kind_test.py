"""An anchor in the host's memory."""

import chex
import jax
import jax.numpy as jnp
import optax
import pytest
from cases import ANCHORS, every_form, loop, make_step, noise, normal
from host_memory import like_an_accelerator

import spd_optax as spd

STEPS = 6
pytestmark = pytest.mark.skipif(
  jax.__version_info__ < (0, 10, 2), reason='XLA:CPU aborts where such an array is donated'
)


@pytest.fixture(autouse=True)
def host_memory(monkeypatch):
  """Every test but the last has an accelerator."""
  like_an_accelerator(monkeypatch)


def kinds(state):
  return {leaf.sharding.memory_kind for leaf in jax.tree.leaves(optax.tree.get(state, 'anchor'))}


@pytest.mark.parametrize('jit_init', [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize('anchor', ['captured', 'tree', 'free'])
@every_form
def test_it_stays_there_and_changes_no_bit(make, anchor, jit_init):
  """Catches an anchor that a donated, jitted step moves to the device, or loses."""
  states = []
  for options in ({}, {'anchor_memory_kind': 'pinned_host'}):
    tx = make(ANCHORS[anchor](normal(0)), **options)
    params, gradients = normal(0), jax.tree.map(lambda g: g[:STEPS], noise(0))
    state = jax.jit(tx.init)(params) if jit_init else tx.init(params)
    step = jax.jit(make_step(tx), donate_argnums=(0, 1))
    trail = loop(step, params, state, gradients)
    states.append(jax.device_get(trail[-1]))
    assert kinds(trail[-1][1]) == {options.get('anchor_memory_kind', 'device')}
    assert sum(optax.tree.get(trail[-1][1], 'constrained').values()) > 0
  chex.assert_trees_all_equal(*states)


@every_form
def test_a_restored_anchor_goes_back_there(make):
  """Catches a checkpoint that, restored onto the device, keeps its anchor there for good."""
  tx = make(normal(0), anchor_memory_kind='pinned_host')
  state = jax.tree.map(jnp.asarray, jax.device_get(tx.init(normal(0))))
  assert kinds(state) == {'device'}
  step = jax.jit(make_step(tx))
  _, state = step(normal(0), state, jax.tree.map(lambda g: g[0], noise(0)))
  assert kinds(state) == {'pinned_host'}


@every_form
def test_it_is_dropped_and_put_back(make):
  """Catches a checkpoint of a host anchor that cannot be made, and a run that parts from it."""
  tx, params = make(anchor_memory_kind='pinned_host'), normal(0)
  step, gradients = jax.jit(make_step(tx)), jax.tree.map(lambda g: g[:STEPS], noise(0))
  trail = loop(step, params, tx.init(params), gradients)
  now, state = trail[2]
  anchor = optax.tree.get(state, 'anchor')
  assert spd.fingerprint(anchor) == spd.fingerprint(params)
  resumed = spd.put_anchor(jax.jit(spd.drop_anchor)(state), params)
  rest = loop(step, now, resumed, jax.tree.map(lambda g: g[2:], gradients))
  chex.assert_trees_all_equal(jax.device_get(rest[-1]), jax.device_get(trail[-1]))
  assert kinds(rest[-1][1]) == {'pinned_host'}


@every_form
def test_a_state_may_be_donated_alone(make):
  """Catches advice that does not hold: jax pairs arrays by shape unless told where all lie."""
  tx, params = make(anchor_memory_kind='pinned_host'), normal(0)
  gradients, state = jax.tree.map(lambda g: g[0], noise(0)), tx.init(normal(0))
  where = jax.tree.map(lambda x: x.sharding, (params, state, gradients))
  step = jax.jit(make_step(tx), donate_argnums=1, in_shardings=where, out_shardings=where[:2])
  expected = jax.jit(make_step(tx))(params, state, gradients)
  params, state = step(params, state, gradients)
  chex.assert_trees_all_equal((params, state), expected)
  assert kinds(state) == {'pinned_host'}


@every_form
def test_a_backend_without_it_is_named(make, monkeypatch):
  """Catches a crash, or silence, where there is no such memory, as on any CPU."""
  monkeypatch.undo()
  with pytest.warns(UserWarning, match="'pinned_host': cpu device .* has no such memory"):
    state = make(anchor_memory_kind='pinned_host').init(normal(0))
  assert kinds(state) == {'device'}
