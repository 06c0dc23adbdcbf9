"""The reference implementation's own trajectories, step by step (tests/golden)."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from reference import x64

import spd_optax as spd

GOLDEN = Path(__file__).parent / 'golden'
CASES = sorted(path.stem for path in GOLDEN.glob('*.npz'))


class Golden(NamedTuple):
  """One recorded run."""

  hyper: dict[str, Any]
  names: list[str]
  start: dict[str, np.ndarray]
  anchor: Any
  grads: dict[str, np.ndarray]
  params: dict[str, np.ndarray]
  condition: dict[str, np.ndarray]

  @property
  def adam(self) -> dict[str, float]:
    return {key: self.hyper[key] for key in ('learning_rate', 'b1', 'b2', 'eps')}


def load(case: str) -> Golden:
  data = np.load(GOLDEN / f'{case}.npz')
  names, hyper = [str(name) for name in data['names']], json.loads(str(data['hyper']))

  def tree(kind: str) -> dict[str, np.ndarray]:
    return {name: data[f'{kind}/{name}'] for name in names}

  return Golden(
    hyper=hyper,
    names=names,
    start=tree('start'),
    anchor=0 if hyper['anchor'] == 'zero' else tree('anchor'),
    grads=tree('grads'),
    params=tree('params'),
    condition=dict(zip(names, data['condition'].T, strict=True)),
  )


def wrapper(golden: Golden) -> optax.GradientTransformationExtraArgs:
  """`with_projection_decay`."""
  strength = golden.hyper['strength']
  return spd.with_projection_decay(optax.adam(**golden.adam), golden.anchor, strength)


def alias(golden: Golden) -> optax.GradientTransformationExtraArgs:
  """Form 3."""
  return spd.adam_spd(anchor=golden.anchor, strength=golden.hyper['strength'], **golden.adam)


def replay(tx: optax.GradientTransformation, golden: Golden) -> tuple[Any, Any]:
  """Params and conditions after each step, when fed with the recorded gradients."""

  def step(carry: Any, gradients: Any) -> tuple[Any, Any]:
    params, state = carry
    updates, state = tx.update(gradients, state, params)
    params = optax.apply_updates(params, updates)
    return (params, state), (params, optax.tree.get(state, 'condition'))

  @jax.jit
  def run(start: Any, gradients: Any) -> Any:
    return jax.lax.scan(step, (start, tx.init(start)), gradients)[1]

  as_arrays = jax.tree.map(jnp.asarray, (golden.start, golden.grads))
  return run(*as_arrays)


def assert_recorded(run: tuple[Any, Any], golden: Golden, dtype: Any, atol: float) -> None:
  params, condition = run
  chex.assert_trees_all_equal_dtypes(params, jax.tree.map(lambda x: x.astype(dtype), golden.params))
  chex.assert_trees_all_close(params, golden.params, rtol=0, atol=atol)
  chex.assert_trees_all_equal(condition, golden.condition)


@pytest.mark.parametrize('form', [wrapper, alias])
@pytest.mark.parametrize('case', [case for case in CASES if case != 'float32'])
def test_float64(case: str, form: Any) -> None:
  """Catches any departure from eq. 3, 4 and 9, λ times the learning rate, a flipped sign."""
  golden = load(case)
  with x64():
    run = replay(form(golden), golden)
  assert_recorded(run, golden, np.float64, 1e-12)


@pytest.mark.parametrize('form', [wrapper, alias])
def test_float32_arrays_in_64_bit_mode(form: Any) -> None:
  """Catches sums or steps that lose precision on the way through float32.

  64-bit mode because `optax.adam` computes its bias correction 1 − b2**t in the
  default float type: in float32 that alone moves Adam by 3e-5 on these gradients.
  """
  golden = load('float32')
  with x64():
    run = replay(form(golden), golden)
  assert_recorded(run, golden, np.float32, 1e-5)


class ExactAdamState(NamedTuple):
  count: Any
  mu: Any
  nu: Any


def exact_adam(learning_rate: float, b1: float, b2: float, eps: float, steps: int) -> Any:
  """Adam with bias corrections from NumPy's float64, one constant for each step."""
  t = np.arange(1, steps + 1)
  corrections = (1 - b1**t).astype(np.float32), (1 - b2**t).astype(np.float32)

  def init(params: Any) -> ExactAdamState:
    zeros = jax.tree.map(jnp.zeros_like, params)
    return ExactAdamState(jnp.zeros([], jnp.int32), zeros, zeros)

  def update(gradients: Any, state: ExactAdamState, params: Any = None) -> Any:
    del params
    c1, c2 = (jnp.asarray(c)[state.count] for c in corrections)
    mu = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, state.mu, gradients)
    nu = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * g * g, state.nu, gradients)
    updates = jax.tree.map(
      lambda m, v: -learning_rate * (m / c1) / (jnp.sqrt(v / c2) + eps), mu, nu
    )
    return updates, ExactAdamState(state.count + 1, mu, nu)

  return optax.GradientTransformation(init, update)


def test_float32_in_32_bit_mode() -> None:
  """Catches a float64 that the wrapper needs without saying so.

  `optax.adam` cannot be the inner optimizer here, see above: an Adam with exact
  bias corrections takes its place.
  """
  golden = load('float32')
  adam = exact_adam(**golden.adam, steps=len(golden.grads['scale']))
  tx = spd.with_projection_decay(adam, golden.anchor, golden.hyper['strength'])
  assert_recorded(replay(tx, golden), golden, np.float32, 1e-5)


@pytest.mark.parametrize('case', CASES)
def test_the_recorded_conditions_are_worth_meeting(case: str) -> None:
  """Catches recordings in which nothing, or everything, is ever held."""
  condition = np.stack(list(load(case).condition.values()), axis=1)
  assert condition.any()
  assert not condition.all()
  assert len(np.unique(condition, axis=0)) > 2  # the leaves have conditions of their own


def test_every_kind_of_case_is_there() -> None:
  """Catches a lost file, which would silently turn its tests off."""
  hypers = [load(case).hyper for case in CASES]
  assert {hyper['anchor'] for hyper in hypers} == {'tree', 'zero'}
  assert {hyper['strength'] for hyper in hypers} == {0.0, 0.5, 1.0, 2.0}
  assert {load(case).start['scale'].dtype.name for case in CASES} == {'float32', 'float64'}
