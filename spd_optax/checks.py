"""Checks of arguments that several modules make, at construction or at trace time."""

import inspect
import math
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import PurePath
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

STATIC = "; in optax.inject_hyperparams name it in static_args=('{}',)"
ARRAYS = jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct
LIBRARIES = ('spd_optax', 'optax', 'jax', 'flax', 'chex', 'contextlib')


def warn(message: str, category: type[Warning] = UserWarning) -> None:
  """Warns, pointing at the first line up the stack that is the user's."""
  depth, frame = 1, inspect.currentframe()
  while frame is not None and frame.f_globals.get('__name__', '').split('.')[0] in LIBRARIES:
    depth, frame = depth + 1, frame.f_back
  warnings.warn(message, category, stacklevel=depth)


def kind_of(value: object) -> str:
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


def dtype_of(value: Any) -> np.dtype:
  """The dtype that JAX computes with."""
  return value.dtype if isinstance(value, jax.Array) else jnp.result_type(value)


def is_array(value: object) -> bool:
  """Whether JAX takes it for an array: one of JAX or NumPy, its struct, or a number."""
  if isinstance(value, jax.Array):
    return True
  if isinstance(value, str | bytes) or not isinstance(value, ARRAYS | int | float | complex):
    return False
  try:
    jnp.result_type(value)
  except (TypeError, ValueError, OverflowError):
    return False
  return True


def is_zero(value: object) -> bool:
  """Whether a value is known to be 0 at trace time: a number, no array and no schedule."""
  return isinstance(value, int | float) and not isinstance(value, bool) and value == 0


def is_function(value: object) -> bool:
  """Whether it can be called and is no pytree, as a model with `__call__` may be."""
  return callable(value) and jax.tree_util.all_leaves([value])


def raise_all(
  problems: Sequence[str], summary: str, error: type[TypeError | ValueError] = ValueError
) -> None:
  """Raises one error that lists every problem; none is left for the next run."""
  if problems:
    raise error(summary + '\n  ' + '\n  '.join(problems))


def without_values(value: object) -> str | None:
  """Why a value is no array to compute with."""
  if isinstance(value, jax.core.Tracer):
    return None
  if not is_array(value):
    advice = isinstance(value, str | os.PathLike)
    return kind_of(value) + ('; load_anchor(path, params) reads checkpoints' if advice else '')
  if isinstance(value, jax.ShapeDtypeStruct):
    return f'{kind_of(value)}, a shape without values'
  deleted = isinstance(value, jax.Array) and value.is_deleted()
  return f'{kind_of(value)}, deleted (donated to jit?)' if deleted else None


def arrays(name: str, leaves: Mapping[str, object]) -> None:
  """Raises a TypeError that names every leaf, by path, that is no array to compute with."""
  found = {path or '(root)': without_values(leaf) for path, leaf in leaves.items()}
  problems = [f'{path}: {problem}' for path, problem in found.items() if problem]
  raise_all(problems, f'{name}: expected a tree of arrays, of JAX or NumPy, found', TypeError)


def scalar(name: str, value: Any, expected: str, in_range: Callable[[Any], bool]) -> None:
  """A real number; one of Python or NumPy is in range, a jax.Array may hold any.

  What is computed is known only at run time. Where it is out of range nothing is held.
  """
  message = f'{name}: expected {expected}, found {{}}'
  dtype = dtype_of(value) if is_array(value) else bool
  if not any(jnp.issubdtype(dtype, kind) for kind in (np.integer, np.floating)):
    raise TypeError(message.format(kind_of(value)))
  if jnp.ndim(value) or not (isinstance(value, jax.Array) or in_range(value)):
    raise ValueError(message.format(value))


def number_or_schedule(name: str, value: object) -> None:
  """A finite number ≥ 0, a schedule, or a computed number."""
  if not callable(value):
    scalar(name, value, 'a finite number ≥ 0 or a schedule', lambda v: 0 <= v < math.inf)


def fraction(name: str, value: object, otherwise: str = '') -> None:
  """A number in [0, 1), or a computed one."""
  scalar(name, value, f'a number in [0, 1){otherwise}', lambda v: 0 <= v < 1)


def can_replace(dtype: jax.typing.DTypeLike, old: jax.typing.DTypeLike) -> bool:
  """Whether numbers can take the place of others: floating ones, or complex where those are."""
  complex_too = jnp.issubdtype(old, jnp.complexfloating)
  return bool(jnp.issubdtype(dtype, jnp.inexact if complex_too else jnp.floating))


def is_floating(dtype: Any) -> bool:
  """Whether it is a floating dtype, and no array that has one."""
  try:
    return not isinstance(dtype, jax.Array) and bool(jnp.issubdtype(np.dtype(dtype), jnp.floating))
  except TypeError:
    return False
