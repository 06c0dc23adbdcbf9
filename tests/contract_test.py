"""One contract for every public transform, whatever its name.

`CASES` × `ANCHORS` is the matrix; no test asks which case it runs. Gradients are
noise, so that conditions turn on and off; that they do is itself a test.
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
from reference import x64

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
every_case = pytest.mark.parametrize('case', CASES.values(), ids=CASES)
every_public = pytest.mark.parametrize('case', PUBLIC.values(), ids=PUBLIC)
every_anchor = pytest.mark.parametrize('anchor', ANCHORS)


def normal(seed: int, *batch: int, dtype: Any = 'float32') -> Any:
  body, head = jax.random.split(jax.random.key(seed))
  kernel = jax.random.normal(body, (*batch, 3, 4), dtype)
  return {'body': {'kernel': kernel}, 'head': jax.random.normal(head, (*batch, 4), dtype)}


def noise(seed: int, dtype: Any = 'float32') -> Any:
  """Gradients that push params away from zero on average, and back again now and then."""
  drift = normal(seed, dtype=dtype)
  return jax.tree.map(lambda g, d: g - d / 4, normal(seed + 1, STEPS, dtype=dtype), drift)


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


@every_anchor
@every_case
def test_one_trace_and_a_state_that_keeps_its_form(case, anchor):
  """Catches a second trace, and a state that takes another form than `init` announced."""
  states = [state for _, state in trained(case.make, anchor)]
  announced = jax.eval_shape(compiled(case.make, anchor)[0].init, normal(0))
  assert_same_kind(announced, *states)


@every_anchor
@every_case
def test_it_acts_on_every_layer_but_the_free(case, anchor):
  """Catches a condition that never fires (all else here would pass), and a free leaf held."""
  params, state = trained(case.make, anchor)[-1]
  same = jax.tree.map(lambda x, y: bits(x) == bits(y), params, untouched(case)[-1][0])
  assert same == {'body': {'kernel': False}, 'head': anchor == 'free'}
  for field in PER_LAYER:
    held = {'body~kernel'} if anchor == 'free' else {'body~kernel', 'head'}
    assert set(optax.tree.get(state, field)) == held
    steps = map(int, optax.tree.get(state, 'constrained').values())
    assert set(steps) <= set(case.held_steps(STEPS))


@every_case
def test_scan_is_the_loop(case):
  """Catches Python state in update, and a carry that changes its type."""
  tx = compiled(case.make, 'captured')[0]
  step = make_step(tx)
  scan = jax.jit(lambda c, gs: jax.lax.scan(lambda c, g: (step(*c, g), None), c, gs)[0])
  found = scan((normal(0), tx.init(normal(0))), noise(0))
  chex.assert_trees_all_close(found, trained(case.make)[-1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('anchor', ['captured', 'free'])
@every_case
def test_vmap_over_seeds_is_separate_runs(case, anchor):
  """Catches sums, copies and conditionals that are blind to a batch axis."""
  tx, seeds = compiled(case.make, anchor)[0], (0, 5)
  stack = functools.partial(jax.tree.map, lambda *xs: jnp.stack(xs, axis=-1))
  batched = functools.partial(jax.vmap, in_axes=-1, out_axes=-1)
  params, gradients = (stack(*map(f, seeds)) for f in (normal, noise))
  found = loop(jax.jit(batched(make_step(tx))), params, batched(tx.init)(params), gradients)[-1]
  expected = stack(*(trained(case.make, anchor, seed)[-1] for seed in seeds))
  chex.assert_trees_all_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('explicit', [False, True])
@every_case
def test_params_and_state_can_be_donated(case, explicit):
  """Catches an anchor that aliases the params, in the state or as the user passed it."""
  params = normal(0)
  tx = case.make(params if explicit else None)
  step = jax.jit(make_step(tx), donate_argnums=(0, 1))
  trail = loop(step, params, tx.init(params), noise(0))
  assert all(leaf.is_deleted() for leaf in jax.tree.leaves(params))
  chex.assert_trees_all_close(trail[-1], trained(case.make)[-1], rtol=1e-6)


@pytest.mark.parametrize(
  ('case', 'dtype'),
  [
    pytest.param(case, dtype, id=f'{name}-{dtype}')
    for name, case in CASES.items()
    for dtype in case.dtypes
  ],
)
def test_dtypes(case, dtype):
  """Catches a state or params that drift to another dtype, and statistics in a narrow one."""
  with x64():
    params, gradients = normal(0, dtype=dtype), noise(0, dtype)
    tx = case.make()
    trail = loop(make_step(tx), params, tx.init(params), jax.tree.map(lambda g: g[:5], gradients))
    state = jax.eval_shape(tx.init, params)
    assert_same_kind(state, *(s for _, s in trail))
    assert_same_kind(params, optax.tree.get(state, 'anchor'), *(p for p, _ in trail))
    chex.assert_tree_all_finite(trail[-1])
  for field, wanted in PER_LAYER.items():
    values = optax.tree.get(trail[-1][1], field).values()
    assert {value.dtype.name for value in values} == {wanted}


def injected(make: Callable[..., Any], strength: Any) -> Any:
  return optax.inject_hyperparams(make)(strength=strength)


ZEROS = {
  'static': lambda make: make(strength=0),
  'traced': lambda make: injected(make, 0.0),
  'schedule': lambda make: make(strength=lambda count: 0.0 * count),
}


@pytest.mark.parametrize('jit', [True, False])
@pytest.mark.parametrize('zero', ZEROS)
@every_case
def test_strength_zero_changes_no_bit(case, zero, jit):
  """Catches u − 0·r·d where u belongs, and a strength that is not looked up.

  With a strength that is known only at run time, under jit, this holds for what the
  transformation returns; XLA may still round what is compiled with it otherwise than alone
  (1 ulp seen on CPU): the optimizer behind a link, and θ + u. So there a link is tested alone,
  and u is added outside.
  """
  alone = jit and zero != 'static'
  make, plain = case.own if alone else (case.make, case.plain)
  steps = STEPS if jit else 3
  gradients = jax.tree.map(lambda g: g[:steps], noise(0))

  def run(tx):
    if alone:
      tx = optax.GradientTransformation(tx.init, jax.jit(tx.update))
    step = make_step(tx) if alone or not jit else jax.jit(make_step(tx))
    return loop(step, normal(0), tx.init(normal(0)), gradients)

  runs = [run(tx) for tx in (ZEROS[zero](make), plain)]
  ours, inner = ([bits(params) for params, _ in run] for run in runs)
  assert ours == inner
