"""Wrong calls of what makes budgets, and of what measures drift."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np

import spd_optax as spd

Row = tuple[str, Callable[[], Any], type[Exception], str]
ROWS3 = np.ones((2, 3))


def budgets(name: str) -> list[Row]:
  """Of `within_budget` or `within_distance`."""
  make = getattr(spd, name)
  budget, bounds = f'{name}: budget: expected a finite number > 0', f'{name}: bounds: expected'
  return [
    (f'{name}.budget', partial(make, 0), ValueError, f'{budget}, found 0'),
    (f'{name}.budget', partial(make, -0.1), ValueError, f'{budget}, found -0.1'),
    (f'{name}.budget', partial(make, math.nan), ValueError, f'{budget}, found nan'),
    (f'{name}.budget', partial(make, math.inf), ValueError, f'{budget}, found inf'),
    (f'{name}.budget', partial(make, np.ones(2)), ValueError, budget),
    (f'{name}.budget', partial(make, '5 %'), TypeError, f"{budget}, found str '5 %'"),
    (f'{name}.budget', partial(make, None), TypeError, f'{budget}, found NoneType'),
    (f'{name}.bounds', partial(make, 1, bounds=10), TypeError, f'{bounds} two numbers, .*int 10'),
    (f'{name}.bounds', partial(make, 1, bounds=(0, 9)), ValueError, f'{bounds} finite .*found 0'),
    (f'{name}.bounds', partial(make, 1, bounds=(1, '9')), TypeError, f"{bounds} .*found str '9'"),
    (
      f'{name}.init',
      partial(make, 1, init=200),
      ValueError,
      'init: .*from 0.01 to 100, the bounds',
    ),
    (f'{name}.init', partial(make, 1, bounds=(9, 1)), ValueError, 'init: .*from 9 to 1'),
    (f'{name}.init', partial(make, 1, init=None), TypeError, 'init: .*found NoneType'),
  ]


def measures(name: str, new: str, base: str) -> list[Row]:
  """Of `kl_from_base` or `cosine_from_base`."""
  measure = getattr(spd, name)
  arrays, shapes = f'{name}: expected a tree of arrays', f'{name}: expected two arrays of one shape'
  where = rf'{name}: where: expected a shape that broadcasts to \(2,\)'
  return [
    (
      f'{name}.{new}',
      lambda: measure('logits', ROWS3),
      TypeError,
      f"{arrays} & {new}: str 'logits'",
    ),
    (f'{name}.{base}', lambda: measure(ROWS3, None), TypeError, f'{arrays} & {base}: NoneType'),
    (
      f'{name}.{new}',
      lambda: measure(jnp.ones(3), ROWS3),
      ValueError,
      rf'{shapes}.*\(3,\), \(2, 3\)',
    ),
    (f'{name}.{base}', lambda: measure(1.0, 1.0), ValueError, shapes),
    (f'{name}.where', lambda: measure(ROWS3, ROWS3, where=ROWS3 > 0), ValueError, where),
    (f'{name}.where', lambda: measure(ROWS3, ROWS3, where='all'), TypeError, "where: str 'all'"),
  ]


BUDGETS = [
  *budgets('within_budget'),
  *budgets('within_distance'),
  *measures('kl_from_base', 'logits', 'base_logits'),
  *measures('cosine_from_base', 'embeddings', 'base_embeddings'),
]
