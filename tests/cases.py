"""Transforms, params, noisy gradients and loops of steps, which tests share.

`CASES` × `ANCHORS` is the matrix that every public transform passes. Gradients are noise, so
that conditions turn on and off.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import spd_optax as spd

LEARNING_RATE, STEPS = 0.05, 12
PER_LAYER = {
  'condition': 'bool',
  'ratio': 'float32',
  'distance': 'float32',
  'constrained': 'int32',
}
FLOATS = ('float16', 'bfloat16', 'float32', 'float64')
ALL_DTYPES = (*FLOATS, 'complex64')


class Case(NamedTuple):
  """A transform: `make(anchor, strength)`, and `plain`, what it is at strength 0.

  `own` is that pair for the part that is ours, without an optimizer behind it.
  """

  make: Callable[..., Any]
  plain: Any
  own: tuple[Callable[..., Any], Any]
  dtypes: tuple[str, ...] = FLOATS  # that the inner optimizer supports
  always: bool = False  # holds every layer at every step

  def held_steps(self, steps: int) -> range:
    """How many of so many noisy steps may hold a layer."""
    return range(steps, steps + 1) if self.always else range(1, steps)


def before(link: Callable[..., Any], optimizer: Any, **kwargs: Any) -> Case:
  def make(anchor=None, strength=1.0):
    return optax.chain(link(anchor, strength), optimizer)

  return Case(make, optimizer, (link, optax.identity()), **kwargs)


def around(optimizer: Any, **kwargs: Any) -> Case:
  def make(anchor=None, strength=1.0):
    return spd.with_projection_decay(optimizer, anchor, strength)

  return Case(make, optimizer, (make, optimizer), **kwargs)


def alias(anchor=None, strength=1.0):
  return spd.adam_spd(LEARNING_RATE, anchor, strength, eps=EPS)


EPS = 1e-3  # float16 rounds Adam's usual 1e-8 to 0, and Adam alone then divides by 0
ADAM = optax.adam(LEARNING_RATE, eps=EPS)
PUBLIC = {
  'projection_decay': before(spd.projection_decay, ADAM, dtypes=ALL_DTYPES),
  'with_projection_decay': around(ADAM, dtypes=ALL_DTYPES),
  'adam_spd': Case(alias, ADAM, (alias, ADAM), ALL_DTYPES),
  'l2_sp': before(spd.l2_sp, ADAM, dtypes=ALL_DTYPES, always=True),
}
CASES = {
  **PUBLIC,
  'sgd': around(optax.sgd(LEARNING_RATE, momentum=0.9), dtypes=ALL_DTYPES),
  'lion': around(optax.lion(LEARNING_RATE)),
  'adafactor': around(optax.adafactor(LEARNING_RATE, momentum=0.9)),
  'muon': around(optax.contrib.muon(LEARNING_RATE, eps=EPS)),
  'clipped': around(optax.chain(optax.clip_by_global_norm(1.0), ADAM), dtypes=ALL_DTYPES),
}


def shifted(params: Any) -> Any:
  return jax.tree.map(lambda x: np.asarray(x + jnp.asarray(0.1).astype(x.dtype)), params)


ANCHORS = {
  'captured': lambda params: None,
  'tree': shifted,
  'zero': lambda params: 0,
  'free': lambda params: {'body': shifted(params)['body'], 'head': None},
}
# Which optimizer is inside makes no difference to the number of devices. And `adam_spd` is
# `with_projection_decay` around Adam: forms_test says that no bit differs.
MARKS = {name: () if name in PUBLIC else pytest.mark.eight_devices for name in CASES}
MARKS['adam_spd'] = pytest.mark.slow
every_case = pytest.mark.parametrize(
  'case', [pytest.param(case, id=name, marks=MARKS[name]) for name, case in CASES.items()]
)
every_public = pytest.mark.parametrize(
  'case', [pytest.param(case, id=name, marks=MARKS[name]) for name, case in PUBLIC.items()]
)
every_anchor = pytest.mark.parametrize('anchor', ANCHORS)


def drawn(seed: int, *batch: int, dtype: Any = 'float32') -> Any:
  """From NumPy, because `jax.random` compiles programs for each shape and dtype."""
  rng = np.random.default_rng((32, seed))  # under which no layer is always free or always held

  def draw(*shape: int) -> np.ndarray:
    real, imaginary = rng.standard_normal((2, *batch, *shape))
    return (real + 1j * imaginary) / np.sqrt(2) if 'complex' in str(dtype) else real

  return {'body': {'kernel': draw(3, 4)}, 'head': draw(4)}


def normal(seed: int, *batch: int, dtype: Any = 'float32') -> Any:
  return jax.tree.map(lambda x: jnp.asarray(x, dtype), drawn(seed, *batch, dtype=dtype))


def noise(seed: int, dtype: Any = 'float32') -> Any:
  """Gradients that push params away from zero on average, and back again now and then."""
  pairs = drawn(seed + 1, STEPS, dtype=dtype), drawn(seed, dtype=dtype)
  return jax.tree.map(lambda g, d: jnp.asarray(g - d / 4, dtype), *pairs)


def make_step(tx: Any) -> Callable[..., Any]:
  def step(params, state, gradients):
    updates, state = tx.update(gradients, state, params)
    return optax.apply_updates(params, updates), state

  return step


def loop(step: Callable[..., Any], params: Any, state: Any, gradients: Any) -> list[Any]:
  """(params, state) before the first and after each step, in Python."""
  trail = [(params, state)]
  for i in range(len(jax.tree.leaves(gradients)[0])):
    trail.append(step(*trail[-1], jax.tree.map(lambda x, i=i: x[i], gradients)))
  return trail


@functools.cache
def compiled(make: Callable[..., Any], anchor: str) -> tuple[Any, Callable[..., Any]]:
  """A transform and its jitted step, shared by the tests; a second trace is an error."""
  tx = make(ANCHORS[anchor](normal(0)))
  chex.clear_trace_counter()
  return tx, jax.jit(chex.assert_max_traces(make_step(tx), n=1))


@functools.cache
def trained(make: Callable[..., Any], anchor: str = 'captured', seed: int = 0) -> list[Any]:
  tx, step = compiled(make, anchor)
  return loop(step, normal(seed), tx.init(normal(seed)), noise(seed))


def untouched(case: Case) -> list[Any]:
  """What the inner optimizer does alone."""
  return trained(always(case.plain))


@functools.cache
def always(tx: Any) -> Callable[..., Any]:
  return lambda anchor: tx


def bits(tree: Any) -> list[bytes]:
  return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def assert_same_kind(*trees: Any) -> None:
  """One structure, shapes and dtypes."""
  chex.assert_trees_all_equal_structs(*trees)
  chex.assert_trees_all_equal_shapes_and_dtypes(*trees)


FORMS = {
  'in the chain': lambda anchor=None, **kw: optax.chain(spd.projection_decay(anchor, **kw), ADAM),
  'around': lambda anchor=None, **kw: spd.with_projection_decay(ADAM, anchor, **kw),
}
every_form = pytest.mark.parametrize('make', FORMS.values(), ids=FORMS)


# An inner optimizer whose update is given from outside, as an extra argument.
GIVEN = optax.GradientTransformationExtraArgs(
  lambda params: optax.EmptyState(), lambda updates, state, params, *, given: (given, state)
)


def aligned(shape: tuple[int, ...]) -> np.ndarray:
  """A NumPy array that XLA could take over without a copy: at a multiple of 64 bytes."""
  size = int(np.prod(shape))
  buffer = np.ones(size + 16, np.float32)
  start = -buffer.ctypes.data % 64 // 4
  return buffer[start : start + size].reshape(shape)
