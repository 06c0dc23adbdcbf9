"""Wrong calls: what is raised, when, and that the message says where, what and what to do.

Each row is a mistake that users make, with patterns that the message must match:
every offending leaf (`enc/b`), what was found there, and what to pass instead.
"""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import spd_optax as spd

PARAMS = {'enc': {'k': jnp.ones((2, 3)), 'b': jnp.zeros(3)}, 'head': jnp.ones(())}
ADAM = optax.adam(1e-3)


def tree(k: Any = PARAMS['enc']['k'], b: Any = PARAMS['enc']['b'], **top: Any) -> Any:
  """The params, with other leaves in some places."""
  return {'enc': {'k': k, 'b': b}, 'head': PARAMS['head'], **top}


MAKERS = {
  'projection_decay': spd.projection_decay,
  'with_projection_decay': lambda *args, **kw: spd.with_projection_decay(ADAM, *args, **kw),
  'adam_spd': lambda *args, **kw: spd.adam_spd(1e-3, *args, **kw),
  'l2_sp': spd.l2_sp,
}
FORMS = {name: MAKERS[name] for name in ('projection_decay', 'with_projection_decay')}
WRAPS = {'eager': lambda function: function, 'jit': jax.jit}


def assert_raises(error: Any, patterns: str, call: Any, *args: Any, **kwargs: Any) -> None:
  """The call raises, and the message has all the patterns and no leaf without a name."""
  with pytest.raises(error) as caught:
    call(*args, **kwargs)
  message = str(caught.value)
  missing = [p for p in patterns.split(' & ') if not re.search(p, message, re.MULTILINE)]
  assert not missing, f'{missing} not in: {message}'
  assert not re.search(r'^\s*: ', message, re.MULTILINE), f'a leaf without a name in: {message}'


# Wrong whatever the params are: raised where the transformation is made.
ARGUMENTS = {
  'negative strength': ({'strength': -1.0}, ValueError, 'strength & number ≥ 0 & -1.0'),
  'negative array': ({'strength': jnp.array(-2.0)}, ValueError, 'strength & number ≥ 0 & -2'),
  'NaN strength': ({'strength': float('nan')}, ValueError, 'strength & number ≥ 0 & nan'),
  'infinite strength': ({'strength': float('inf')}, ValueError, 'strength & finite & inf'),
  'strengths': ({'strength': np.ones(2)}, ValueError, r'strength & number ≥ 0 & \[1. 1.\]'),
  'string strength': ({'strength': '1'}, TypeError, 'strength & number ≥ 0 & schedule & str'),
  'no strength': ({'strength': None}, TypeError, 'strength & number ≥ 0 & schedule & NoneType'),
  'anchor as strength': ({'strength': PARAMS}, TypeError, 'strength & number ≥ 0 & dict'),
  'optimizer as strength': ({'strength': ADAM}, TypeError, 'strength & number ≥ 0 & Gradient'),
  'optimizer as anchor': (
    {'anchor': ADAM},
    TypeError,
    r'anchor & tree of arrays & transformation & with_projection_decay\(optimizer, anchor\)',
  ),
  'factory as anchor': ({'anchor': optax.adam}, TypeError, 'anchor & tree of arrays & function'),
  'loader as anchor': ({'anchor': lambda: 0}, TypeError, 'anchor & tree of arrays & function'),
  'integer storage': ({'anchor_dtype': jnp.int8}, TypeError, 'anchor_dtype & floating & int8'),
  'misspelt storage': ({'anchor_dtype': 'bf16'}, TypeError, 'anchor_dtype & floating & bf16'),
  'complex storage': ({'anchor_dtype': jnp.complex64}, TypeError, 'anchor_dtype & floating'),
  'bits as storage': ({'anchor_dtype': 16}, TypeError, 'anchor_dtype & floating & 16'),
  'negative margin': ({'margin': -0.1}, ValueError, r'margin & \[0, 1\) & -0.1'),
  'margin one': ({'margin': 1.0}, ValueError, r'margin & \[0, 1\) & 1.0'),
  'NaN margin': ({'margin': float('nan')}, ValueError, r'margin & \[0, 1\) & nan'),
  'margins': ({'margin': np.zeros(2)}, ValueError, r'margin & \[0, 1\) & \[0. 0.\]'),
  'margin schedule': ({'margin': lambda count: 0.1}, TypeError, 'margin & number & function'),
  'string margin': ({'margin': '0.1'}, TypeError, 'margin & number & str'),
  'group as a name': ({'group': 'enc'}, TypeError, 'group & path & str'),
  'group as a tree': ({'group': {'enc': 'a', 'head': 'b'}}, TypeError, 'group & path & dict'),
}


@pytest.mark.parametrize('maker', MAKERS)
@pytest.mark.parametrize('row', ARGUMENTS)
def test_arguments(row: str, maker: str) -> None:
  """Catches arguments that fail only at the first step, or that act silently."""
  kwargs, error, patterns = ARGUMENTS[row]
  if maker != 'l2_sp' or kwargs.keys() <= {'strength', 'anchor', 'anchor_dtype'}:
    assert_raises(error, patterns, MAKERS[maker], **kwargs)


WRAPPER, ALIAS = 'expected an optax optimizer first', 'expected a number or a schedule first'
POSITIONS = {
  'anchor, optimizer': (spd.with_projection_decay, (PARAMS, ADAM), f'{WRAPPER} & dict'),
  'rate': (spd.with_projection_decay, (1e-3,), f'{WRAPPER} & float'),
  'optimizer not called': (spd.with_projection_decay, (optax.adam,), f'{WRAPPER} & function'),
  'no optimizer': (spd.with_projection_decay, (None,), f'{WRAPPER} & NoneType'),
  'anchor as rate': (spd.adam_spd, (PARAMS,), f'{ALIAS} & dict'),
  'array anchor as rate': (spd.adam_spd, (jnp.ones(3),), 'learning_rate & number or a schedule'),
  'optimizer as rate': (spd.adam_spd, (ADAM,), f'{ALIAS} & optax transformation'),
  'string rate': (spd.adam_spd, ('1e-3',), f'{ALIAS} & str'),
  'no rate': (spd.adam_spd, (None,), f'{ALIAS} & NoneType'),
  'WiSE-FT without anchor': (spd.interpolate, (None, PARAMS, 0.5), 'anchor & given & None'),
  'WiSE-FT of an optimizer': (spd.interpolate, (ADAM, PARAMS, 0.5), 'anchor & transformation'),
  'WiSE-FT by a tree': (spd.interpolate, (PARAMS, PARAMS, PARAMS), 'alpha & number & dict'),
  'WiSE-FT by a string': (spd.interpolate, (PARAMS, PARAMS, 'half'), 'alpha & number & str'),
  'WiSE-FT by a vector': (spd.interpolate, (PARAMS, PARAMS, np.ones(3)), r'alpha & number'),
}


@pytest.mark.parametrize('row', POSITIONS)
def test_positions(row: str) -> None:
  """Catches arguments in each other's place, which duck typing would take for a while."""
  call, args, patterns = POSITIONS[row]
  assert_raises((TypeError, ValueError), patterns, call, *args)


ALL = '^ *enc/k & ^ *enc/b & ^ *head'
LEAVES = {
  'too few': ({'enc': {}, 'head': 0}, 'enc/k: .*missing in anchor & enc/b: & None'),
  'too many': (tree(new={'x': 0, 'y': 0}), 'new/x: .*missing in the params & new/y: '),
  'both': ({'enc': {'k': 0, 'z': 0}, 'head': 0}, 'enc/b: .*in anchor & enc/z: .*in the params'),
  'tuple': ((0, 0), f'{ALL} & ^ *0: .*missing in the params & ^ *1: '),
  'shapes': (
    tree(jnp.ones((3, 2)), jnp.ones(4)),
    r'enc/k: .*float32\[3, 2\].*float32\[2, 3\] & enc/b: .*float32\[4\].*float32\[3\]',
  ),
  'dtypes': (
    tree(jnp.ones((2, 3), jnp.bfloat16), jnp.ones(3, jnp.float16)),
    r'enc/k: .*bfloat16\[2, 3\].*float32 & enc/b: .*float16.*float32 & cast',
  ),
  'integers': (tree(np.ones((2, 3), int)), r'enc/k: .*int64\[2, 3\].*float32\[2, 3\] & cast'),
  'complex': (tree(head=1j), 'head: .*complex.*float32'),
  'file names': (tree('k.npy', 'b.npy'), "enc/k: .*'k.npy' & enc/b: .*'b.npy' & array"),
  'file name': ('ckpt.npz', f"{ALL} & str 'ckpt.npz' & array"),
  'initializers': (tree(jax.nn.initializers.zeros, max), 'enc/k: & enc/b: & array'),
  'optimizers': (tree(ADAM), 'enc/k'),
  'lists': (tree(b=[0.0, 0.0, 0.0]), 'enc/b: .*missing in anchor'),
  'number': (1.0, 'enc/k: .*1.0.*float32 & enc/b: .*1.0.*float32 & array & 0'),
  'flag': (True, 'enc/k: .*True & enc/b: .*True & None'),
  'zero as an array': (jnp.zeros(()), r'enc/k: .*float32\[\] & enc/b: .*float32\[\] & 0'),
}
USES = {
  **{name: lambda anchor, make=make: make(anchor).init(PARAMS) for name, make in MAKERS.items()},
  'interpolate': lambda anchor: spd.interpolate(anchor, PARAMS, 0.5),
  'jit': lambda anchor: jax.jit(spd.projection_decay(anchor).init)(PARAMS),
}


@pytest.mark.parametrize('use', USES)
@pytest.mark.parametrize('row', LEAVES)
def test_anchor_leaves(row: str, use: str) -> None:
  """Catches checks of the first bad leaf only, and anchors that broadcast or are cast silently."""
  anchor, patterns = LEAVES[row]
  assert_raises(ValueError, patterns, USES[use], anchor)


@pytest.mark.parametrize('row', ['too few', 'too many', 'both', 'tuple'])
def test_anchor_structure_at_update(row: str) -> None:
  """Catches a state from elsewhere, under an anchor for other params."""
  anchor, patterns = LEAVES[row]
  state = spd.projection_decay().init(PARAMS)
  update = jax.jit(spd.projection_decay(anchor).update)
  assert_raises(ValueError, patterns, update, PARAMS, state, PARAMS)


def test_no_advice_that_does_not_apply() -> None:
  """Catches `anchor_dtype`, which `interpolate` has not, in its message."""
  with pytest.raises(ValueError, match='enc/k') as caught:
    spd.interpolate(LEAVES['dtypes'][0], PARAMS, 0.5)
  assert 'anchor_dtype' not in str(caught.value)


def by_path(**values: Any) -> Any:
  return lambda path, leaf: values[path.split('/')[-1]]


LAYERS = {
  'axis too high': ({'stack_axis': 2}, rf'{ALL} & enc/k: .*2.*\(2, 3\) & None'),
  'axis too low': ({'stack_axis': -3}, rf'{ALL} & enc/k: .*-3.*\(2, 3\)'),
  'scalars do not stack': ({'stack_axis': 0}, r'head: .*0.*\(\) & None'),
  'axis by rule': ({'stack_axis': by_path(k=2, b=1, head=None)}, r'enc/k: .*2 & enc/b: .*1'),
  'float axis': ({'stack_axis': 1.0}, f'{ALL} & enc/k: .*1.0 & int'),
  'string axis': ({'stack_axis': '0'}, f"{ALL} & enc/k: .*'0' & int"),
  'flag as axis': ({'stack_axis': True}, f'{ALL} & enc/k: .*True & int'),
  'array axis': ({'stack_axis': jnp.array(0)}, f'{ALL} & int & static_args'),
  'axes for some': ({'stack_axis': {'enc': 0}}, 'head: .*missing in stack_axis & None'),
  'axes for more': ({'stack_axis': tree(0, 0, head=None, x=1)}, 'x: .*missing in the params'),
  'list of axes': ({'stack_axis': [0, None]}, f'{ALL} & stack_axis & prefix'),
  'mapped axes for some': ({'axis_name': {'enc': 'd'}}, 'head: .*missing in axis_name'),
  'unequal slices': (
    {'stack_axis': by_path(k=0, b=0, head=None), 'group': lambda path: path.split('/')[0]},
    "group 'enc': & enc/k: 2 & enc/b: 3 & stack_axis",
  ),
  'key of another leaf': (
    {'group': lambda path: 'head' if path == 'enc/k' else None},
    'head: a leaf, and a key & group',
  ),
  'stacked and not': (
    {'stack_axis': by_path(k=0, b=None, head=None), 'group': lambda path: 'all'},
    "group 'all': & enc/k: 2 & enc/b: not stacked & head: not stacked",
  ),
}


@pytest.mark.parametrize('form', FORMS)
@pytest.mark.parametrize('wrap', WRAPS)
@pytest.mark.parametrize('row', LAYERS)
def test_layers(row: str, wrap: str, form: str) -> None:
  """Catches axes that wrap around, layers that are merged silently, and NumPy's own messages."""
  options, patterns = LAYERS[row]
  assert_raises(ValueError, patterns, WRAPS[wrap](FORMS[form](**options).init), PARAMS)


def test_axis_names_of_a_wrong_type() -> None:
  """Catches an index of a mesh axis in the place of its name."""
  assert_raises(TypeError, 'axis_name & name & 3', spd.projection_decay(axis_name=3).init, PARAMS)


UPDATES = {
  'no params': ((PARAMS, None), r'update\(gradients, state, params\)'),
  'too few gradients': (({'enc': {}, 'head': 1.0}, PARAMS), 'enc/k: .*missing & enc/b: .*missing'),
  'too many gradients': ((tree(x=1.0, y=1.0), PARAMS), 'x: .*in the gradients & y: .*gradients'),
  'no gradients': ((None, PARAMS), f'{ALL} & missing in the gradients'),
  'gradients and aux': (((PARAMS, 1.0), PARAMS), f'{ALL} & 0/enc/k: .*missing in the params & 1: '),
  'one array': ((jnp.ones(3), PARAMS), f'{ALL} & missing in the gradients'),
  'gradient shapes': (
    (tree(jnp.ones((3, 2)), jnp.ones(1)), PARAMS),
    r'enc/k: .*2, 3.*3, 2 & enc/b: .*3.*1 & gradient',
  ),
  'gradients as params': (({'w': jnp.ones(3)}, {'w': jnp.ones(4)}), r'w: .*\(4,\).*\(3,\)'),
}


@pytest.mark.parametrize('form', [*FORMS, 'l2_sp'])
@pytest.mark.parametrize('wrap', WRAPS)
@pytest.mark.parametrize('row', UPDATES)
def test_gradients(row: str, wrap: str, form: str) -> None:
  """Catches pytree tracebacks for a forgotten argument, and zip that stops at the shorter list."""
  (gradients, params), patterns = UPDATES[row]
  tx = MAKERS[form]()
  state = tx.init(PARAMS if params is None else params)
  assert_raises(ValueError, patterns, WRAPS[wrap](tx.update), gradients, state, params)


def restacked(tx: Any) -> Any:
  """The state of the transformation with the layers of another `stack_axis`."""
  state = tx.init(PARAMS)
  slices = spd.projection_decay(stack_axis={'enc': 0, 'head': None}).init(PARAMS)
  return state._replace(projection_decay=slices) if hasattr(state, 'inner_state') else slices


STATES = {
  'of Adam': (lambda tx: ADAM.init(PARAMS), 'found tuple & init'),
  'empty': (lambda tx: optax.EmptyState(), 'found EmptyState & init'),
  'none': (lambda tx: None, 'found NoneType & init'),
  'plain dict': (lambda tx: tx.init(PARAMS)._asdict(), 'found dict & init'),
  'the params': (lambda tx: PARAMS, 'found dict & init'),
  'other leaves': (lambda tx: tx.init({'w': jnp.ones(3)}), f'{ALL} & state'),
  'other shapes': (
    lambda tx: tx.init(jax.tree.map(lambda p: jnp.stack([p, p]), PARAMS)),
    rf'{ALL} & enc/k: .*2, 2, 3 & state',
  ),
  'no anchor': (lambda tx: optax.tree.set(tx.init(PARAMS), anchor=None), f'{ALL} & anchor & state'),
  'other slices': (restacked, 'enc/k & enc/b & state'),
}


@pytest.mark.parametrize('wrap', WRAPS)
@pytest.mark.parametrize('form', [*FORMS, 'l2_sp'])
@pytest.mark.parametrize('row', STATES)
def test_states(row: str, form: str, wrap: str) -> None:
  """Catches AttributeErrors from inside, and states that fit by accident and change their shape."""
  tx, (state, patterns) = MAKERS[form](), STATES[row]
  if row != 'other slices' or form in FORMS:
    error = TypeError if 'found' in patterns else ValueError
    assert_raises(error, patterns, WRAPS[wrap](tx.update), PARAMS, state(tx), PARAMS)


OWN = spd.projection_decay().init(PARAMS)
SIBLINGS = {
  'of the link': (spd.adam_spd(1e-3), OWN, 'WithProjectionDecayState & found ProjectionDecayState'),
  'of the wrapper': (
    spd.projection_decay(),
    spd.adam_spd(1e-3).init(PARAMS),
    'ProjectionDecayState & found WithProjectionDecayState',
  ),
  'dict inside': (
    spd.adam_spd(1e-3),
    spd.WithProjectionDecayState(OWN._asdict(), ADAM.init(PARAMS)),
    'ProjectionDecayState & found dict & init',
  ),
  'other groups': (spd.projection_decay(group=lambda path: 'all'), OWN, 'enc/k & enc/b & head'),
}


@pytest.mark.parametrize('row', SIBLINGS)
def test_states_of_siblings(row: str) -> None:
  """Catches duck typing among our own states."""
  tx, state, patterns = SIBLINGS[row]
  error = TypeError if 'found' in patterns else ValueError
  assert_raises(error, patterns, jax.jit(tx.update), PARAMS, state, PARAMS)


STATIC = 'inject_hyperparams & static_args'
INJECTED = {
  'zero anchor': ({'anchor': 0}, f'anchor & {STATIC}'),
  'stack axis': ({'stack_axis': 0}, f'stack_axis & {ALL} & {STATIC}'),
  'group': ({'group': lambda path: 'all'}, f'group & {STATIC}'),
  'dtype': ({'anchor_dtype': jnp.bfloat16}, f'anchor_dtype & {STATIC}'),
}


@pytest.mark.parametrize('wrap', WRAPS)
@pytest.mark.parametrize('row', INJECTED)
def test_options_traced_by_inject_hyperparams(row: str, wrap: str) -> None:
  """Catches options that optax turns into arrays without a word of how to prevent it."""
  options, patterns = INJECTED[row]
  tx = optax.inject_hyperparams(spd.projection_decay)(**options)
  assert_raises((TypeError, ValueError), patterns, WRAPS[wrap](tx.init), PARAMS)


@pytest.mark.parametrize('form', [*FORMS, 'l2_sp'])
def test_traced_numbers_must_be_scalars(form: str) -> None:
  """Catches a vector that broadcasts against the leaves, from a tracer or a schedule."""

  def step(**options: Any) -> Any:
    tx = MAKERS[form](**options)
    return tx.update(PARAMS, tx.init(PARAMS), PARAMS)

  error = (TypeError, ValueError)
  assert_raises(error, 'strength & number', jax.jit(lambda s: step(strength=s)), jnp.ones(3))
  assert_raises(error, 'strength & number', step, strength=lambda count: jnp.ones(3))
  if form != 'l2_sp':
    assert_raises(error, 'margin & number', jax.jit(lambda m: step(margin=m)), jnp.zeros(3))


def test_two_leaves_of_one_path() -> None:
  """Catches layers that overwrite each other in the state's dicts."""
  params = {'a': {'b/c': jnp.ones(2)}, 'a/b': {'c': jnp.ones(2)}}
  assert_raises(ValueError, 'a/b/c & rename', spd.projection_decay().init, params)
