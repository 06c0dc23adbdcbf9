"""Checks of arguments, made where a transformation is constructed or traced."""

import inspect
import math
import os
import warnings
from collections.abc import Callable, Mapping
from pathlib import PurePath
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

Number = float | jax.Array
NumberOrSchedule = Number | Callable[[Any], Any]

STATIC = "(in optax.inject_hyperparams, name it in static_args=('{name}',))"
ARRAYS = jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct
LIBRARIES = ('spd_optax', 'optax', 'jax', 'flax', 'chex', 'contextlib')


def warn(message: str, category: type[Warning] = UserWarning) -> None:
  """Warns, pointing at the first line up the stack that is the user's."""
  depth, frame = 1, inspect.currentframe()
  while frame is not None and frame.f_globals.get('__name__', '').split('.')[0] in LIBRARIES:
    depth, frame = depth + 1, frame.f_back
  warnings.warn(message, category, stacklevel=depth)


def kind_of(value: Any) -> str:
  """A value in a few words, for messages."""
  if isinstance(value, optax.GradientTransformation):
    return 'an optax transformation'
  if hasattr(value, 'shape') and hasattr(value, 'dtype'):
    kind = type(value)
    foreign = '' if isinstance(value, ARRAYS) else f'{kind.__module__}.{kind.__name__} '
    return f'{foreign}{getattr(value.dtype, "name", value.dtype)}{list(value.shape)}'
  if isinstance(value, str | bytes | int | float | complex | PurePath | None):
    return f'{type(value).__name__} {value!r}'[:80]
  return type(value).__name__


def is_array(value: Any) -> bool:
  """Whether JAX takes it for an array: one of JAX or NumPy, its struct, or a number."""
  if isinstance(value, str | bytes) or not isinstance(value, ARRAYS | int | float | complex):
    return False
  try:
    jnp.result_type(value)
  except (TypeError, ValueError, OverflowError):
    return False
  return True


def _without_values(value: Any) -> str | None:
  """Why a value is no array to compute with."""
  if not is_array(value):
    advice = isinstance(value, str | os.PathLike)
    return kind_of(value) + ('; load_anchor(path, params) reads checkpoints' if advice else '')
  if isinstance(value, jax.ShapeDtypeStruct):
    return f'{kind_of(value)}, a shape without values'
  concrete = isinstance(value, jax.Array) and not isinstance(value, jax.core.Tracer)
  return f'{kind_of(value)}, deleted (donated to jit?)' if concrete and value.is_deleted() else None


def arrays(name: str, leaves: Mapping[str, Any]) -> None:
  """Every leaf, by path, is an array that can be computed with.

  Raises:
    TypeError: naming every other.
  """
  problems = [
    f'{path or "(root)"}: {problem}'
    for path, leaf in leaves.items()
    if (problem := _without_values(leaf))
  ]
  if problems:
    raise TypeError(
      f'{name}: expected a tree of arrays, of JAX or NumPy, found\n  ' + '\n  '.join(problems)
    )


def _scalar(name: str, value: Any, expected: str, in_range: Callable[[Any], bool]) -> None:
  message = f'{name}: expected {expected}, found {{}}'
  real = is_array(value) and not isinstance(value, jax.ShapeDtypeStruct)
  dtype = jnp.result_type(value) if real else None
  if dtype is None or not (jnp.issubdtype(dtype, np.integer) or jnp.issubdtype(dtype, np.floating)):
    raise TypeError(message.format(kind_of(value)))
  if jnp.ndim(value) or not (isinstance(value, jax.core.Tracer) or in_range(value)):
    raise ValueError(message.format(value))


def accepts(name: str, function: Callable[..., Any], *arguments: str) -> None:
  """A function that can be called with these arguments."""
  try:
    inspect.signature(function).bind(*arguments)
  except ValueError:  # some functions of C do not say what they take
    return
  except TypeError as error:
    raise TypeError(f'{name}: expected a function of ({", ".join(arguments)}): {error}') from None


def number_or_schedule(name: str, value: Any) -> None:
  """A finite number ≥ 0, a schedule, or a traced scalar."""
  if callable(value):
    accepts(name, value, 'step')
  else:
    _scalar(name, value, 'a finite number ≥ 0 or a schedule', lambda v: 0 <= v < math.inf)


def at_step(name: str, value: NumberOrSchedule, count: jax.Array) -> Any:
  """The number itself, or what the schedule gives at a step: a scalar."""
  if callable(value):
    value = value(count)
    _scalar(name, value, 'a schedule that returns a number ≥ 0', lambda v: v >= 0)
  return value


def fraction(name: str, value: Any, otherwise: str = '') -> None:
  """A number in [0, 1), or a traced scalar."""
  _scalar(name, value, f'a number in [0, 1){otherwise}', lambda v: 0 <= v < 1)


def non_negative(name: str, value: Any) -> None:
  """A finite number ≥ 0, or a traced scalar."""
  _scalar(name, value, 'a finite number ≥ 0', lambda v: 0 <= v < math.inf)


def alpha(value: Any) -> None:
  """A finite number, or a traced scalar."""
  _scalar('alpha', value, 'a number', lambda v: bool(jnp.isfinite(v)))


def is_count(value: Any) -> bool:
  """Whether it is an integer of 1 or more."""
  is_integer = isinstance(value, int | np.integer) and not isinstance(value, bool)
  return is_integer and value >= 1


def flag(name: str, value: Any) -> None:
  """True or False."""
  if not isinstance(value, bool | np.bool_):
    raise TypeError(f'{name}: expected True or False, found {kind_of(value)}')


def text(name: str, value: Any) -> None:
  """A string."""
  if not isinstance(value, str):
    raise TypeError(f'{name}: expected a string, found {kind_of(value)}')


def path(name: str, value: Any) -> None:
  """A string that is not empty, or another path."""
  if not isinstance(value, str | os.PathLike) or not os.fspath(value):
    raise TypeError(f'{name}: expected the path of a file or directory, found {kind_of(value)}')


def optimizer(value: Any) -> None:
  """Something with the init and update of an optax optimizer."""
  if not all(callable(getattr(value, name, None)) for name in ('init', 'update')):
    advice = '; call it: optax.adam(1e-3), say' if callable(value) else ''
    raise TypeError(
      'with_projection_decay(optimizer, anchor): expected an optax optimizer first, '
      f'found {kind_of(value)}{advice}'
    )


def anchor(value: Any) -> None:
  """Not a transformation or a function; the leaves are checked against the params."""
  if isinstance(value, optax.GradientTransformation) or callable(value):
    raise TypeError(
      f'anchor: expected a tree of arrays, 0 or None, found {kind_of(value)}. '
      'To constrain an optimizer use with_projection_decay(optimizer, anchor); '
      'projection_decay(anchor) is a link of its own in front of it.'
    )


def floating_dtype(name: str, value: Any) -> None:
  """A floating dtype, or None."""
  try:
    is_array = isinstance(value, jax.Array | np.ndarray)
    floating = value is None or (not is_array and jnp.issubdtype(np.dtype(value), jnp.floating))
  except TypeError:
    floating = False
  if not floating:
    raise TypeError(
      f'{name}: expected a floating dtype such as jnp.bfloat16, found {value!r:.60} '
      + STATIC.format(name=name)
    )


def anchor_memory_kind(value: Any) -> None:
  """'pinned_host', or None for the params' own memory."""
  if value is not None and not (isinstance(value, str) and value == 'pinned_host'):
    raise ValueError(f"anchor_memory_kind: expected 'pinned_host' or None, found {value!r:.60}")
  if value and not hasattr(jax, 'memory'):
    raise ValueError(f'anchor_memory_kind: jax {jax.__version__} lacks jax.memory; use a newer jax')


def anchor_ema(value: Any) -> None:
  """A number in [0, 1), a traced scalar, or None."""
  if value is not None:
    fraction('anchor_ema', value, ', or None')


def can_follow(anchor: Mapping[str, Any]) -> None:
  """Not narrower than float32: 1 − anchor_ema of a small deviation would round away."""
  narrow = [f'{p or "(root)"}: {x.dtype}' for p, x in anchor.items() if jnp.finfo(x).bits < 32]
  if narrow:
    raise ValueError(
      'anchor_ema: a slowly following anchor needs float32 or wider (anchor_dtype=jnp.float32):\n  '
      + '\n  '.join(narrow)
    )


def memory_kinds(device: jax.Device) -> set[str]:
  """The kinds of memory that a device can use, but for a CPU's, which are all the host's.

  XLA:CPU aborts where a donated array of one kind is paired with a result of another.
  """
  if device.platform == 'cpu':
    return set()
  return {memory.kind for memory in device.addressable_memories()}


def has_memory_kind(array: jax.Array, memory_kind: str) -> bool:
  """Whether the array's devices have this memory; warns where they do not."""
  traced = isinstance(array, jax.core.Tracer)
  devices = jax.local_devices()[:1] if traced else list(array.sharding.addressable_devices)
  missing = [device for device in devices if memory_kind not in memory_kinds(device)]
  if missing:
    warnings.warn(
      f'anchor_memory_kind={memory_kind!r}: {missing[0].platform} device {missing[0]} has no such '
      'memory beside its own, where the anchor stays. anchor_memory_kind=None says the same.',
      stacklevel=2,
    )
  return not missing


def narrow(params: Mapping[str, Any]) -> None:
  """Warns of params, by path, whose dtype is too coarse to add small steps to."""
  narrow = {path: x for path, x in params.items() if jnp.finfo(jnp.result_type(x)).bits < 32}
  if narrow:
    path, leaf = next(iter(narrow.items()))
    dtype = jnp.result_type(leaf)
    warnings.warn(
      f'{len(narrow)} of {len(params)} constrained params are narrower than float32 (first: '
      f'{path or "(root)"!r}, {dtype.name}). Adding an update to them rounds away steps below '
      f'about {25 * float(jnp.finfo(dtype).eps):.2g} % of a weight, those of SPD among them: '
      'layers drift or stand still, whatever `condition` and `ratio` say. Keep float32 params and '
      'cast them inside the loss; anchor_dtype still stores the anchor in the dtype of the '
      'checkpoint.',
      stacklevel=2,
    )


def group(value: Any) -> None:
  """A function of the path, or None."""
  if value is not None and not callable(value):
    raise TypeError(
      'group: expected a function path -> key or None, '
      f'found {type(value).__name__} {value!r:.60} ' + STATIC.format(name='group')
    )
  if value is not None:
    accepts('group', value, 'path')


def is_bound(names: tuple[str, ...]) -> bool:
  """Whether all these axes are mapped over here."""
  try:
    for name in names:
      jax.lax.axis_size(name)
  except NameError:
    return False
  return True


def bound(names: tuple[str, ...]) -> None:
  """Names of axes that are mapped over where the update runs."""
  for name in names:
    if not is_bound((name,)):
      raise ValueError(
        f'axis_name: no mapped axis is called {name!r} here. It is for shard_map and pmap alone, '
        'around the update; under jit leave it out: sums over sharded arrays are global'
      )


def state(value: Any, expected: Any) -> None:
  """The state that init returned."""
  if not isinstance(value, expected):
    raise TypeError(
      f'expected the {expected.__name__} that init returns, found {type(value).__name__}; '
      'restore checkpoints into the structure of init(params)'
    )
  if 'count' in expected._fields:
    count: Any = value.count
    if _without_values(count) or jnp.ndim(count):
      raise TypeError(
        f'expected the {expected.__name__} that init returns, found one whose count is '
        f'{_without_values(count) or kind_of(count)}; a state of several runs needs vmap or pmap'
      )


def inner_state(value: Any, expected: Any) -> None:
  """After the inner optimizer failed: whether its state was made by another."""
  found, wanted = str(jax.tree.structure(value)), str(jax.tree.structure(expected))
  if found != wanted:
    raise TypeError(
      'the inner_state is not of this inner optimizer; restore checkpoints into the structure of '
      f'init(params):\n  found {found[:300]}\n  expected {wanted[:300]}'
    )


def is_zero(number: Any) -> bool:
  """Whether a number is known to be 0 at trace time; schedules and traced values are not."""
  return isinstance(number, int | float) and number == 0
