"""Checks of arguments, made where a transformation is constructed or traced."""

import math
from collections.abc import Callable
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
