"""What the compilers for TPU and CUDA make of a step, ahead of time; no such hardware needed.

    python -m pip install -e '.[test,aot]' && python -m pytest -m aot

The bounds are floors (`Adam` 7 passes over the params, the anchor's read makes it 8) plus
what the compilers are known to add; examples/benchmarks/README.md has the numbers.
"""

import functools

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from host_memory import like_an_accelerator

import spd_optax as spd
from benchmarks import at_scale, compiled, methods, shapes

pytestmark = pytest.mark.aot

ADAM = optax.adam(1e-3)


FORMS = {
  'projection_decay': lambda anchor, **kw: optax.chain(spd.projection_decay(anchor, **kw), ADAM),
  'with_projection_decay': lambda anchor, **kw: spd.with_projection_decay(ADAM, anchor, **kw),
  'SignificantProjection': lambda anchor, **kw: spd.with_projection_decay(
    ADAM, anchor, rule=spd.SignificantProjection(), **kw
  ),
}
every_form = pytest.mark.parametrize('make', FORMS.values(), ids=FORMS)


@functools.cache
def vit_on(make, target, captured):
  tree = shapes.vit_b16()
  anchor = None if captured else compiled.nowhere(tree)
  return compiled.compile_step(make(anchor), tree, compiled.TARGETS[target])[0]


@pytest.mark.parametrize('captured', [True, False], ids=['captured', 'given'])
@every_form
def test_one_tpu_chip(make, captured):
  """Catches a step whose inner optimizer is computed twice, and stored copies of the params."""
  one = vit_on(make, 'v5e', captured)
  # The numbers of a rule come late, so that some layers are read again.
  assert 7.9 < one.passes <= (9.2 if make is FORMS['SignificantProjection'] else 9.0)
  assert one.temporaries <= 0.1
  assert not one.collectives


def fed(tx):
  """The transformation, given a drift in each update."""
  return optax.GradientTransformation(tx.init, lambda g, s, p: tx.update(g, s, p, drift=0.1))


BUDGETS = {  # passes over the params, and copies of them on the way, at most
  'within_budget, v5e': (spd.within_budget(0.05), 'v5e', 8.2, 0.1),
  'within_distance, v5e': (spd.within_distance(0.02), 'v5e', 12.1, 1.0),
  'within_distance, v5p-4x4x4': (spd.within_distance(0.02), 'v5p-4x4x4', 8.1, 0.01),
}


@pytest.mark.parametrize(('strength', 'target', 'passes', 'copies'), BUDGETS.values(), ids=BUDGETS)
@pytest.mark.parametrize('form', ['projection_decay', 'with_projection_decay'])
def test_budgets_on_a_tpu(form, strength, target, passes, copies):
  """Catches layers that wait for each other where they need not."""
  tx = fed(FORMS[form](None, strength=strength))
  one, _ = compiled.compile_step(tx, shapes.vit_b16(), compiled.TARGETS[target])
  print(f'{form}, {target}: {one.passes:.2f} passes, {one.temporaries:.2f} copies')
  assert 7.9 < one.passes <= passes
  assert one.temporaries <= copies


def test_apply_is_at_the_floor_on_a_tpu():
  """Catches params or an anchor that are read again once the sums are known."""
  tx, tree = methods.OPTIMIZERS['adam_spd, apply'], shapes.vit_b16()
  one, _ = compiled.compile_step(tx(compiled.nowhere(tree)), tree, compiled.TARGETS['v5e'])
  assert 7.9 < one.passes <= 8.05
  assert one.temporaries <= 0.01


@pytest.mark.parametrize('captured', [True, False], ids=['captured', 'given'])
@every_form
def test_64_tpu_chips(make, captured):
  """Catches a third pass, an all-reduce per layer, and gathered params."""
  one = vit_on(make, 'v5p-4x4x4', captured)
  assert 7.9 < one.passes <= 8.5
  assert {name for name, _, _ in one.collectives} == {'all-reduce'}
  small = [scalars for _, scalars, _ in one.collectives if scalars < 200]
  assert len(small) <= 1  # what is left over after large packets, or all
  assert sum(size for _, _, size in one.collectives) < 4 * 1000  # a few scalars a layer


@every_form
def test_one_gpu(make):
  """Catches barriers that XLA:GPU pays for (19 passes with one), and stored updates."""
  one = vit_on(make, 'h200', captured=False)
  # XLA:GPU computes the optimizer's step once more for its length.
  assert one.passes <= (16.1 if make is FORMS['SignificantProjection'] else 12.1)
  assert one.temporaries <= 0.2


ANCHORS = {
  'float32': ({}, (20, 0)),
  'bfloat16': ({'anchor_dtype': jnp.bfloat16}, (18, 0)),
  'zero': ({'anchor': 0}, (16, 0)),
  'pinned_host': ({'anchor_memory_kind': 'pinned_host'}, (16, 4)),
}


@pytest.mark.parametrize(('options', 'expected'), ANCHORS.values(), ids=ANCHORS)
@every_form
def test_bytes_per_parameter(make, options, expected, monkeypatch):
  """Catches an anchor that is stored wider, or elsewhere, than asked for.

  Of params, gradients, Adam's moments and the anchor: on the device, on its host.
  """
  like_an_accelerator(monkeypatch)  # the library asks the devices of this machine, a CPU
  tree = shapes.deeper(shapes.t5_base()['encoder']['block']['1'], 2)
  options = {'anchor': compiled.nowhere(tree)} | options
  one, _ = compiled.compile_step(make(**options), tree, compiled.TARGETS['v5e'])
  per_parameter = 4 / one.param_bytes
  found = one.argument_bytes * per_parameter, one.host_bytes * per_parameter
  np.testing.assert_allclose(found, expected, rtol=0.01)


@pytest.mark.parametrize(('name', 'packets'), [('v5p-64', 2), ('8 H100', 1)])
def test_seven_billion_parameters(name, packets):
  """Catches a gathered param, an all-reduce a layer, and a third sweep over stacked layers."""
  run = at_scale.RUNS[name]
  tx, target = at_scale.adam_spd(anchor_dtype=jnp.bfloat16), compiled.TARGETS[run.target]
  one, _ = compiled.compile_step(tx, at_scale.SHAPES, target, axes=run.axes, specs=at_scale.SPECS)
  assert 7.4 < one.passes <= 11.1
  assert [kind for kind, _, _ in one.collectives] == ['all-reduce'] * packets
  assert sum(size for _, _, size in one.collectives) < 4000


def test_adam_is_seven_passes():
  """Catches a count of passes that is off: each of g, m, v, θ is read, m, v, θ are written."""
  tx = methods.OPTIMIZERS[methods.REFERENCE](None)
  for target in ('v5e', 'h200'):
    one, _ = compiled.compile_step(tx, shapes.vit_b16(), compiled.TARGETS[target])
    assert one.passes == pytest.approx(7, abs=0.05)
