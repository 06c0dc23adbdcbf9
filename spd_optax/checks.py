"""Checks of arguments, made where a transformation is constructed or traced."""

import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

Number = float | jax.Array
NumberOrSchedule = Number | Callable[[Any], Any]

STATIC = "(in optax.inject_hyperparams, name it in static_args=('{name}',))"


def kind_of(value: Any) -> str:
  """A value in a few words, for messages."""
  if isinstance(value, optax.GradientTransformation):
    return 'an optax transformation'
  if hasattr(value, 'shape') and hasattr(value, 'dtype'):
    return f'{np.dtype(value.dtype).name}{list(value.shape)}'
  return f'{type(value).__name__} {value!r}'[:80]


def _scalar(name: str, value: Any, expected: str, in_range: Callable[[Any], bool]) -> None:
  message = f'{name}: expected {expected}, found {{}}'
  if not isinstance(value, int | float | np.number | np.ndarray | jax.Array):
    raise TypeError(message.format(type(value).__name__))
  if jnp.ndim(value) or not (isinstance(value, jax.core.Tracer) or in_range(value)):
    raise ValueError(message.format(value))


def strength(value: Any) -> None:
  """A finite number ≥ 0, a schedule, or a traced scalar."""
  if not callable(value):
    expected = 'a finite number ≥ 0 or a schedule'
    _scalar('strength', value, expected, lambda v: 0 <= v < math.inf)


def strength_at(value: NumberOrSchedule, count: jax.Array) -> Any:
  """The strength at a step, a scalar."""
  if callable(value):
    value = value(count)
    _scalar('strength', value, 'a schedule that returns a number ≥ 0', lambda v: v >= 0)
  return value


def margin(value: Any) -> None:
  """A number in [0, 1), or a traced scalar."""
  _scalar('margin', value, 'a number in [0, 1)', lambda v: 0 <= v < 1)


def alpha(value: Any) -> None:
  """A finite number, or a traced scalar."""
  _scalar('alpha', value, 'a number', lambda v: bool(jnp.isfinite(v)))


def learning_rate(value: Any) -> None:
  """A number, a schedule, or a traced scalar."""
  scalar = hasattr(value, '__float__') and not jnp.ndim(value)
  if isinstance(value, str) or not (callable(value) or scalar):
    raise TypeError(
      'adam_spd(learning_rate, anchor): learning_rate: expected a number or a schedule first, '
      f'found {kind_of(value)}'
    )


def optimizer(value: Any) -> None:
  """Something with the init and update of an optax optimizer."""
  if not (hasattr(value, 'init') and hasattr(value, 'update')):
    raise TypeError(
      'with_projection_decay(optimizer, anchor): expected an optax optimizer first, '
      f'found {type(value).__name__}'
    )


def anchor(value: Any) -> None:
  """Not a transformation or a function; the leaves are checked against the params."""
  if isinstance(value, optax.GradientTransformation) or callable(value):
    raise TypeError(
      f'anchor: expected a tree of arrays, 0 or None, found {kind_of(value)}. '
      'To constrain an optimizer use with_projection_decay(optimizer, anchor); '
      'projection_decay(anchor) is a link of its own in front of it.'
    )


def anchor_dtype(value: Any) -> None:
  """A floating dtype, or None."""
  try:
    is_array = isinstance(value, jax.Array | np.ndarray)
    floating = value is None or (not is_array and jnp.issubdtype(np.dtype(value), jnp.floating))
  except TypeError:
    floating = False
  if not floating:
    raise TypeError(
      f'anchor_dtype: expected a floating dtype such as jnp.bfloat16, found {value!r} '
      + STATIC.format(name='anchor_dtype')
    )


def anchor_memory_kind(value: Any) -> None:
  """'pinned_host', or None for the params' own memory."""
  if value not in (None, 'pinned_host'):
    raise ValueError(f"anchor_memory_kind: expected 'pinned_host' or None, found {value!r}")
  if value and not hasattr(jax, 'memory'):
    raise ValueError(f'anchor_memory_kind: jax {jax.__version__} lacks jax.memory; use a newer jax')


def anchor_ema(value: Any) -> None:
  """A number in [0, 1), a traced scalar, or None."""
  if value is not None:
    _scalar('anchor_ema', value, 'a number in [0, 1), or None', lambda v: 0 <= v < 1)


def can_follow(anchor: Mapping[str, Any]) -> None:
  """Not narrower than float32: 1 − anchor_ema of a small deviation would round away."""
  narrow = [f'{p or "(root)"}: {x.dtype}' for p, x in anchor.items() if jnp.finfo(x).bits < 32]
  if narrow:
    raise ValueError(
      'anchor_ema: a slowly following anchor needs float32 or wider (anchor_dtype=jnp.float32):\n  '
      + '\n  '.join(narrow)
    )


def memory_kinds(device: jax.Device) -> set[str]:
  """The kinds of memory that a device can use."""
  return {memory.kind for memory in device.addressable_memories()}


def has_memory_kind(array: jax.Array, memory_kind: str) -> bool:
  """Whether the array's devices have this memory; warns where they do not."""
  traced = isinstance(array, jax.core.Tracer)
  devices = jax.local_devices()[:1] if traced else list(array.sharding.addressable_devices)
  missing = [device for device in devices if memory_kind not in memory_kinds(device)]
  if missing:
    warnings.warn(
      f'anchor_memory_kind={memory_kind!r}: {missing[0].platform} device {missing[0]} has no such '
      "memory; the anchor stays in the device's own. anchor_memory_kind=None says the same.",
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


def state(value: Any, expected: type) -> None:
  """The state that init returned."""
  if not isinstance(value, expected):
    raise TypeError(
      f'expected the {expected.__name__} that init returns, found {type(value).__name__}; '
      'restore checkpoints into the structure of init(params)'
    )


def is_zero(number: Any) -> bool:
  """Whether a number is known to be 0 at trace time; schedules and traced values are not."""
  return isinstance(number, int | float) and number == 0
