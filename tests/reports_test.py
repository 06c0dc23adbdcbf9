"""layer_report and scalars: what they find in any optimizer state, and how little it costs."""

import functools
import re
import subprocess
import sys
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import spd_optax as spd
from spd_optax import reports
from spd_optax.layers import layer_key

PARAMS = {
  'body': {'kernel': jnp.full((3, 2, 5), 2.0), 'bias': jnp.zeros((3, 5))},
  'head': {'kernel': jnp.ones((5, 4))},
}
STACK = {'body': 0, 'head': None}
TURNS = (1.0, 1.0, -0.2, 0.3, -0.2)


@functools.cache
def plain():
  """A trained state without stacks."""
  return train(sgd())


@functools.cache
def stacked():
  """A trained state whose body stacks layers."""
  return train(sgd(stack_axis=STACK))


def train(tx, params=PARAMS, turns=TURNS):
  """Steps with gradients that turn, so that some layers are held."""
  state = tx.init(params)
  step = jax.jit(tx.update)
  for turn in turns:
    gradients = jax.tree.map(lambda p, t=turn: jnp.full_like(p, t), params)
    updates, state = step(gradients, state, params)
    params = optax.apply_updates(params, updates)
  return state


def sgd(**arguments):
  return spd.with_projection_decay(optax.sgd(0.1, momentum=0.9), **arguments)


def check(own, records):
  """Every record says what the state says."""
  for record in records:
    at = ... if record.slice is None else record.slice
    layer = layer_key(record.group if record.path is None else record.path)
    assert record.condition == bool(np.asarray(own.condition[layer])[at])
    assert record.ratio == float(np.asarray(own.ratio[layer])[at])
    assert record.distance == float(np.asarray(own.distance[layer])[at])
    assert record.constrained == int(np.asarray(own.constrained[layer])[at])
    assert record.constrained_share == record.constrained / int(own.count)
    assert record.rule_state == {
      name: float(np.asarray(values[layer])[at]) for name, values in own.rule_state.items()
    }


def test_every_layer_has_a_record_with_the_values_of_the_state():
  # Would catch: values that are given to another layer, or bits that the packed transfer garbles.
  state = stacked()
  records = spd.layer_report(state)
  check(state.projection_decay, records)
  assert [record.name for record in records] == [
    *(f'body/bias[{i}]' for i in range(3)),
    *(f'body/kernel[{i}]' for i in range(3)),
    'head/kernel',
  ]
  assert any(record.condition for record in records)
  assert any(0 < record.constrained_share < 1 for record in records)


def test_the_relative_distance_is_that_to_the_norm_of_each_slice():
  # Would catch: the norm of the whole leaf for each slice, and a division by the zero bias.
  records = {record.name: record for record in spd.layer_report(stacked())}
  far = records['body/kernel[1]']
  np.testing.assert_allclose(far.relative_distance, far.distance / np.sqrt(4 * 10), rtol=1e-6)
  far = records['head/kernel']
  np.testing.assert_allclose(far.relative_distance, far.distance / np.sqrt(20), rtol=1e-6)
  assert records['body/bias[0]'].relative_distance is None


def with_numbers(own, start):
  """The state of a rule with two numbers per layer, none of which any other layer has."""
  flat, treedef = jax.tree.flatten({name: dict(own.ratio) for name in ('mean', 'square')})
  numbers = [jnp.reshape(start + i + jnp.arange(x.size) / 8, x.shape) for i, x in enumerate(flat)]
  return own._replace(rule_state=jax.tree.unflatten(treedef, numbers))


def test_the_numbers_of_a_rule_are_shown_by_name():
  # Would catch: columns that are told apart by their position, so that one is taken for another.
  own = with_numbers(stacked().projection_decay, 10.0)
  records = spd.layer_report(own)
  check(own, records)
  assert all(record.rule_state.keys() == {'mean', 'square'} for record in records)
  assert len({x for record in records for x in record.rule_state.values()}) == 2 * len(records)
  found = spd.scalars(own)
  assert found['spd/body/kernel/1/mean'] == records[4].rule_state['mean']
  assert found['spd/head/kernel/square'] == records[-1].rule_state['square']
  assert found['spd/head/kernel/distance'] == records[-1].distance


def test_each_state_has_the_numbers_of_its_own_rule():
  # Would catch: numbers of one state that are given to the layers of another.
  tx = optax.partition({'a': sgd(), 'b': sgd(stack_axis=0)}, {'body': 'b', 'head': 'a'})
  states = reports.states_in(train(tx), 'test')
  first, second = (with_numbers(state, 100.0 * i) for i, state in enumerate(states))
  first = first._replace(rule_state={'mean': first.rule_state['mean']})
  records = spd.layer_report((first, second))
  check(first, records[: len(records) - 6])
  check(second, records[-6:])


def test_numbers_that_lie_on_several_devices_are_read():
  mesh = jax.make_mesh((len(jax.devices()),), ('x',))
  rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec('x'))
  params = {'stacked': jax.device_put(jnp.ones((8, 4)), rows), 'alone': jnp.ones(3)}
  state = train(sgd(stack_axis={'stacked': 0, 'alone': None}), params)
  own = with_numbers(state.projection_decay, 3.0)
  own.rule_state['mean']['stacked'] = jax.device_put(own.rule_state['mean']['stacked'], rows)
  check(own, spd.layer_report(own))


def test_a_slice_that_is_spelled_like_another_layer_keeps_its_brackets():
  # Would catch: two layers that are spelled alike, one of which takes the other's place.
  params = {'a': jnp.ones((2, 3)), 'b': [jnp.ones(3), jnp.ones(3)]}
  layers = {
    'stack_axis': lambda path, leaf: 0 if path == 'a' else None,
    'group': lambda path: 'b' if path == 'a' else None,
  }
  state = train(sgd(**layers), params)
  records, found = spd.layer_report(state, **layers), spd.scalars(state, **layers)
  names = {key.removeprefix('spd/').removesuffix('/ratio') for key in found if 'ratio' in key}
  assert names == {record.name for record in records} == {'b[0]', 'b[1]', 'b/0', 'b/1'}


def test_where_the_state_does_not_show_the_layer_the_arguments_do():
  # Would catch: a guess at the stacked axis of a square leaf, and a group without some members.
  square = {'a': jnp.ones((3, 3)), 'b': jnp.full((3,), 2.0)}
  stacked = train(sgd(stack_axis={'a': 1, 'b': None}), square)
  assert [r.relative_distance for r in spd.layer_report(stacked)][:3] == [None] * 3
  found = spd.layer_report(stacked, stack_axis={'a': 1, 'b': None})
  np.testing.assert_allclose(found[0].relative_distance, found[0].distance / 3**0.5, rtol=1e-6)

  def one(path):
    return 'b'  # the name of a leaf

  grouped = train(sgd(group=one), square)
  assert [record.relative_distance for record in spd.layer_report(grouped)] == [None]
  (found,) = spd.layer_report(grouped, group=one)
  np.testing.assert_allclose(found.relative_distance, found.distance / 21**0.5, rtol=1e-6)


def test_a_group_is_named_as_one():
  (record,) = spd.layer_report(train(sgd(group=lambda path: 'all'), PARAMS))
  assert (record.name, record.path, record.group, record.slice) == ('all', None, 'all', None)


def test_a_group_of_a_haiku_module_has_its_name():
  """Catches '~' in a name, which stands for '/' in the keys of a state."""
  modules = ('mlp/~/linear_0', 'vae/linear', 'vae/~encode/linear')
  params = {module: {'w': jnp.ones((3, 2)), 'b': jnp.ones(2)} for module in modules}
  state = spd.adam_spd(1e-3, group=lambda path: path.rpartition('/')[0]).init(params)
  assert [record.group for record in spd.layer_report(state)] == [*params]


@pytest.mark.parametrize('key', [True, 0.5, ['a']], ids=repr)
def test_a_key_of_a_group_is_a_name(key):
  """Catches a list that becomes a name with brackets."""
  tx = spd.adam_spd(1e-3, group=lambda path: key)
  with pytest.raises(TypeError, match=r'(?s)group\(path\) must return a string.*kernel: '):
    tx.init(PARAMS)


def test_arguments_that_are_not_those_of_the_transformation_are_refused():
  # Would catch: norms of other layers than those in the state.
  with pytest.raises(ValueError, match='must be those of the transformation') as error:
    spd.layer_report(stacked(), group=lambda path: 'all')
  assert 'all: nothing in the state' in str(error.value)


@pytest.mark.parametrize(
  'wrap',
  [
    lambda tx: optax.chain(optax.clip(1.0), tx),
    lambda tx: optax.MultiSteps(tx, 2),
    lambda tx: optax.apply_if_finite(tx, 3),
    lambda tx: optax.masked(tx, {'body': True, 'head': True}),
  ],
)
def test_the_state_is_found_in_any_nesting(wrap):
  assert len(spd.layer_report(train(wrap(sgd())))) == 3


def test_the_states_of_a_partition_are_reported_together():
  # Would catch: only the first state being found, and norms in the wrong order.
  tx = optax.partition({'a': sgd(), 'b': spd.adam_spd(1e-2)}, {'body': 'b', 'head': 'a'})
  records = {record.name: record for record in spd.layer_report(train(tx))}
  assert records.keys() == {'head/kernel', 'body/bias', 'body/kernel'}
  far = records['head/kernel']
  np.testing.assert_allclose(far.relative_distance, far.distance / np.sqrt(20), rtol=1e-6)


def test_two_states_over_the_same_layers_have_names_of_their_own():
  # Would catch: one layer's scalars overwriting the other's.
  tx = optax.chain(spd.projection_decay(), sgd())
  records = spd.layer_report(train(tx))
  assert len({record.name for record in records}) == len(records) == 6
  found = spd.scalars(train(tx))
  assert len(found) > 6 * 4
  assert not [key for key in found if re.search(r"//|[][()']", key)]  # catches 'state/0//kernel'


def test_the_boxes_of_nnx_are_opened():
  nnx = pytest.importorskip('flax.nnx')
  model = nnx.Linear(4, 4, rngs=nnx.Rngs(0))
  optimizer = nnx.Optimizer(model, sgd(), wrt=nnx.Param)
  optimizer.update(model, nnx.grad(lambda m: jnp.sum(m(jnp.ones((2, 4)))))(model))
  assert [record.name for record in spd.layer_report(optimizer.opt_state)] == ['bias', 'kernel']
  with pytest.raises(TypeError, match='found State') as error:
    spd.layer_report(nnx.state(model))  # catches a dump of the state in the message
  assert len(str(error.value)) < 250


@pytest.mark.parametrize('strength', [1.0, spd.within_distance(0.5)], ids=['fixed', 'budget'])
@pytest.mark.parametrize('rule', [None, spd.SignificantProjection()], ids=['paper', 'significant'])
def test_a_state_that_nnx_has_split(rule, strength):
  """Catches a report that finds no state in what MaxText's loop returns, or mixes its numbers."""
  nnx = pytest.importorskip('flax.nnx')
  model = nnx.Linear(4, 4, rngs=nnx.Rngs(0))
  options = {} if rule is None else {'rule': rule}
  optimizer = nnx.Optimizer(model, spd.adam_spd(0.1, strength=strength, **options), wrt=nnx.Param)
  for _ in range(3):
    optimizer.update(model, nnx.grad(lambda m: jnp.sum(m(jnp.ones((2, 4)))))(model))
  _, split = nnx.split(optimizer)
  serialization = pytest.importorskip('flax.serialization')
  assert spd.layer_report(split) == spd.layer_report(optimizer.opt_state)
  assert spd.scalars(split) == spd.scalars(optimizer.opt_state)
  pure = nnx.to_pure_dict(nnx.state(optimizer))['opt_state']
  restored = serialization.msgpack_restore(serialization.msgpack_serialize(pure))
  assert spd.layer_report(restored) == spd.layer_report(optimizer.opt_state)
  with pytest.raises(TypeError, match='expected the state of an optimizer with SPD'):
    spd.drop_anchor(split)  # what it cannot change it does not pass over


@pytest.mark.parametrize('strength', [1.0, spd.within_distance(0.5)], ids=['fixed', 'budget'])
@pytest.mark.parametrize('empty', ['None', 'left out', 'empty'])
def test_a_state_restored_as_dicts(empty, strength):
  """Catches a checkpoint that was restored without a structure, and whose report crashes."""
  tx = spd.adam_spd(0.1, strength=strength)
  state = tx.init(PARAMS)
  _, state = tx.update(PARAMS, state, PARAMS)
  found = state.projection_decay._asdict()
  budget = found['budget_state']
  found['budget_state'] = budget._asdict() if budget else {'None': None, 'empty': {}}.get(empty)
  if empty == 'left out' and not budget:
    del found['budget_state']
  assert spd.layer_report({'opt': [found]}) == spd.layer_report(state)


def test_names_come_in_natural_order_whatever_the_order_in_the_state():
  # Would catch: block_10 before block_2, and an order that jit changes.
  params = {f'block_{i}': jnp.ones(2) for i in (10, 2, 1)}
  tx = sgd()
  for state in (tx.init(params), train(tx, params)):
    names = [record.name for record in spd.layer_report(state)]
    assert names == ['block_1', 'block_2', 'block_10']


@pytest.mark.parametrize('state', [None, {}, optax.adam(1e-3).init(PARAMS)])
@pytest.mark.parametrize('function', [spd.layer_report, spd.scalars])
def test_a_state_without_spd_is_an_error_that_says_what_to_pass(function, state):
  with pytest.raises(TypeError, match='expected the state of an optimizer with SPD'):
    function(state)


def test_a_state_with_a_seed_axis_or_inside_jit_is_refused():
  # Would catch: seeds taken for the slices of a stack.
  several = jax.vmap(sgd().init)(jax.tree.map(lambda x: jnp.stack([x, x]), PARAMS))
  with pytest.raises(ValueError, match=r'count has the shape \(2,\)'):
    spd.layer_report(several)
  with pytest.raises(TypeError, match='outside jit'):
    jax.jit(spd.scalars)(sgd().init(PARAMS))
  with pytest.raises(TypeError, match='outside jit'):
    spd.scalars(jax.eval_shape(sgd().init, PARAMS))


def test_a_dropped_or_zero_anchor_leaves_the_relative_distance_out():
  # Would catch: the norm of the fingerprint that stands for a dropped anchor.
  for state in (spd.drop_anchor(plain()), train(sgd(anchor=0))):
    records = spd.layer_report(state)
    assert {record.relative_distance for record in records} == {None}
    assert {record.path for record in records} == {'body/bias', 'body/kernel', 'head/kernel'}
    assert not any(key.endswith('relative_distance') for key in spd.scalars(state))


def test_a_distance_that_is_not_a_number_is_none_only_where_nothing_is_relative_to_it():
  # Would catch: None, as for a zero anchor, where the run has diverged.
  own = train(sgd(), turns=(1.0,)).projection_decay
  own = own._replace(distance={name: jnp.float32(np.nan) for name in own.distance})
  far = {record.name: record.relative_distance for record in spd.layer_report(own)}
  assert far.pop('body/bias') is None  # its anchor is 0
  assert np.isnan(list(far.values())).all()
  found = spd.scalars(own)
  assert np.isnan(found['spd/relative_distance'])
  assert np.isnan(found['spd/head/kernel/relative_distance'])
  assert 'spd/body/bias/relative_distance' not in found


def test_an_anchor_of_zero_counts_like_zeros_that_are_stored():
  # Would catch: a relative distance over all layers that leaves out those whose anchor is `0`.
  zeros = {'body': PARAMS['body'], 'head': {'kernel': 0}}
  stored = {'body': PARAMS['body'], 'head': {'kernel': jnp.zeros((5, 4))}}
  first, second = (spd.scalars(train(sgd(anchor=anchor))) for anchor in (zeros, stored))
  assert first == second


def test_scalars_are_floats_and_add_up():
  # Would catch: NumPy or JAX scalars, which some trackers store as objects.
  state = plain()
  records, found = spd.layer_report(state), spd.scalars(state, 'opt')
  assert all(type(value) is float and key.startswith('opt/') for key, value in found.items())
  assert found['opt/condition'] == np.mean([record.condition for record in records])
  share = np.mean([record.constrained_share for record in records])
  assert found['opt/constrained_share'] == pytest.approx(share)
  distance = np.linalg.norm([record.distance for record in records])
  assert found['opt/distance'] == pytest.approx(distance)
  norm = np.linalg.norm(np.concatenate([np.ravel(x) for x in jax.tree.leaves(PARAMS)]))
  assert found['opt/relative_distance'] == pytest.approx(distance / norm)
  assert found['opt/head/kernel/distance'] == records[-1].distance
  assert 'condition' in spd.scalars(state, '')


def test_scalars_reach_tensorboard(tmp_path):
  # Would catch: names or values that event files cannot hold.
  tensorboardx = pytest.importorskip('tensorboardX')
  events = pytest.importorskip('tensorboard.backend.event_processing.event_accumulator')
  written = spd.scalars(stacked())
  with tensorboardx.SummaryWriter(str(tmp_path)) as writer:
    for name, value in written.items():
      writer.add_scalar(name, value, 7)
  reader = events.EventAccumulator(str(tmp_path)).Reload()
  assert set(reader.Tags()['scalars']) == written.keys()
  for name, value in written.items():
    (event,) = reader.Scalars(name)
    assert (event.step, event.value) == (7, pytest.approx(value, rel=1e-6))


def test_all_layers_travel_in_a_few_arrays():
  # Would catch: a transfer per layer, which on an accelerator costs more than the step.
  params = {f'layer_{i}': jnp.full(3, i + 1.0) for i in range(40)}
  states = reports.states_in(train(sgd(), params), 'test')
  with mock.patch.object(reports, '_pack', wraps=reports._pack) as pack:
    reports.begin(states)()
  assert pack.call_count == 1
  assert len(jax.tree.leaves(reports._pack(*pack.call_args[0]))) == 1 + 4


def test_a_state_spread_over_devices_is_read():
  # Would catch: a packed transfer of arrays that lie on different devices.
  mesh = jax.make_mesh((len(jax.devices()),), ('x',))
  rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec('x'))
  params = {'stacked': jax.device_put(jnp.ones((8, 4)), rows), 'alone': jnp.ones(3)}
  state = train(sgd(stack_axis={'stacked': 0, 'alone': None}), params)
  records = spd.layer_report(state)
  check(state.projection_decay, records)
  assert {record.relative_distance is None for record in records} == {False}


def test_importing_the_library_imports_no_library_for_reports():
  code = 'import sys, spd_optax; print({"matplotlib", "rich"} & {*sys.modules})'
  run = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
  assert run.stdout.strip() == 'set()'
