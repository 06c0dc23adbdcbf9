"""Wrong calls with params, gradients, states and files; see `wrong_calls`."""

import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from wrong_calls import (
  ADAM,
  ALL,
  FORMS,
  LEAVES,
  MAKERS,
  PARAMS,
  WRAPS,
  Row,
  Tensor,
  as_type,
  dealt,
  every,
  tree,
)

import spd_optax as spd

Table = list[tuple[str, Callable[[], Any], type[Exception], str]]

NO_ARRAYS = 'expected a tree of arrays, of JAX or NumPy, found'
STRUCTS = jax.eval_shape(lambda: PARAMS)
TWICE = jax.tree.map(lambda p: jnp.stack([p, p]), PARAMS)
WRAPPED = spd.adam_spd(1e-3)
FRESH = WRAPPED.init(PARAMS)
TRACED = jnp.zeros(3)
STATE = WRAPPED.update(PARAMS, FRESH, PARAMS)[1]
DROPPED = spd.drop_anchor(STATE)
FOLDER = Path(tempfile.mkdtemp())
NPZ = FOLDER / 'a.npz'
np.savez(NPZ, **{'enc/k': np.ones((2, 3)), 'enc/b': np.ones(3), 'head': np.ones(())})


def deleted() -> Any:
  array = jnp.ones(3)
  array.delete()
  return tree(b=array)


INITS: dict[str, tuple[Any, str]] = {
  'nothing': (None, 'params: expected a tree of arrays, found None'),
  'strings': (every('x'), f"params: {NO_ARRAYS} & {ALL} & str 'x'"),
  'a path': ('model.npz', rf"{NO_ARRAYS} & \(root\): str 'model.npz'; load_anchor"),
  'tensors': (tree(b=Tensor()), rf'{NO_ARRAYS} & enc/b: .*Tensor torch.float32\[3\]'),
  'objects': (tree(b=np.array([None])), rf'{NO_ARRAYS} & enc/b: object\[1\]'),
  'a function': (tree(head=max), f'{NO_ARRAYS} & head: builtin_function'),
  'an optimizer': (ADAM, f'{NO_ARRAYS} & init: function & update: function'),
  'structs': (STRUCTS, rf'{ALL} & enc/k: float32\[2, 3\], a shape without values'),
  'deleted': (deleted(), r'enc/b: float32\[3\], deleted \(donated to jit\?\)'),
}

GRADIENTS: dict[str, tuple[Any, Any, str]] = {
  'no params': (PARAMS, None, r'update\(gradients, state, params\)'),
  'too few': ({'enc': {}, 'head': 1.0}, PARAMS, 'enc/k: .*missing & enc/b: .*missing'),
  'too many': (tree(x=1.0, y=1.0), PARAMS, 'x: .*in the gradients & y: .*gradients'),
  'none': (None, PARAMS, f'{ALL} & missing in the gradients'),
  'with aux': ((PARAMS, 1.0), PARAMS, f'{ALL} & 0/enc/k: .*missing in the params & 1: '),
  'one array': (jnp.ones(3), PARAMS, f'{ALL} & missing in the gradients'),
  'shapes': (
    tree(jnp.ones((3, 2)), jnp.ones(1)),
    PARAMS,
    r'enc/k: .*2, 3.*3, 2 & enc/b: .*3.*1 & gradient',
  ),
  'of other params': ({'w': jnp.ones(3)}, {'w': jnp.ones(4)}, r'w: .*\[4\].*\[3\]'),
  'integers': (as_type(int), PARAMS, rf'{ALL} & enc/b: param float32\[3\], gradients? int'),
  'flags': (as_type(bool), PARAMS, rf'{ALL} & enc/b: param float32\[3\], gradients? bool'),
  'complex': (
    as_type(complex),
    PARAMS,
    rf'{ALL} & enc/b: param float32\[3\], gradients? complex64',
  ),
}
NO_GRADIENTS: dict[str, tuple[Any, str]] = {
  'a function': (jax.grad(jnp.sum), rf'gradients: {NO_ARRAYS} & \(root\): function'),
  'strings': (every('x'), f"gradients: {NO_ARRAYS} & {ALL} & str 'x'"),
  'tensors': (tree(b=Tensor()), f'gradients: {NO_ARRAYS} & enc/b: .*torch.float32'),
  'structs': (STRUCTS, f'gradients: {NO_ARRAYS} & {ALL} & a shape without values'),
}


def own(tx: Any) -> Any:
  """The state, and inside of which the part of SPD."""
  state = tx.init(PARAMS)
  return getattr(state, 'projection_decay', state)


def with_own(tx: Any, **fields: Any) -> Any:
  state, part = tx.init(PARAMS), own(tx)._replace(**fields)
  return state._replace(projection_decay=part) if hasattr(state, 'inner_state') else part


def restacked(tx: Any) -> Any:
  """The state of the transformation with the layers of another `stack_axis`."""
  slices = spd.projection_decay(stack_axis={'enc': 0, 'head': None}).init(PARAMS)
  return with_own(tx, constrained=slices.constrained)


STATES: dict[str, tuple[Callable[[Any], Any], type[Exception], str]] = {
  'of Adam': (lambda tx: ADAM.init(PARAMS), TypeError, 'found tuple & init'),
  'empty': (lambda tx: optax.EmptyState(), TypeError, 'found EmptyState & init'),
  'none': (lambda tx: None, TypeError, 'found NoneType & init'),
  'plain dict': (lambda tx: tx.init(PARAMS)._asdict(), TypeError, 'found dict & init'),
  'the params, swapped': (lambda tx: PARAMS, TypeError, 'found dict & init'),
  'of a chain': (lambda tx: (tx.init(PARAMS), ADAM.init(PARAMS)), TypeError, 'found tuple & init'),
  'other leaves': (lambda tx: tx.init({'w': jnp.ones(3)}), ValueError, f'{ALL} & state'),
  'other shapes': (lambda tx: tx.init(TWICE), ValueError, rf'{ALL} & enc/k: .*2, 2, 3 & state'),
  'no anchor': (lambda tx: with_own(tx, anchor=None), ValueError, f'{ALL} & anchor & state'),
  'dropped anchor': (
    lambda tx: spd.drop_anchor(tx.init(PARAMS)),
    ValueError,
    f'{ALL} & dropped',
  ),
  'of two runs': (
    lambda tx: jax.tree.map(lambda x: jnp.stack([x, x]), tx.init(PARAMS)),
    ValueError,
    rf'{ALL} & enc/k: .*2, 2, 3 & state',
  ),
  'other slices': (restacked, ValueError, 'enc/k & enc/b & state'),
}

OWN = spd.projection_decay().init(PARAMS)
OTHER = optax.sgd(1.0, 0.9).init(PARAMS)
SIBLINGS: list[tuple[str, Any, Any, type[Exception], str]] = [
  ('adam_spd', WRAPPED, OWN, TypeError, 'WithProjectionDecayState & found ProjectionDecayState'),
  ('projection_decay', spd.projection_decay(), FRESH, TypeError, 'found WithProjectionDecayState'),
  (
    'adam_spd',
    WRAPPED,
    spd.WithProjectionDecayState(OWN._asdict(), FRESH.inner_state),
    TypeError,
    'ProjectionDecayState & found dict & init',
  ),
  (
    'projection_decay',
    spd.projection_decay(group=lambda path: 'all'),
    OWN,
    ValueError,
    'enc/k & enc/b & head',
  ),
]


def stepping(tx: Any, gradients: Any = PARAMS, state: Any = None, params: Any = PARAMS) -> Any:
  return tx.update(gradients, tx.init(PARAMS) if state is None else state, params)


def stepped(wrap: Any, function: str, gradients: Any, change: Any, params: Any) -> Any:
  """One step by 'name.update' or 'name.apply', from a state that `change` makes for the params."""
  name, _, method = function.partition('.')
  tx = MAKERS[name]()
  state = change(tx)
  return wrap(getattr(tx, method))(gradients, state, params)


UPDATES = [f'{name}.update' for name in MAKERS]
STEPS = [*UPDATES, *(f'{name}.apply' for name in FORMS[1:])]  # all that take a step


def steps() -> Iterator[Row]:
  """Of `init`, `update` and `apply`."""
  for (mistake, (params, text)), name, _ in dealt(list(INITS.items()), list(MAKERS)):
    call = partial(MAKERS[name]().init, params)
    yield Row(f'{name}.init', 'params', mistake, call, TypeError, text)
  for name, argument, mistake, gradients, params, error, text, (how, wrap) in wrong_gradients():
    change = lambda tx, p=params: tx.init(PARAMS if p is None else p)  # noqa: E731
    call = partial(stepped, wrap, name, gradients, change, params)
    yield Row(name, argument, f'{mistake}, {how}', call, error, text)
  for (mistake, (change, error, text)), name, (how, wrap) in dealt(list(STATES.items()), STEPS):
    call = partial(stepped, wrap, name, PARAMS, change, PARAMS)
    yield Row(name, 'state', f'{mistake}, {how}', call, error, text)
  for option, name in (('strength', 'l2_sp'), ('margin', 'projection_decay')):
    call = partial(
      jax.jit(lambda value, o=option, n=name: stepping(MAKERS[n](**{o: value}))), TRACED
    )
    yield Row(name, option, 'a traced vector', call, ValueError, f'{option}: expected .* number')
  for mistake, name, (how, wrap) in dealt(['too few', 'too many', 'both', 'tuple'], list(MAKERS)):
    anchor, text = LEAVES[mistake]
    tx = MAKERS[name]
    call = partial(wrap(tx(anchor).update), PARAMS, tx().init(PARAMS), PARAMS)
    yield Row(name, 'anchor', f'{mistake}, at an update, {how}', call, ValueError, text)
  schedules = [(jnp.ones(3), ValueError), ('x', TypeError)]
  for (value, error), name, _ in dealt(schedules, ['with_projection_decay', 'l2_sp']):
    call = partial(stepping, MAKERS[name](strength=lambda count, value=value: value))
    text = 'strength: expected a schedule that returns a number ≥ 0'
    yield Row(name, 'strength', f'schedule of {value!r}', call, error, text)
  for name, tx, state, error, text in SIBLINGS:
    call = partial(jax.jit(tx.update), PARAMS, state, PARAMS)
    yield Row(f'{name}.update', 'state', f'of another, {text}', call, error, text)
  same = {'a': {'b/c': jnp.ones(2)}, 'a/b': {'c': jnp.ones(2)}}
  call = partial(spd.projection_decay().init, same)
  yield Row('projection_decay.init', 'params', 'one path', call, ValueError, 'a/b/c & rename')


def wrong_gradients() -> Iterator[Any]:
  """(function, argument, mistake, gradients, params, error, text, wrap)."""
  without = [(mistake, *row) for mistake, row in GRADIENTS.items() if row[1] is None]
  for (mistake, gradients, params, text), name, wrap in dealt(without, STEPS):
    yield name, 'params', mistake, gradients, params, ValueError, text, wrap
  others = [(mistake, *row) for mistake, row in GRADIENTS.items() if row[1] is not None]
  for (mistake, gradients, params, text), name, wrap in dealt(others, STEPS):
    argument = 'gradients' if name.endswith('.apply') else 'updates'
    yield name, argument, mistake, gradients, params, ValueError, text, wrap
  for (mistake, (gradients, text)), name, _ in dealt(list(NO_GRADIENTS.items()), UPDATES):
    # jit itself takes only arrays.
    yield name, 'updates', mistake, gradients, PARAMS, TypeError, text, WRAPS[0]


NO_STATE = 'expected the state of an optimizer with SPD in it, found'
PUT, RE = r'put_anchor\(opt_state, anchor\)', r'reanchor\(opt_state, params\)'
EXCHANGE: Table = [
  ('drop_anchor.opt_state', lambda: spd.drop_anchor(PARAMS), TypeError, f'{NO_STATE} dict'),
  ('drop_anchor.opt_state', lambda: spd.drop_anchor(None), TypeError, f'{NO_STATE} NoneType'),
  ('drop_anchor.opt_state', lambda: spd.drop_anchor(WRAPPED), TypeError, f'{NO_STATE} an optax'),
  ('drop_anchor.opt_state', lambda: spd.drop_anchor(DROPPED), ValueError, 'dropped already'),
  ('put_anchor.opt_state', lambda: spd.put_anchor(PARAMS, DROPPED), TypeError, f'{NO_STATE} dict'),
  (
    'put_anchor.opt_state',
    lambda: spd.put_anchor(STATE, PARAMS),
    ValueError,
    f'{PUT}: .*see reanchor',
  ),
  (
    'put_anchor.opt_state',
    lambda: spd.put_anchor(jax.eval_shape(spd.drop_anchor, STATE), PARAMS),
    TypeError,
    'a state of values',
  ),
  ('put_anchor.anchor', lambda: spd.put_anchor(DROPPED, None), ValueError, f'{ALL} & nothing'),
  ('put_anchor.anchor', lambda: spd.put_anchor(DROPPED, 'a.npz'), TypeError, f'{PUT} & str'),
  ('put_anchor.anchor', lambda: spd.put_anchor(DROPPED, TWICE), ValueError, f'{ALL} & dropped'),
  ('put_anchor.anchor', lambda: spd.put_anchor(DROPPED, every('x')), TypeError, f'{ALL} & str'),
  ('put_anchor.anchor', lambda: spd.put_anchor(DROPPED, STRUCTS), TypeError, f'{ALL} & without'),
  ('put_anchor.anchor', lambda: spd.put_anchor(DROPPED, as_type(complex)), ValueError, ALL),
  ('put_anchor.anchor', lambda: spd.put_anchor(DROPPED, as_type(int)), ValueError, f'{ALL} & int'),
  ('put_anchor.anchor', lambda: jax.jit(spd.put_anchor)(DROPPED, PARAMS), TypeError, 'outside jit'),
  ('reanchor.opt_state', lambda: spd.reanchor(PARAMS, STATE), TypeError, f'{NO_STATE} dict'),
  (
    'reanchor.opt_state',
    lambda: spd.reanchor(spd.l2_sp(0).init(PARAMS), PARAMS),
    ValueError,
    f'{RE}: the state stores no anchor',
  ),
  ('reanchor.params', lambda: spd.reanchor(STATE, None), TypeError, 'params: .*found None'),
  ('reanchor.params', lambda: spd.reanchor(STATE, TWICE), ValueError, f'{RE} & {ALL}'),
  ('reanchor.params', lambda: spd.reanchor(DROPPED, TWICE), ValueError, f'{RE} & {ALL} & dropped'),
  ('reanchor.params', lambda: spd.reanchor(STATE, {'enc': {}}), ValueError, f'{ALL} & nothing'),
  ('reanchor.params', lambda: spd.reanchor(STATE, as_type(int)), ValueError, f'{ALL} & int32'),
  ('reanchor.params', lambda: spd.reanchor(STATE, as_type(complex)), ValueError, ALL),
  ('reanchor.params', lambda: spd.reanchor(STATE, every('x')), TypeError, f'{NO_ARRAYS} & {ALL}'),
  ('reanchor.params', lambda: spd.reanchor(STATE, STRUCTS), TypeError, f'{ALL} & without values'),
  ('fingerprint.anchor', lambda: spd.fingerprint(None), TypeError, 'expected arrays'),
  ('fingerprint.anchor', lambda: spd.fingerprint(STATE), TypeError, 'state give optax.tree.get'),
  ('fingerprint.anchor', lambda: spd.fingerprint({'a': 'x'}), TypeError, "a: str 'x'"),
  ('fingerprint.anchor', lambda: spd.fingerprint({'a': Tensor()}), TypeError, 'a: .*Tensor'),
  ('fingerprint.anchor', lambda: spd.fingerprint(STRUCTS), TypeError, f'{ALL} & without values'),
  (
    'interpolate.anchor',
    lambda: spd.interpolate(None, PARAMS, 0.5),
    TypeError,
    'expected an anchor',
  ),
  ('interpolate.anchor', lambda: spd.interpolate(ADAM, PARAMS, 0.5), TypeError, 'anchor & optax'),
  (
    'interpolate.anchor',
    lambda: spd.interpolate(STRUCTS, PARAMS, 0.5),
    TypeError,
    'anchor with values',
  ),
  (
    'interpolate.anchor',
    lambda: spd.interpolate(FRESH, PARAMS, 0.5),
    ValueError,
    f'{ALL} & anchor',
  ),
  ('interpolate.params', lambda: spd.interpolate(PARAMS, None, 0.5), TypeError, 'params & None'),
  ('interpolate.params', lambda: spd.interpolate(0, every('x'), 0.5), TypeError, f'{ALL} & str'),
  ('interpolate.alpha', lambda: spd.interpolate(PARAMS, PARAMS, PARAMS), TypeError, 'alpha & dict'),
  ('interpolate.alpha', lambda: spd.interpolate(PARAMS, PARAMS, 'x'), TypeError, 'alpha & str'),
  ('interpolate.alpha', lambda: spd.interpolate(PARAMS, PARAMS, None), TypeError, 'alpha & None'),
  ('interpolate.alpha', lambda: spd.interpolate(PARAMS, PARAMS, True), TypeError, 'alpha & bool'),
  ('interpolate.alpha', lambda: spd.interpolate(PARAMS, PARAMS, np.nan), ValueError, 'alpha & nan'),
  ('interpolate.alpha', lambda: spd.interpolate(PARAMS, PARAMS, np.ones(3)), ValueError, 'alpha'),
]
LOADING: Table = [
  ('load_anchor.path', lambda: spd.load_anchor('no.npz', PARAMS), FileNotFoundError, 'no.npz: no'),
  ('load_anchor.path', lambda: spd.load_anchor('a\0.npz', PARAMS), FileNotFoundError, 'no such'),
  ('load_anchor.path', lambda: spd.load_anchor(FOLDER, PARAMS), ValueError, 'no Orbax checkpoint'),
  (
    'load_anchor.path',
    lambda: spd.load_anchor(__file__, PARAMS),
    ValueError,
    "unknown .*'.py' & Orb",
  ),
  ('load_anchor.like', lambda: spd.load_anchor(NPZ, None), ValueError, 'none of the params is'),
  ('load_anchor.like', lambda: spd.load_anchor(NPZ, every('x')), TypeError, f'like & {ALL} & str'),
  ('load_anchor.like', lambda: spd.load_anchor(NPZ, ADAM), TypeError, 'like & init: function'),
  ('load_anchor.like', lambda: spd.load_anchor(NPZ, TWICE), ValueError, f'{ALL} & does not fit'),
  ('load_anchor.like', lambda: spd.load_anchor(NPZ, {'w': 1.0}), ValueError, 'none of the params'),
  (
    'load_anchor.like',
    lambda: spd.load_anchor(NPZ, {'enc': {'k': 1.0}, 'enc.k': 1.0}),
    ValueError,
    '^ *enc/k, enc.k & like: leaves .* told apart',
  ),
  (
    'load_anchor.like',
    lambda: jax.jit(partial(spd.load_anchor, NPZ))(PARAMS),
    TypeError,
    'outside jit',
  ),
  (
    'load_anchor.key',
    lambda: spd.load_anchor(NPZ, PARAMS, key='a'),
    ValueError,
    "none .*under 'a'",
  ),
  (
    'load_anchor.rename',
    lambda: spd.load_anchor(NPZ, PARAMS, rename='x'),
    TypeError,
    "rename: .*function, a dict.*'x'",
  ),
  (
    'load_anchor.rename',
    lambda: spd.load_anchor(NPZ, PARAMS, rename=lambda path: 3),
    TypeError,
    f'rename: .*axes & {ALL} & int 3',
  ),
  (
    'load_anchor.rename',
    lambda: spd.load_anchor(NPZ, PARAMS, rename=lambda path: (path, 'ab')),
    TypeError,
    f'rename: .*axes & {ALL}',
  ),
  (
    'load_anchor.rename',
    lambda: spd.load_anchor(NPZ, PARAMS, rename=lambda path: (path, 1)),
    TypeError,
    f'rename: .*axes & {ALL} & tuple',
  ),
  (
    'load_anchor.rename',
    lambda: spd.load_anchor(NPZ, PARAMS, rename={'no': 'enc'}),
    ValueError,
    'not the path of a param .*enc/k & no',
  ),
  (
    'load_anchor.rename',
    lambda: spd.load_anchor(NPZ, PARAMS, rename=lambda path: f'x/{path}'),
    ValueError,
    'entries that are not there & enc/k: x/enc/k',
  ),
  (
    'load_anchor.strict',
    lambda: spd.load_anchor(NPZ, {'enc': {'k': jnp.ones((2, 3))}, 'new': 1.0}, strict=True),
    ValueError,
    'not the same leaves: & ^ *new: & ^ *enc/b: & ^ *head: ',
  ),
]
