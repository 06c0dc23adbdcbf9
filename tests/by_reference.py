"""Every public transform beside the reference, one step at a time; shared by several tests.

A run feeds the reference with the params, and with the update of the inner optimizer, as they
are at each step. So a step is judged by itself, and errors do not pile up.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference

import spd_optax as spd

SGD = optax.sgd(0.125, momentum=0.875)
ADAM = {'learning_rate': 0.125, 'eps': 2.0**-10}  # float16 rounds Adam's usual eps to 0


class Case(NamedTuple):
  """A transform and what it shall do.

  Attributes:
    make: (anchor, strength, **options) -> the transform.
    inner: the optimizer that it is around, or nothing for a link.
    expected: (params, gradients, updates of `inner`, anchors, strength, groups=, stack_axes=)
      -> updates, report; in NumPy.
    pace: by what to multiply the updates before they are added to the params.
    options: which of `group`, `stack_axis` and `axis_name` there are.
    writes: whether the step is `apply`, which returns params.
  """

  make: Callable[..., Any]
  inner: Any
  expected: Callable[..., Any]
  pace: float = 1.0
  layered: bool = True
  writes: bool = False


def around(make: Callable[..., Any], inner: Any, margin: float = 0.0, writes: bool = False) -> Case:
  def expected(params, gradients, updates, anchors, strength=1.0, **layers):
    after, report = reference.with_projection_decay(
      params, gradients, updates, anchors, strength, margin=margin, **layers
    )
    return {name: after[name] - params[name] for name in params}, report

  return Case(make, inner, expected, writes=writes)


def link(margin: float) -> Case:
  def make(anchor=None, strength=1.0, **options):
    return spd.projection_decay(anchor, strength, margin=margin, **options)

  def expected(params, gradients, updates, anchors, strength=1.0, **layers):
    del updates
    return reference.projection_decay(params, gradients, anchors, strength, margin=margin, **layers)

  return Case(make, optax.identity(), expected, pace=-0.125)


def decay_to_anchor() -> Case:
  def make(anchor=None, strength=1.0, **options):
    return spd.l2_sp(anchor, strength, **options)

  def expected(params, gradients, updates, anchors, strength=1.0):
    del updates
    deviations = {name: params[name] - anchors[name] for name in params}
    found = {name: gradients[name] + strength * deviations[name] for name in params}
    report = {n: reference.Held(True, None, np.linalg.norm(d)) for n, d in deviations.items()}
    return found, report

  return Case(make, optax.identity(), expected, pace=-0.125, layered=False)


def sgd_spd(margin: float, writes: bool = False) -> Case:
  def make(anchor=None, strength=1.0, **options):
    return spd.with_projection_decay(SGD, anchor, strength, margin=margin, **options)

  return around(make, SGD, margin, writes)


def adam_spd(margin: float) -> Case:
  def make(anchor=None, strength=1.0, **options):
    return spd.adam_spd(anchor=anchor, strength=strength, margin=margin, **ADAM, **options)

  return around(make, optax.adam(**ADAM), margin)


CASES = {
  'projection_decay': link(0.05),
  'projection_decay, margin 0': link(0.0),
  'with_projection_decay': sgd_spd(0.0),
  'with_projection_decay, margin 0.05': sgd_spd(0.05),
  'adam_spd': adam_spd(0.0),
  'adam_spd, margin 0.05': adam_spd(0.05),
  'apply': sgd_spd(0.0, writes=True),
  'l2_sp': decay_to_anchor(),
}
# Together they take every path through a step. The others sum the same or less, or are around an
# optimizer of more arrays; they are slow tests.
DISTINCT = ('projection_decay', 'with_projection_decay, margin 0.05', 'apply', 'l2_sp')


def each_of(names: Iterable[str], fast: Iterable[str] = DISTINCT) -> pytest.MarkDecorator:
  """A test for each of these cases; those that are not among `fast` are slow tests."""
  fast = set(fast)
  return pytest.mark.parametrize(
    'case',
    [
      pytest.param(CASES[name], id=name, marks=() if name in fast else pytest.mark.slow)
      for name in names
    ],
  )


every_case = each_of(CASES)
every_layered = each_of(name for name, case in CASES.items() if case.layered)


def numpy64(tree: Any) -> dict[str, np.ndarray]:
  """The leaves in float64 or complex128."""
  return {
    name: np.asarray(x).astype(complex if np.iscomplexobj(x) else np.float64)
    for name, x in tree.items()
  }


def own(state: Any) -> Any:
  """The part of a state that is the library's."""
  return getattr(state, 'projection_decay', state)


class Step(NamedTuple):
  """One step: what was found, and what the reference says."""

  found: Any  # updates, or the next params of `apply`
  wanted: dict[str, np.ndarray]
  report: dict[str, reference.Held]
  params: Any  # before the step,
  inner: Any  # the update of the inner optimizer alone,
  state: Any  # and the state after it


def steps(
  case: Case,
  tx: Any,
  params: Any,
  gradients: list[Any],
  anchors: Any = None,
  *,
  strength: float = 1.0,
  jit: bool = True,
  of_inner: Callable[[Any], Any] = lambda gradients: gradients,
  **layers: Any,
) -> list[Step]:
  """Each step of a run; `anchors` None: the params at its beginning.

  `of_inner` makes of the gradients what the inner optimizer and the reference are to see.
  """
  wrap = jax.jit if jit else lambda function: function
  step, inner = wrap(tx.apply if case.writes else tx.update), wrap(case.inner.update)
  anchors = numpy64(params if anchors is None else anchors)
  state, inner_state = tx.init(params), case.inner.init(params)
  trail = []
  for gradient in gradients:
    seen = of_inner(gradient)
    updates, inner_state = inner(seen, inner_state, params)
    wide = numpy64(params), numpy64(seen), numpy64(updates)
    wanted, report = case.expected(*wide, anchors, strength, **layers)
    found, state = step(gradient, state, params)
    if case.writes:
      wanted = {name: wide[0][name] + wanted[name] for name in wanted}
    trail.append(Step(found, wanted, report, params, updates, state))
    moves = jax.tree.map(lambda u: case.pace * u, found)
    params = found if case.writes else optax.apply_updates(params, moves)
  return trail


def assert_reports(step: Step, rtol: float = 1e-5) -> None:
  """The condition and the distance of each layer in the state are those of the reference."""
  state = own(step.state)
  assert state.condition.keys() == step.report.keys()
  for name, held in step.report.items():
    np.testing.assert_array_equal(state.condition[name], held.condition, err_msg=name)
    np.testing.assert_allclose(state.distance[name], held.distance, rtol, 1e-6, err_msg=name)


def eps(*dtypes: Any) -> float:
  """The coarsest of these dtypes."""
  return max(float(jnp.finfo(dtype).eps) for dtype in dtypes)
