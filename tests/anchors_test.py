"""Anchors: copied, captured at the first update, stored in the state, and never changed."""

from typing import Any

import chex
import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import aligned
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import spd_optax as spd

MAKERS = {
  'projection_decay': spd.projection_decay,
  'with_projection_decay': lambda *args, **kw: spd.with_projection_decay(
    optax.sgd(0.1, momentum=0.9), *args, **kw
  ),
  'l2_sp': spd.l2_sp,
}
EACH = pytest.mark.parametrize('make', MAKERS.values(), ids=MAKERS)


def random(seed: int, shape: Any = (3, 4)) -> dict[str, jax.Array]:
  rng = np.random.default_rng(seed)
  return {name: jnp.asarray(rng.standard_normal(shape), jnp.float32) for name in 'ab'}


def anchor_of(state: Any) -> Any:
  return optax.tree.get(state, 'anchor')


@EACH
@pytest.mark.parametrize('committed', [True, False])
def test_a_numpy_anchor_is_copied(make: Any, committed: bool) -> None:
  """Catches an anchor that moves when the caller reuses the checkpoint's buffer."""
  anchor = {'w': aligned((64, 64))}
  params = {'w': jnp.zeros((64, 64))}
  if committed:
    params = jax.device_put(params, jax.devices()[0])
  state = make(anchor).init(params)
  anchor['w'][:] = 7.0
  chex.assert_trees_all_equal(anchor_of(state), {'w': np.ones((64, 64), np.float32)})


@EACH
@pytest.mark.parametrize('committed', [True, False])
def test_a_jax_anchor_is_copied(make: Any, committed: bool) -> None:
  """Catches a `device_put` that hands the caller's own buffers over: they may be deleted."""
  anchor, params = random(0), random(1)
  if committed:
    anchor, params = jax.device_put((anchor, params), jax.devices()[0])
  state = make(anchor).init(params)
  for leaf in anchor.values():
    leaf.delete()
  chex.assert_trees_all_equal(anchor_of(state), random(0))


@pytest.mark.eight_devices
@EACH
def test_an_anchor_on_another_device_comes_to_the_params(make: Any) -> None:
  """Catches a step that goes where the anchor was loaded: from the GPU to the CPU, say."""
  params = random(1)
  tx = make(jax.device_put(random(0), jax.devices()[3]))
  updates, state = jax.jit(tx.update)(params, tx.init(params), params)
  here = {frozenset(x.devices()) for x in jax.tree.leaves((updates, state))}
  assert here == {frozenset(jax.devices()[:1])}
  chex.assert_trees_all_equal(anchor_of(state), random(0))


@EACH
@pytest.mark.parametrize('given', [True, False])
@pytest.mark.parametrize('committed', [True, False])
def test_an_anchor_shares_no_buffer_with_the_params(
  make: Any, given: bool, committed: bool
) -> None:
  """Catches "Attempt to donate the same buffer twice", and an anchor that is donated away."""
  params = random(0)
  if committed:
    params = jax.device_put(params, jax.devices()[0])
  tx, expected = make(params if given else None), jax.tree.map(np.array, params)
  state = tx.init(params)
  for stored, leaf in zip(anchor_of(state).values(), params.values(), strict=True):
    assert stored.unsafe_buffer_pointer() != leaf.unsafe_buffer_pointer()

  def step(params: Any, state: Any) -> Any:
    updates, state = tx.update(jax.tree.map(jnp.ones_like, params), state, params)
    return optax.apply_updates(params, updates), state

  step = jax.jit(step, donate_argnums=(0, 1))
  given_params = params
  for _ in range(3):
    params, state = step(params, state)
  assert given_params['a'].is_deleted()  # or the test proves nothing
  chex.assert_trees_all_equal(anchor_of(state), expected)


@EACH
def test_without_an_anchor_the_first_update_captures_it(make: Any) -> None:
  """Catches the random weights of `init` as θ_0, and a capture at every step (a no-op)."""
  pretrained, tx = random(1), make()
  state, params = tx.init(random(0)), pretrained
  for t in range(4):
    updates, state = jax.jit(tx.update)(random(10 + t), state, params)
    params = optax.apply_updates(params, updates)
    chex.assert_trees_all_equal(anchor_of(state), pretrained)
  assert not np.array_equal(params['a'], pretrained['a'])


@EACH
def test_a_given_anchor_is_not_replaced_by_the_first_params(make: Any) -> None:
  """Catches a capture that does not ask whether an anchor was given."""
  anchor, tx = random(0), make(random(0))
  state = tx.update(random(2), tx.init(random(1)), random(1))[1]
  chex.assert_trees_all_equal(anchor_of(state), anchor)


@EACH
def test_an_anchor_never_changes(make: Any) -> None:
  """Catches an anchor that drifts by a cast, an average or an aliased buffer, in a scan."""
  anchor, tx = random(0), make(random(0), strength=0.5)

  def step(carry: Any, gradients: Any) -> Any:
    params, state = carry
    updates, state = tx.update(gradients, state, params)
    return (optax.apply_updates(params, updates), state), anchor_of(state)

  start = random(1), tx.init(random(1))
  _, history = jax.jit(lambda start, g: jax.lax.scan(step, start, g))(start, random(2, (5, 3, 4)))
  chex.assert_trees_all_equal(history, jax.tree.map(lambda a: jnp.stack([a] * 5), anchor))


@EACH
@pytest.mark.parametrize('captured', [True, False])
def test_anchor_dtype(make: Any, captured: bool) -> None:
  """Catches storage in the params' dtype, or a dtype that changes at the capture."""
  params = {**random(0), 'c': jnp.full(3, 1 + 1j)}
  tx = make(None if captured else params, anchor_dtype=jnp.bfloat16)
  state = tx.init(jax.tree.map(jnp.zeros_like, params) if captured else params)
  expected = {n: params[n].astype('complex64' if n == 'c' else 'bfloat16') for n in params}
  chex.assert_trees_all_equal_shapes_and_dtypes(anchor_of(state), expected)
  updates, state = jax.jit(tx.update)(params, state, params)
  chex.assert_trees_all_equal(anchor_of(state), expected)
  chex.assert_trees_all_equal_shapes_and_dtypes(anchor_of(state), expected)
  chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)


@EACH
def test_an_anchor_that_is_already_in_anchor_dtype(make: Any) -> None:
  """Catches a checkpoint in bfloat16 that must be blown up to be accepted."""
  anchor = jax.tree.map(lambda x: x.astype(jnp.bfloat16), random(0))
  state = make(anchor, anchor_dtype=jnp.bfloat16).init(random(1))
  chex.assert_trees_all_equal(anchor_of(state), anchor)


@EACH
def test_zero_and_free_leaves_store_nothing(make: Any) -> None:
  """Catches zeros in the state for PEFT, and a free head that is held, or held at zero."""
  params = {'a': jnp.ones(2), 'b': {'x': jnp.ones(2), 'y': jnp.ones(2)}, 'c': jnp.ones(2)}
  tx = make({'a': 0, 'b': {'x': None, 'y': 0.0}, 'c': None}, 1.0)
  updates, state = tx.update(params, tx.init(params), params)
  assert jax.tree.leaves(anchor_of(state)) == []
  hole = optax.MaskedNode()
  assert anchor_of(state) == {'a': hole, 'b': {'x': hole, 'y': hole}, 'c': hole}
  if isinstance(state, spd.ProjectionDecayState):
    assert {name: bool(held) for name, held in state.condition.items()} == {'a': True, 'b~y': True}
    np.testing.assert_allclose(state.distance['a'], np.sqrt(2), rtol=1e-6)
    chex.assert_trees_all_equal((updates['b']['x'], updates['c']), (jnp.ones(2), jnp.ones(2)))


@EACH
def test_prefixes_stand_for_all_below(make: Any) -> None:
  """Catches prefixes that reach only one level, and 0 or None that swallow their neighbours."""
  params = {
    'lora': {'a': jnp.ones(2), 'b': jnp.ones(3)},
    'old': {'w': jnp.ones(2)},
    'new': [jnp.ones(1)],
  }
  prefix = {'lora': 0, 'old': {'w': jnp.zeros(2)}, 'new': None}
  full = {'lora': {'a': 0, 'b': 0}, 'old': {'w': jnp.zeros(2)}, 'new': [None]}
  found, expected = (make(anchor).init(params) for anchor in (prefix, full))
  chex.assert_trees_all_equal_structs(found, expected)
  assert len(jax.tree.leaves(anchor_of(found))) == 1
  assert jax.tree.leaves(anchor_of(make(0).init(params))) == []


@flax.struct.dataclass
class Module:
  """Params as a dataclass."""

  kernel: Any
  bias: Any


PLAIN = {'kernel': jnp.zeros((2, 3)), 'bias': jnp.zeros(3)}
CONTAINERS = {
  'FrozenDict': (flax.core.freeze({'dense': PLAIN}), {'dense': PLAIN}),
  'dataclass': (Module(**PLAIN), PLAIN),
  'dataclass inside': ({'dense': Module(**PLAIN)}, {'dense': PLAIN}),
  'list': ([PLAIN, PLAIN], (PLAIN, PLAIN)),
  'integer keys': ({0: PLAIN, 1: PLAIN}, [PLAIN, PLAIN]),
  'metadata': (
    {'w': flax.core.meta.Partitioned(jnp.zeros((2, 3)), ('x', None))},
    {'w': jnp.zeros((2, 3))},
  ),
}


@EACH
@pytest.mark.parametrize('row', CONTAINERS)
def test_plain_containers_fit_any_params(make: Any, row: str) -> None:
  """Catches tree structures that are compared where paths are meant: checkpoints are dicts."""
  like, anchor = CONTAINERS[row]
  params = jax.tree.map(jnp.ones_like, like)
  tx = make(anchor)
  updates, state = tx.update(params, tx.init(params), params)
  chex.assert_trees_all_equal_structs(updates, anchor_of(state), params)
  chex.assert_trees_all_equal(anchor_of(state), like)


@EACH
def test_an_anchor_is_an_argument_of_the_program(make: Any) -> None:
  """Catches an anchor in a closure: XLA would bake a copy of the model into the program."""
  params = random(0, (37, 41))
  tx = make(random(1, (37, 41)))
  state = tx.init(params)
  jaxpr = jax.make_jaxpr(tx.update)(params, state, params)
  assert max([np.size(const) for const in jaxpr.consts], default=0) <= 1
  program = jax.jit(tx.update).lower(params, state, params).as_text()
  assert 'dense<"0x' not in program  # MLIR's spelling of large constants
  assert program.count('37x41') > 0


@EACH
def test_an_anchor_may_be_traced_where_the_params_are_not(make: Any) -> None:
  """Catches a look at the devices of a tracer."""
  params = {'w': jax.device_put(jnp.ones(3), jax.devices()[0])}
  init = jax.jit(lambda anchor: make(anchor).init(params))
  assert anchor_of(init({'w': jnp.zeros(3)}))['w'].tolist() == [0, 0, 0]


@EACH
def test_holes_of_masked_and_none_are_passed_over(make: Any) -> None:
  """Catches an anchor for all the params that fits only those that are trained."""
  params = {'a': jnp.ones(3), 'b': {'c': jnp.ones(3), 'd': jnp.ones(3)}, 'e': None}
  anchor = {'a': jnp.zeros(3), 'b': {'c': jnp.zeros(3), 'd': jnp.zeros(3)}, 'e': None}
  mask = {'a': True, 'b': {'c': False, 'd': True}, 'e': None}
  tx = optax.masked(make(anchor, 1.0), mask)
  updates, state = tx.update(params, tx.init(params), params)
  stored = anchor_of(state)
  chex.assert_trees_all_equal(stored['b']['d'], jnp.zeros(3))
  assert stored['b']['c'] == optax.MaskedNode()
  assert len(jax.tree.leaves(stored)) == 2
  chex.assert_trees_all_equal(updates['b']['c'], jnp.ones(3))
  part = {'a': jnp.ones(3), 'b': None, 'e': None}  # nnx and equinox leave None behind
  assert len(jax.tree.leaves(anchor_of(make(anchor).init(part)))) == 1


@EACH
def test_integers_and_empty_leaves_have_no_anchor(make: Any) -> None:
  """Catches a step counter or a float0 gradient that reaches the arithmetic."""
  params = {
    'w': jnp.ones(2),
    'steps': jnp.int32(3),
    'flag': jnp.array(True),
    'none': jnp.ones((0, 2)),
  }
  gradients = jax.grad(lambda p: jnp.sum(p['w'] ** 2) + p['none'].sum(), allow_int=True)(params)
  for tx in (make(), make({'w': jnp.zeros(2), 'steps': 0, 'flag': None, 'none': jnp.ones((0, 2))})):
    state = tx.init(params)
    assert [leaf.shape for leaf in jax.tree.leaves(anchor_of(state))] == [(2,)]
    if not hasattr(state, 'inner_state'):  # optax.sgd itself cannot take float0
      updates, _ = tx.update(gradients, state, params)
      assert updates['steps'].dtype == jax.dtypes.float0


@pytest.mark.eight_devices
@EACH
@pytest.mark.parametrize('captured', [True, False])
@pytest.mark.parametrize('wrap', [jax.jit, lambda function: function], ids=['jit', 'eager'])
def test_an_anchor_keeps_the_sharding_of_the_params(make: Any, captured: bool, wrap: Any) -> None:
  """Catches a replicated copy of a sharded model, at `init` or after a step."""
  mesh = Mesh(np.array(jax.devices()[:4]), ('x',))
  sharding = NamedSharding(mesh, PartitionSpec(None, 'x'))
  params = jax.device_put(random(0), sharding)
  tx = make(None if captured else jax.tree.map(np.asarray, random(1)))
  state = wrap(tx.init)(params)
  assert all(leaf.sharding.is_equivalent_to(sharding, 2) for leaf in anchor_of(state).values())
  state = jax.jit(tx.update)(params, state, params)[1]
  assert all(leaf.sharding.is_equivalent_to(sharding, 2) for leaf in anchor_of(state).values())


@EACH
@pytest.mark.parametrize('jitted', [False, True])
def test_a_struct_captures_its_param_alone(make: Any, jitted: bool) -> None:
  """Catches a captured leaf that keeps what `init` saw, and a given one that is captured, too."""
  given, start, later, gradients = random(0), random(1), random(2), random(3)
  anchor = {'a': jax.ShapeDtypeStruct((3, 4), jnp.float32), 'b': given['b']}
  tx = make(anchor)
  state = (jax.jit(tx.init) if jitted else tx.init)(start)
  chex.assert_trees_all_equal(anchor_of(state), {'a': start['a'], 'b': given['b']})
  for params in (later, start):  # captured once
    _, state = jax.jit(tx.update)(gradients, state, params)
    chex.assert_trees_all_equal(anchor_of(state), {'a': later['a'], 'b': given['b']})


def test_structs_must_fit() -> None:
  """Catches a captured anchor of another shape."""
  struct = jax.ShapeDtypeStruct((4, 3), jnp.float32)
  with pytest.raises(ValueError, match=r'a: anchor float32\[4, 3\], param float32\[3, 4\]'):
    spd.adam_spd(1e-3, {'a': struct, 'b': None}).init(random(0))
