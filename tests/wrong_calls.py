"""Wrong calls of what makes and steps a transformation; `wrong_calls_test` makes each of them.

A row is (function, argument): mistake, call, error, fragments of the message. The fragments
are patterns, each of which the message must have: where it happened (`enc/b`), what was
found there, and what to pass instead.

The transformations share their checks, so each mistake is made once, and each argument of each
function meets one mistake at least: `dealt` pairs them.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import spd_optax as spd

PARAMS = {'enc': {'k': jnp.ones((2, 3)), 'b': jnp.zeros(3)}, 'head': jnp.ones(())}
ADAM = optax.adam(1e-3)
ALL = '^ *enc/k & ^ *enc/b & ^ *head'
STATIC = 'inject_hyperparams & static_args'


class Row(NamedTuple):
  """One mistake, in one argument of one public function."""

  function: str
  argument: str
  mistake: str
  call: Callable[[], Any]
  error: type[Exception]
  fragments: str


class Tensor:
  """What a tensor of another library looks like."""

  shape, dtype = (3,), 'torch.float32'


def tree(k: Any = PARAMS['enc']['k'], b: Any = PARAMS['enc']['b'], **top: Any) -> Any:
  """The params, with other leaves in some places."""
  return {'enc': {'k': k, 'b': b}, 'head': PARAMS['head'], **top}


def every(value: Any) -> Any:
  return jax.tree.map(lambda p: value, PARAMS)


def as_type(dtype: Any) -> Any:
  return jax.tree.map(lambda p: jnp.ones(p.shape, dtype), PARAMS)


MAKERS: dict[str, Callable[..., Any]] = {
  'projection_decay': spd.projection_decay,
  'with_projection_decay': partial(spd.with_projection_decay, ADAM),
  'adam_spd': partial(spd.adam_spd, 1e-3),
  'l2_sp': spd.l2_sp,
}
FORMS = list(MAKERS)[:3]
WRAPS: list[tuple[str, Callable[..., Any]]] = [
  ('eager', lambda function: function),
  ('jit', jax.jit),
]


def dealt(mistakes: Sequence[Any], functions: Sequence[Any]) -> Iterator[Any]:
  """(mistake, function, wrap): every mistake and every function once, with and without jit."""
  for i in range(max(len(mistakes), len(functions))):
    wrap = WRAPS[(i + i // len(functions)) % 2]
    yield mistakes[i % len(mistakes)], functions[i % len(functions)], wrap


NUMBER = 'strength: expected a finite number ≥ 0 or a schedule, found'
ANCHOR = 'anchor: expected a tree of arrays, 0 or None, found'
DTYPE = 'anchor_dtype: expected a floating dtype such as jnp.bfloat16, found'
FREE = "free: expected a pattern of paths such as 'head', or a list of patterns, found"
FRACTION = r'expected a number in \[0, 1\)'
# Wrong whatever the params are: raised where the transformation is made.
OPTIONS: list[tuple[str, Any, type[Exception], str]] = [
  ('strength', -1.0, ValueError, f'{NUMBER} -1.0'),
  ('strength', np.float32(-2.0), ValueError, f'{NUMBER} -2'),
  ('strength', float('nan'), ValueError, f'{NUMBER} nan'),
  ('strength', float('inf'), ValueError, f'{NUMBER} inf'),
  ('strength', np.ones(2), ValueError, rf'{NUMBER} \[1. 1.\]'),
  ('strength', '1', TypeError, f"{NUMBER} str '1'"),
  ('strength', np.array('1'), TypeError, f'{NUMBER} str'),
  ('strength', None, TypeError, f'{NUMBER} NoneType'),
  ('strength', True, TypeError, f'{NUMBER} bool True'),
  ('strength', np.array(1j), TypeError, f'{NUMBER} complex128'),
  ('strength', PARAMS, TypeError, f'{NUMBER} dict'),
  ('strength', ADAM, TypeError, f'{NUMBER} an optax transformation'),
  ('anchor', ADAM, TypeError, rf'{ANCHOR} an optax & with_projection_decay'),
  ('anchor', optax.adam, TypeError, f'{ANCHOR} function'),
  ('anchor', 0.01, TypeError, rf'{ANCHOR} float 0.01; .* strength='),
  ('anchor', 0.0, TypeError, rf'{ANCHOR} float 0.0; .* strength='),
  ('anchor', 2, TypeError, rf'{ANCHOR} int 2; .* strength='),
  ('anchor', spd.within_budget(0.1), TypeError, f'{ANCHOR} Budget; .* strength='),
  ('anchor_dtype', jnp.int8, TypeError, f'{DTYPE} .*int8 & {STATIC}'),
  ('anchor_dtype', 'bf16', TypeError, f"{DTYPE} 'bf16'"),
  ('anchor_dtype', jnp.complex64, TypeError, f'{DTYPE} .*complex64'),
  ('anchor_dtype', 16, TypeError, f'{DTYPE} 16'),
  ('margin', -0.1, ValueError, f'margin: {FRACTION}, found -0.1'),
  ('margin', 1.0, ValueError, f'margin: {FRACTION}, found 1.0'),
  ('margin', float('nan'), ValueError, f'margin: {FRACTION}, found nan'),
  ('margin', np.zeros(2), ValueError, rf'margin: {FRACTION}, found \[0. 0.\]'),
  ('margin', lambda count: 0.1, TypeError, f'margin: {FRACTION}, found function'),
  ('margin', '0.1', TypeError, f"margin: {FRACTION}, found str '0.1'"),
  ('margin', False, TypeError, f'margin: {FRACTION}, found bool False'),
  ('rule', 3, TypeError, 'rule: expected an instance of spd.Rule, found int 3'),
  (
    'rule',
    'projection',
    TypeError,
    "rule: expected an instance of spd.Rule, found str 'projection'",
  ),
  (
    'rule',
    ADAM,
    TypeError,
    'rule: expected an instance of spd.Rule, found an optax transformation',
  ),
  ('group', 3, TypeError, f'group: expected a function path -> key .*int 3 & {STATIC}'),
  ('group', '', TypeError, "group: expected a function path -> key .* a pattern .*str ''"),
  ('group', {'enc': 'a', 'head': 'b'}, TypeError, 'group: expected a function path -> key .* dict'),
  ('free', 3, TypeError, f'{FREE} int 3'),
  ('free', '', TypeError, f"{FREE} str ''"),
  ('free', ['head', '/'], TypeError, f'{FREE} list'),
  ('free', {'head': True}, TypeError, f'{FREE} dict'),
  ('free', lambda path: path == 'head', TypeError, f'{FREE} function'),
  ('anchor_ema', 1, ValueError, f'anchor_ema: {FRACTION}, or None, found 1'),
  ('anchor_ema', '0.9', TypeError, f"anchor_ema: {FRACTION}, or None, found str '0.9'"),
  ('anchor_ema', True, TypeError, f'anchor_ema: {FRACTION}, or None, found bool True'),
  ('anchor_memory_kind', 'host', ValueError, "expected 'pinned_host' or None, found 'host'"),
  ('anchor_memory_kind', np.ones(2), ValueError, "expected 'pinned_host' or None, found array"),
]

RATE = 'learning_rate: expected a finite number ≥ 0 or a schedule, found'
ADAMS: list[tuple[str, Any, type[Exception], str]] = [
  ('learning_rate', PARAMS, TypeError, rf'adam_spd\(learning_rate, anchor\): {RATE} dict'),
  ('learning_rate', jnp.ones(3), ValueError, rf'{RATE} \[1. 1. 1.\]'),
  ('learning_rate', ADAM, TypeError, f'{RATE} an optax transformation'),
  ('learning_rate', '1e-3', TypeError, f"{RATE} str '1e-3'"),
  ('learning_rate', None, TypeError, f'{RATE} NoneType'),
  ('learning_rate', -1e-3, ValueError, f'{RATE} -0.001'),
  ('learning_rate', float('nan'), ValueError, f'{RATE} nan'),
  ('learning_rate', True, TypeError, f'{RATE} bool True'),
]

FIRST = r'with_projection_decay\(optimizer, anchor\): expected an optax optimizer first, .* found'
OPTIMIZERS: list[tuple[Any, str]] = [
  (PARAMS, f'{FIRST} dict'),
  (1e-3, f'{FIRST} float 0.001'),
  (optax.adam, f'{FIRST} function'),
  (optax.constant_schedule(1e-3), f'{FIRST} function'),
  (None, f'{FIRST} NoneType'),
  ('adam', f"{FIRST} str 'adam'"),
  (ADAM.init(PARAMS), f'{FIRST} tuple'),
  ((ADAM.init, ADAM.update), f'{FIRST} tuple'),
]

LEAVES: dict[str, tuple[Any, str]] = {
  'too few': ({'enc': {}, 'head': 0}, 'enc/k: .*missing in anchor & enc/b: & None'),
  'too many': (tree(new={'x': 0, 'y': 0}), 'new/x: .*missing in the params & new/y: '),
  'both': ({'enc': {'k': 0, 'z': 0}, 'head': 0}, 'enc/b: .*in anchor & enc/z: .*in the params'),
  'variables': ({'params': tree()}, r'leaves it out\): & ^ *enc/k: & ^ *params/enc/k: '),
  'part': (tree()['enc'], 'head: .*missing & ^ *k: '),
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
  'objects': (tree(b=np.array([None] * 3)), r'enc/b: found object\[3\]'),
  'tensors': (tree(b=Tensor()), r'enc/b: found .*Tensor torch.float32\[3\]'),
  'file names': (tree('k.npy', 'b.npy'), "enc/k: .*'k.npy' & enc/b: .*'b.npy' & array"),
  'file name': ('ckpt.npz', f"{ALL} & found str 'ckpt.npz' & array"),
  'initializers': (tree(jax.nn.initializers.zeros, max), 'enc/k: & enc/b: & array'),
  'optimizers': (tree(ADAM), 'enc/k'),
  'lists': (tree(b=[0.0, 0.0, 0.0]), 'enc/b: .*missing in anchor'),
  'number': ({'enc': 1.0, 'head': 0}, 'enc/k: .*1.0.*float32 & enc/b: .*1.0.*float32 & array & 0'),
  'one': ({'enc': 1, 'head': 0}, 'enc/k: .*int 1.*float32 & enc/b: & array & 0'),
  'flag': (True, 'enc/k: .*True & enc/b: .*True & None'),
  'zero as an array': (jnp.zeros(()), r'enc/k: .*float32\[\] & enc/b: .*float32\[\] & 0'),
}


def by_path(**values: Any) -> Any:
  return lambda path, leaf: values[path.split('/')[-1]]


def first_part(path: str) -> str:
  return path.split('/')[0]


LAYERS: list[tuple[dict[str, Any], str]] = [
  ({'axis_name': 3}, f'{ALL} & axis_name: a name .* & int 3'),
  ({'axis_name': lambda path, leaf: 0}, f'{ALL} & axis_name: a name .* & int 0'),
  ({'stack_axis': 2}, rf'{ALL} & enc/k: .*2.*\(2, 3\) & None'),
  ({'stack_axis': -3}, rf'{ALL} & enc/k: .*-3.*\(2, 3\)'),
  ({'stack_axis': 0}, r'head: .*0.*\(\) & None'),
  ({'stack_axis': by_path(k=2, b=1, head=None)}, r'enc/k: .*2 & enc/b: .*1'),
  ({'stack_axis': 1.0}, f'{ALL} & enc/k: .*1.0 & int'),
  ({'stack_axis': '0'}, f"{ALL} & enc/k: .*'0' & int"),
  ({'stack_axis': True}, f'{ALL} & enc/k: .*True & int'),
  ({'stack_axis': jnp.array(0)}, f'{ALL} & int & static_args'),
  ({'stack_axis': {'enc': 0}}, 'head: .*missing in stack_axis & None'),
  ({'stack_axis': tree(0, 0, head=None, x=1)}, 'x: .*missing in the params'),
  ({'stack_axis': [0, None]}, f'{ALL} & stack_axis & prefix'),
  ({'axis_name': {'enc': 'd'}}, 'head: .*missing in axis_name'),
  ({'axis_name': ['d']}, f'{ALL} & axis_name & prefix'),
  (
    {'stack_axis': by_path(k=0, b=0, head=None), 'group': first_part},
    "group 'enc': & enc/k: 2 & enc/b: 3 & stack_axis",
  ),
  (
    {'stack_axis': by_path(k=0, b=None, head=None), 'group': lambda path: 'all'},
    "group 'all': & enc/k: 2 & enc/b: not stacked & head: not stacked",
  ),
  ({'group': {'enc/k': 'head'}.get}, 'head: a leaf, and a key & group'),
  ({'group': ['enc', 'hed']}, "group: a pattern matches .* & ^ *'hed': .*'head' in head"),
  (
    {'free': ['haed', 'hea', 'overhead', 'enc/x', 'zzz']},
    "free: a pattern matches & no param & ^ *'haed': .*'head' & ^ *'hea': .*'head' & "
    "^ *'overhead': .*'head' & ^ *'enc/x': .*'enc/k' in enc/k & "
    "^ *'zzz': the params are enc/b, enc/k, head",
  ),
  ({'free': '/k'}, "free: & ^ *'/k': .*'k' in enc/k"),
  ({'free': 'head/*'}, "free: & ^ *'head/\\*': "),
  ({'free': 'Head'}, "free: & ^ *'Head': .*'head'"),
  ({'free': 'h'}, "free: & ^ *'h': the params are"),
  ({'stack_axis': {0: ['ecn', 'k'], 1: 'enc/q'}}, "^ *'ecn': .*'enc' & ^ *'enc/q': .*'enc/k'"),
  ({'stack_axis': {0: 'enc', '1': 'k'}}, 'enc/k: 0, 1 & several axes'),
  ({'stack_axis': {'enc': 'k', 'head': 'b'}}, "'enc' & 'head' & belong to an axis, as in {0: "),
  ({'stack_axis': {1: 'enc'}}, r'enc/b: stack axis 1, shape \(3,\) & None'),
  ({'stack_axis': {0: 'enc'}, 'group': 'enc'}, "group 'enc': & enc/k: 2 & enc/b: 3"),
]
INJECTED: list[tuple[dict[str, Any], str]] = [
  ({'anchor': 0}, f'anchor & {STATIC}'),
  ({'stack_axis': 0}, f'stack_axis & {ALL} & {STATIC}'),
  ({'group': lambda path: 'all'}, f'group & {STATIC}'),
  ({'anchor_dtype': jnp.bfloat16}, f'anchor_dtype & {STATIC}'),
]


def by_argument(table: Sequence[Any], argument: Callable[[Any], str]) -> dict[str, list[Any]]:
  """The mistakes of each argument."""
  found: dict[str, list[Any]] = {}
  for row in table:
    found.setdefault(argument(row), []).append(row)
  return found


def made_and_initialized(wrap: Any, make: Any, options: Any) -> Any:
  """Makes the transformation, and its state for the params."""
  return wrap(make(**options).init)(PARAMS)


def rows() -> Iterator[Row]:
  """Every row."""
  for option, mistakes in by_argument(OPTIONS, lambda row: row[0]).items():
    everywhere = {'strength', 'anchor', 'anchor_dtype', 'group', 'free'}
    names = list(MAKERS) if option in everywhere else FORMS
    for (_, value, error, text), name, _ in dealt(mistakes, names):
      call = partial(MAKERS[name], **{option: value})
      yield Row(name, option, f'{value!r:.30}', call, error, text)
  for name in FORMS:
    for margin in (0.3, np.float32(0.3)):
      call = partial(MAKERS[name], rule=spd.Projection(), margin=margin)
      yield Row(name, 'rule+margin', f'{margin!r}', call, TypeError, 'margin=.*0.3.* rule=')
  in_rule = [
    ('Projection', lambda: spd.with_projection_decay(ADAM, rule=spd.Projection(margin=1.0))),
    ('GradientTurn', lambda: spd.projection_decay(rule=spd.GradientTurn(margin=1.0))),
  ]
  for name, call in in_rule:
    yield Row(name, 'margin', 'one', call, ValueError, f'margin: {FRACTION}, found 1.0')
  for near in (-1, float('nan'), float('inf')):
    call = partial(spd.adam_spd, 0.1, rule=spd.Projection(near=near))
    text = f'near: expected a finite number ≥ 0, found {near}'
    yield Row('Projection', 'near', repr(near), call, ValueError, text)
  significant = {
    'z': (float('nan'), 'z: expected a finite number, found nan'),
    'decay': (1.0, f'decay: {FRACTION}, found 1.0'),
    'near': (-1.0, 'near: expected a finite number ≥ 0, found -1.0'),
  }
  for name, (value, text) in significant.items():
    call = partial(spd.adam_spd, 0.1, rule=spd.SignificantProjection(**{name: value}))
    yield Row('SignificantProjection', name, repr(value), call, ValueError, text)
  for (mistake, (anchor, text)), name, (how, wrap) in dealt(list(LEAVES.items()), list(MAKERS)):
    call = partial(made_and_initialized, wrap, MAKERS[name], {'anchor': anchor})
    yield Row(name, 'anchor', f'{mistake}, {how}', call, ValueError, text)
  for name, value, error, text in ADAMS:
    call = partial(spd.adam_spd, **{'learning_rate': 1e-3, name: value})
    yield Row('adam_spd', name, f'{value!r:.30}', call, error, text)
  for value, text in OPTIMIZERS:
    call = partial(spd.with_projection_decay, value)
    yield Row('with_projection_decay', 'optimizer', f'{value!r:.30}', call, TypeError, text)
  for argument, mistakes in by_argument(LAYERS, lambda row: '+'.join(row[0])).items():
    for at, ((options, text), name, (how, wrap)) in enumerate(dealt(mistakes, list(MAKERS))):
      call = partial(made_and_initialized, wrap, MAKERS[name], options)
      yield Row(name, argument, f'{at}, {how}', call, ValueError, text)
  injected = optax.inject_hyperparams(spd.projection_decay)
  for (options, text), _, (how, wrap) in dealt(INJECTED, [injected]):
    call = partial(made_and_initialized, wrap, injected, options)
    error = TypeError if 'anchor_dtype' in options else ValueError
    yield Row('projection_decay', next(iter(options)), f'injected, {how}', call, error, text)
