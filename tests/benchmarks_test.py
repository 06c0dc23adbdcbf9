"""The benchmarks run, at tiny sizes, and compare what they say they compare."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import smoke

import spd_optax as spd
from benchmarks import compiled, leaf_sizes, methods, shapes, step_time, training_step

pytestmark = pytest.mark.examples

SOME = ('projection_decay', 'adam_spd, apply')  # of each kind; each takes seconds to compile
SMALL = {'a': (3, 4), 'b': {'c': (5,), 'd': (2, 3, 4)}}


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  out = tmp_path_factory.mktemp('step_time')
  arguments = ['--model', 'tiny', '--rounds', '2', '--no-torch', '--out', str(out)]
  return out, step_time.main(arguments)


@pytest.mark.parametrize(
  ('name', 'leaves', 'parameters'),
  [
    ('vit_b16', 200, 86_567_656),
    ('t5_base', 257, 222_903_552),
    ('t5_large', 509, 737_668_096),
  ],
)
def test_models_have_the_leaves_and_parameters_of_the_real_ones(name, leaves, parameters):
  """Catches a leaf that a model lacks, or a shape that is not its own."""
  tree = shapes.MODELS[name]()
  assert shapes.leaves(tree) == len(jax.tree.leaves(shapes.structs(tree))) == leaves
  assert shapes.parameters(tree) == parameters


def test_wider_and_deeper_grow_as_they_say():
  """Catches an axis that does not grow, or one that should not."""
  assert shapes.wider(SMALL, 3) == {'a': (9, 4), 'b': {'c': (15,), 'd': (6, 3, 4)}}
  assert shapes.deeper(SMALL, 2) == {'0': SMALL, '1': SMALL}


def test_random_arrays_have_the_shapes_dtype_and_scale():
  """Catches arrays that are all alike, or of another scale than asked for."""
  tree = shapes.random({'w': (100, 100)}, jnp.bfloat16, seed=3, scale=0.1)
  assert (tree['w'].shape, tree['w'].dtype) == ((100, 100), jnp.bfloat16)
  np.testing.assert_allclose(np.std(np.asarray(tree['w'], np.float32)), 0.1, rtol=0.05)
  again = shapes.random({'w': (100, 100)}, jnp.bfloat16, seed=4, scale=0.1)
  assert not np.array_equal(tree['w'], again['w'])


def test_step_time_writes_a_row_for_each_method(run):
  """Catches a method that is left out, or a file that says something else than the script."""
  out, found = run
  written = json.loads((out / 'tiny_float32.json').read_text())
  assert written['results'] == found['tiny']
  assert written['settings']['parameters'] == shapes.parameters(shapes.tiny())
  assert found['tiny'].keys() == methods.OPTIMIZERS.keys()
  assert found['tiny'][methods.REFERENCE]['% of Adam'] == [100]
  assert found['tiny'][methods.REFERENCE]['Adam, ms'] == found['tiny'][methods.REFERENCE]['ms']
  for name, row in found['tiny'].items():
    assert 0 < row['25 %'][0] <= row['ms'][0] <= row['75 %'][0], name
    assert row['compile, s'][0] > 0, name


def test_step_time_holds_some_layers_and_not_others(run):
  """Catches times of a step that never does what SPD is there for."""
  for name, row in run[1]['tiny'].items():
    assert ('held, %' in row) == (not name.startswith('optax') and 'no reports' not in name)
    assert 10 < row.get('held, %', [50])[0] < 60, name


def test_the_timed_gradients_make_spd_take_steps_back():
  """Catches a condition that is true where the ratio is 0, so that nothing is moved."""
  first, second = step_time.two_gradients(SMALL, jnp.float32)
  tx = spd.adam_spd(methods.LEARNING_RATE)
  step = jax.jit(methods.make_step(tx))
  params = shapes.random(SMALL, scale=step_time.PARAMS_SCALE)
  state = tx.init(params)
  for gradients in (first, second, first, second, first, second):
    params, state = step(params, state, gradients)
  own = state.projection_decay
  assert {name for name, held in own.condition.items() if held} == {'b~c', 'b~d'}
  assert all(own.ratio[name] > 0 for name in ('b~c', 'b~d'))


@pytest.mark.parametrize('change', [methods.without_reports, methods.with_packed_reports])
def test_other_reports_are_of_the_same_steps(change):
  """Catches counts that start anew at every step, and values given to another layer."""
  params = start = shapes.random(SMALL, scale=0.1)
  tx = spd.adam_spd(1e-2)
  state, other = tx.init(params), change(tx)
  other_params, other_state = start, other.init(start)
  step, other_step = (jax.jit(methods.make_step(each)) for each in (tx, other))
  for i, gradients in enumerate(noisy_gradients(12)):
    gradients['a'] = gradients['a'] * (i < 8)  # no gradient holds nothing: a differs from the rest
    params, state = step(params, state, gradients)
    other_params, other_state = other_step(other_params, other_state, gradients)
  jax.tree.map(np.testing.assert_array_equal, params, other_params)
  constrained = [int(x) for x in state.projection_decay.constrained.values()]
  assert constrained != constrained[::-1]
  found = other_state.projection_decay.constrained
  assert found == {} if change is methods.without_reports else found.tolist() == constrained


def test_steps_in_one_program_are_the_same_steps():
  """The form that accelerators time; would catch steps that are dropped or see other gradients."""
  step = methods.make_step(spd.adam_spd(1e-2))
  params = shapes.random(SMALL, scale=0.1)
  gradients = shapes.random(SMALL, seed=1)

  def start():
    return jax.tree.map(jnp.copy, params), spd.adam_spd(1e-2).init(params)

  expected = step_time.in_python(jax.jit(step), *start(), gradients, 5)
  found = step_time.in_one_program(step)(*start(), gradients, 5)
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-7), found, expected)


def test_groups_fit_into_memory_and_each_has_the_reference():
  """Catches a group without Adam to compare with, or one that does not fit."""
  memory = {'adam': 3, 'a': 4, 'b': 4, 'c': 20, 'd': 1}
  assert step_time.groups(memory, 12) == [['adam', 'a', 'b'], ['adam', 'c'], ['adam', 'd']]
  assert step_time.groups(memory, 100) == [list(memory)]


@pytest.fixture
def torch_loop():
  pytest.importorskip('torch')
  from benchmarks import torch_loop

  return torch_loop


def noisy_gradients(steps):
  """A direction, under noise and turning back halfway."""
  direction = shapes.random(SMALL, seed=1)
  for i in range(steps):
    noise = shapes.random(SMALL, seed=2 + i)
    sign = 1 if i < steps // 2 else -1
    yield jax.tree.map(lambda d, n, sign=sign: sign * d + n, direction, noise)


def test_torch_loop_takes_the_same_steps(torch_loop):
  """Catches a peer that does less than the paper's rule, or more."""
  params = shapes.random(SMALL, scale=0.1)
  own = [p.clone() for p in torch_loop.tensors(params)]
  loop = torch_loop.LoopAdamSPD(own, 1e-2)
  tx = spd.adam_spd(1e-2)
  step, state, moved = jax.jit(methods.make_step(tx)), tx.init(params), 0
  for gradients in noisy_gradients(12):
    loop.step(torch_loop.tensors(gradients))
    params, state = step(params, state, gradients)
    own_state = state.projection_decay
    moved += sum(
      bool(held and own_state.ratio[name] > 0) for name, held in own_state.condition.items()
    )
  assert moved >= 3
  assert loop.held == sum(map(int, own_state.constrained.values()))
  for tensor, leaf in zip(own, jax.tree.leaves(params), strict=True):
    np.testing.assert_allclose(tensor.numpy(), leaf, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('name', ['torch.optim.Adam, foreach', 'torch.optim.AdamW, fused'])
def test_torch_optimizers_take_optax_steps(torch_loop, name):
  """Catches a peer that is fast because it does not step."""
  params = shapes.random(SMALL, scale=0.1)
  peer = torch_loop.PEERS[name]([p.clone() for p in torch_loop.tensors(params)], 1e-2)
  tx = optax.adamw(1e-2, weight_decay=0.01) if 'AdamW' in name else optax.adam(1e-2)
  step, state = jax.jit(methods.make_step(tx)), tx.init(params)
  for gradients in noisy_gradients(4):
    peer.step(torch_loop.tensors(gradients))
    params, state = step(params, state, gradients)
  for tensor, leaf in zip(peer.params, jax.tree.leaves(params), strict=True):
    np.testing.assert_allclose(tensor.detach().numpy(), leaf, rtol=1e-5, atol=1e-6)


def test_compiled_has_a_row_for_each_method_asked_for_and_adam_moves_what_it_must(tmp_path):
  """Catches traffic that is counted twice, or not at all."""
  arguments = ['--target', 'cpu', '--model', 'tiny', '--method', *SOME, '--out', str(tmp_path)]
  found = compiled.main(arguments)
  assert found.keys() == {f'tiny, cpu: {name}' for name in (methods.REFERENCE, *SOME)}
  adam = found[f'tiny, cpu: {methods.REFERENCE}']
  # On CPU three loops: g, m → m; g, v → v; θ, m, v → θ.
  np.testing.assert_allclose(adam['passes, N'], 10, atol=0.1)
  assert adam['compile / Adam'] == [1]
  assert json.loads((tmp_path / 'tiny_cpu.json').read_text())['results'] == found


def test_traffic_by_leaf_size_is_that_of_each_leaf():
  """Catches leaves counted by their elements, and the traffic of one size given to another."""
  tx = methods.OPTIMIZERS[methods.REFERENCE](None)
  _, text = compiled.compile_step(tx, shapes.tiny(), compiled.TARGETS['cpu'])
  found = leaf_sizes.rows(shapes.tiny(), text)
  assert len(found) > 3
  assert sum(row['share of params, %'][0] for row in found.values()) > 90
  # Three loops: g, m → m; g, v → v; θ and the new m, v → θ.
  expected = {'gradients': 2, 'params': 1, 'moments': 2, 'stored by the step': 2, 'written': 3}
  for row in found.values():
    for column in leaf_sizes.MOVED:
      np.testing.assert_allclose(row[column], expected.get(column, 0), atol=0.1)
    np.testing.assert_allclose(row['all, N'], 10, atol=0.1)


def test_a_training_step_is_timed_with_a_method_of_each_kind(tmp_path, monkeypatch):
  """Catches a kind of method that cannot train the model of the examples."""
  some = {name: methods.OPTIMIZERS[name] for name in (methods.REFERENCE, *SOME)}
  monkeypatch.setattr(methods, 'OPTIMIZERS', some)
  monkeypatch.setattr(training_step.finetune_vit, 'small_vit', smoke.tiny_vit)
  with smoke.quick_compiles():
    found = training_step.main(['--rounds', '1', '--batch', '2', '--out', str(tmp_path)])
  assert found.keys() == methods.OPTIMIZERS.keys()
  assert json.loads((tmp_path / 'results.json').read_text())['results'] == found
