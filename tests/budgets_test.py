"""Budgets: a strength that sets itself, what it does to layers, and what it is measured by."""

import math
import re

import chex
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import FORMS, bits, every_form, loop, make_step, noise, normal
from flax import nnx
from jax.sharding import PartitionSpec as P
from meshes import ANCHOR, alone, assert_close, sharded
from scipy import special, stats

import spd_optax as spd
from spd_optax import audit
from spd_optax.audit.__main__ import main

NAN, INF = math.nan, math.inf
# As measured: nothing moved, noise, nothing known, rounded below 0, far too much, about right.
DRIFTS = [0.0, 0.01, 0.03, NAN, 0.055, None, 0.2, -1e-9, 0.06, INF, 7.0, 0.049, 0.05, 0.0501, 0.04]


def budget_of(state):
  """The only state of a budget in a state."""
  leaves = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, spd.BudgetState))
  (found,) = [x for x in leaves if isinstance(x, spd.BudgetState)]
  return found


def reference(drifts, budget, init=1.0, low=0.01, high=100.0):
  """(λ, b) after each drift, by the equations in the docstring."""
  base, strength, n, crossing, found = init, 0.0, 0, None, []
  for drift in drifts:
    if drift is not None and math.isfinite(drift):
      n += 1
      share = max(drift, 0) / budget
      if crossing is None and share >= 1:
        crossing = n
      wanted = base * share**8
      strength = 0.0 if wanted < low else min(wanted, high)
      if low <= wanted <= high or (wanted < low and share >= 1) or (wanted > high and share < 1):
        pace = 1 / (10 + n) if crossing is None else 10 / (10 + crossing)
        logarithm = math.log(share) if share else -INF
        base = min(max(base * math.exp(pace * min(max(logarithm, -1), 1)), low), high)
    found.append((strength, base))
  return found


WIDE = (1e-9, 1e9)  # so that a single measurement could move b far


@pytest.mark.parametrize(
  ('init', 'scale', 'bounds'),
  [
    (0.1, 1e-6, (0.01, 100.0)),
    (1.0, 1.0, (0.01, 100.0)),
    (10.0, 1e6, (0.01, 100.0)),
    (1.0, 1.0, WIDE),
  ],
)
def test_the_strength_follows_the_equations(init, scale, bounds):
  """Catches a wrong power, pace or bound, a NaN that is learned from, and a unit that matters."""
  tx = spd.l2_sp(strength=spd.within_budget(0.05 * scale, init=init, bounds=bounds))
  params, state, found = jnp.ones(3), tx.init(jnp.ones(3)), []
  step = jax.jit(lambda state, drift: tx.update(params, state, params, drift=drift)[1])
  for drift in DRIFTS:
    state = step(state, drift if drift is None else drift * scale)
    found.append((float(budget_of(state).strength), float(budget_of(state).base)))
  np.testing.assert_allclose(found, reference(DRIFTS, 0.05, init, *bounds), rtol=2e-4)
  assert budget_of(state).drift == np.float32(0.04 * scale)


def at(strength, budget=0.5):
  """A budget under which a drift of just its size asks for this strength at the first update."""
  return {'strength': spd.within_budget(budget, init=strength)}, {'drift': jnp.float32(budget)}


START, GRADIENT = np.array([3.0, 4.0], np.float32), np.array([-6.0, -8.0], np.float32)


@pytest.mark.parametrize(
  ('strength', 'expected'),
  [(5.0, -10.0), (9.9, -10.0), (15.0, -5.0), (20.0, 0.0), (40.0, 20.0)],
)
def test_in_a_chain_no_layer_is_free_above_ten(strength, expected):
  """A gradient that points straight outward: the rule alone never holds the layer."""
  options, drift = at(strength)
  link = spd.projection_decay(0, **options)
  found, state = link.update(jnp.asarray(GRADIENT), link.init(START), START, **drift)
  np.testing.assert_allclose(found, expected * START / 5, rtol=1e-5, atol=1e-5)
  assert optax.tree.get(state, 'condition')[''] == (strength > 10)


@pytest.mark.parametrize(
  ('strength', 'expected'), [(5.0, 6.0), (9.9, 6.0), (15.0, 5.5), (20.0, 5.0), (90.0, 0.0)]
)
def test_around_an_optimizer_no_layer_is_free_above_ten(strength, expected):
  """The layer would go from 5 to 6; at the highest strengths it stops at its anchor."""
  options, drift = at(strength)
  tx = spd.with_projection_decay(optax.sgd(0.1), 0, **options)
  state = tx.init(START)
  after, _ = tx.apply(jnp.asarray(GRADIENT), state, START, **drift)
  np.testing.assert_allclose(after, expected * START / 5, rtol=1e-5, atol=1e-5)
  updates, _ = tx.update(jnp.asarray(GRADIENT), state, START, **drift)
  np.testing.assert_allclose(START + updates, after, rtol=1e-5, atol=1e-5)


def test_a_held_layer_does_not_pass_its_anchor():
  """λ r = 40 (1 − 1 / 6) would take it far beyond."""
  options, drift = at(40.0)
  tx = spd.with_projection_decay(optax.sgd(1.0, momentum=0.9), 0, **options)
  state = tx.init(START)
  state = optax.tree.set(state, trace=-jnp.asarray(START) / 0.9)  # momentum: outward
  after, _ = tx.apply(jnp.asarray(START) / 100, state, START, **drift)
  np.testing.assert_allclose(after, [0, 0], atol=1e-6)


def test_layers_are_free_while_the_drift_is_small():
  """Bit for bit; catches a strength that never is 0."""
  strength, params = spd.within_budget(1.0), normal(0)
  link = spd.projection_decay(strength=strength)
  update = jax.jit(lambda g, s, p: link.update(g, s, p, drift=0.3))
  state = link.init(params)
  moved, gradients = normal(1), normal(2)
  _, state = update(gradients, state, params)
  assert bits(update(gradients, state, moved)[0]) == bits(gradients)
  around = spd.with_projection_decay(optax.sgd(0.1), strength=strength)
  update = jax.jit(lambda g, s, p: around.update(g, s, p, drift=0.3))
  _, state = update(gradients, around.init(params), params)
  expected, _ = optax.sgd(0.1).update(gradients, optax.sgd(0.1).init(moved))
  assert bits(update(gradients, state, moved)[0]) == bits(expected)


@pytest.mark.parametrize(
  'make', [FORMS['around'], pytest.param(FORMS['in the chain'], marks=pytest.mark.slow)], ids=FORMS
)
def test_jit_scan_and_eager_agree(make):
  """Catches a state whose dtypes change, and numbers that eager mode takes for Python's."""
  tx = make(strength=spd.within_distance(0.2))
  step, start = make_step(tx), (normal(0), tx.init(normal(0)))
  gradients = noise(0)
  eager, jitted = (loop(f, *start, gradients)[-1] for f in (step, jax.jit(step)))
  scanned = jax.jit(lambda g: jax.lax.scan(lambda c, g: (step(*c, g), None), start, g)[0])(
    gradients
  )
  assert_close(eager, jitted)
  assert_close(scanned, jitted)
  assert budget_of(jitted[1]).measured == 12
  assert budget_of(jitted[1]).strength > 0


def test_each_seed_has_its_own_strength():
  """Under vmap; catches a state that has no axis for it."""
  tx = optax.chain(spd.projection_decay(strength=spd.within_budget(1.0)), optax.adam(0.1))
  params = jnp.ones((3, 4))
  state = jax.vmap(tx.init)(params)
  update = jax.vmap(lambda g, s, p, y: tx.update(g, s, p, drift=y))
  _, state = update(params, state, params, jnp.array([0.1, 1.0, 1.2]))
  np.testing.assert_allclose(budget_of(state).strength, [0, 1, 1.2**8], rtol=1e-5)


def test_multi_steps_measures_once_for_all_micro_batches():
  tx = optax.MultiSteps(spd.adam_spd(0.1, strength=spd.within_budget(1.0)), 3)
  params = jnp.ones(4)
  state = tx.init(params)
  for drift in (9.0, NAN, 1.0, NAN, 9.0, NAN):
    _, state = tx.update(params, state, params, drift=drift)
  assert budget_of(state).measured == 1  # at the third; the sixth was not measured
  assert budget_of(state).strength == 1


def test_a_budget_can_be_changed_in_a_run():
  """As a hyperparameter, which inject_hyperparams keeps in its state."""

  @optax.inject_hyperparams
  def made(budget):
    return spd.l2_sp(strength=spd.within_budget(budget))

  tx, params = made(budget=0.5), jnp.ones(2)
  state = tx.init(params)
  update = jax.jit(lambda state: tx.update(params, state, params, drift=1.0)[1])
  assert budget_of(update(state)).strength == 100
  state.hyperparams['budget'] = jnp.float32(1.0)
  assert budget_of(update(state)).strength == 1
  state.hyperparams['budget'] = jnp.float32(NAN)  # as if nothing had been measured
  assert budget_of(update(state)).measured == 0


def test_a_donated_state_takes_nothing_of_the_users():
  """Catches a budget that lies in the state as the user's own array, or in two places of it."""
  budget, init = jnp.float32(1.0), jnp.float32(2.0)
  tx, params = spd.l2_sp(strength=spd.within_budget(budget, init=init)), jnp.ones(2)
  update = jax.jit(lambda s: tx.update(params, s, params, drift=1.0)[1], donate_argnums=0)
  state = update(update(tx.init(params)))
  assert (budget, init, budget_of(state).strength) == (1, 2, 2)


def test_nnx_optimizers_pass_the_drift_on():
  model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
  link = spd.projection_decay(strength=spd.within_budget(1.0))
  optimizer = nnx.Optimizer(model, optax.chain(link, optax.adam(0.1)), wrt=nnx.Param)
  optimizer.update(model, jax.tree.map(jnp.ones_like, nnx.state(model, nnx.Param)), drift=1.1)
  found = spd.scalars(optimizer.opt_state)
  assert found['spd/strength'] == pytest.approx(1.1**8, rel=1e-5)
  assert (found['spd/budget'], found['spd/drift']) == (1, np.float32(1.1))


@every_form
def test_a_resumed_run_equals_one_that_was_not(make):
  """Catches a number of the controller that is not in the state."""
  tx = make(strength=spd.within_distance(0.2))
  step, gradients = jax.jit(make_step(tx)), noise(0)
  trail = loop(step, normal(0), tx.init(normal(0)), gradients)
  saved = flax.serialization.to_bytes(trail[6])
  params, state = flax.serialization.from_bytes((normal(1), tx.init(normal(1))), saved)
  rest = jax.tree.map(lambda x: x[6:], gradients)
  assert bits(loop(step, params, state, rest)[-1]) == bits(trail[-1])


def test_a_budget_is_met_from_any_dial():
  """Noisy drift, measured in every third step; catches a pace that is too slow, or swings."""
  rng = np.random.default_rng(0)
  inputs = jnp.asarray(rng.standard_normal((64, 8)), jnp.float32)
  target = jnp.asarray(rng.standard_normal((8, 4)), jnp.float32)
  draws = jnp.asarray(rng.integers(0, 64, (600, 8)))
  errors = jnp.asarray(np.exp(0.2 * rng.standard_normal(600) - 0.02), jnp.float32)
  rates = optax.cosine_decay_schedule(0.03, 600)

  def run(make, init):
    tx = optax.with_extra_args_support(make(init))
    start = jnp.zeros((8, 4))

    def drift_of(params):
      return spd.kl_from_base(inputs @ params, inputs @ start)

    def step(carry, each):
      params, state, count = carry
      rows, error = each
      wanted = jnp.argmax(inputs[rows] @ target, -1)

      def loss(params):
        logits = inputs[rows] @ params
        return optax.softmax_cross_entropy_with_integer_labels(logits, wanted).mean()

      drift = jnp.where(count % 3 == 0, error * drift_of(params), NAN)
      updates, state = tx.update(jax.grad(loss)(params), state, params, drift=drift)
      return (optax.apply_updates(params, updates), state, count + 1), None

    (params, _, _), _ = jax.lax.scan(step, (start, tx.init(start), 0), (draws, errors))
    return drift_of(params)

  budget = 0.1
  makers = {
    'chain': lambda init: optax.chain(
      spd.projection_decay(strength=spd.within_budget(budget, init=init)), optax.adam(rates)
    ),
    'around': lambda init: spd.adam_spd(rates, strength=spd.within_budget(budget, init=init)),
    'free': lambda init: optax.adam(rates),
  }
  dials = jnp.array([0.1, 1.0, 10.0])
  found = {name: jax.jit(jax.vmap(lambda i, m=m: run(m, i)))(dials) for name, m in makers.items()}
  assert all(found.pop('free') > 5 * budget)  # else nothing is at stake
  for name, drifts in found.items():
    np.testing.assert_allclose(drifts, budget, rtol=0.1, err_msg=name)


@pytest.mark.parametrize(
  'make',
  [
    lambda strength: optax.chain(spd.projection_decay(strength=strength), optax.adam(0.002)),
    lambda strength: spd.adam_spd(0.002, strength=strength),
  ],
  ids=FORMS,
)
def test_a_distance_is_a_ball_around_the_anchor(make):
  """All gradients point outward, so that no rule holds a layer by itself."""
  tx = make(spd.within_distance(0.1))
  start = {'kernel': jnp.ones((8, 8)), 'bias': jnp.ones(8)}

  def step(carry, _):
    params, state = carry
    gradients = jax.tree.map(lambda p: p - 2, params)
    updates, state = tx.update(gradients, state, params)
    return (optax.apply_updates(params, updates), state), None

  (params, state), _ = jax.jit(lambda: jax.lax.scan(step, (start, tx.init(start)), length=600))()
  far = optax.tree.norm(optax.tree.sub(params, start)) / optax.tree.norm(start)
  np.testing.assert_allclose(far, 0.1, rtol=0.1)
  np.testing.assert_allclose(budget_of(state).drift, far, rtol=0.05)


def in_a_ball(anchor=None, **options):
  return FORMS['around'](anchor, strength=spd.within_distance(0.1, init=10.0), **options)


@pytest.mark.eight_devices
@pytest.mark.parametrize(
  'name', ['FSDP x tensor', pytest.param('explicit', marks=pytest.mark.slow)]
)
def test_many_devices_are_one(name):
  """Catches a distance of single shards or slices."""
  expected = alone(in_a_ball, 'captured')
  # The eighth power makes eight roundings of one.
  found = sharded(in_a_ball, 'captured', name)
  chex.assert_trees_all_close(found, expected, rtol=1e-5, atol=1e-5)
  assert budget_of(expected[1]).strength > 0


@pytest.mark.eight_devices
def test_shard_map_measures_whole_layers():
  """Each device has a part of the layer; `axis_name` says so."""
  on = jax.make_mesh((8,), ('x',), axis_types=(jax.sharding.AxisType.Auto,))
  strength = spd.within_distance(0.1)
  split, whole = (
    spd.projection_decay(0.9 * ANCHOR, strength, axis_name=name) for name in ('x', None)
  )
  moved = ANCHOR * np.linspace(1, 1.5, 8, dtype=np.float32)[:, None]
  _, expected = whole.update(moved, whole.init(moved), moved)
  state = whole.init(moved)
  specs = optax.tree.map_params(whole, lambda _: P('x'), state, transform_non_params=lambda _: P())

  @jax.shard_map(mesh=on, in_specs=(P('x'), specs, P('x')), out_specs=specs)
  def update(gradients, state, params):
    return split.update(gradients, state, params)[1]

  found = budget_of(update(moved, state, moved))
  assert_close(found, budget_of(expected))
  assert found.strength > 0


# What cannot work.

WRONG_DRIFTS = {
  'missing': ({}, TypeError, r'needs a drift: update\(gradients, state, params, drift=…\)'),
  'per example': ({'drift': np.ones(8)}, ValueError, 'drift: expected a number ≥ 0, or NaN'),
  'text': ({'drift': '0.1'}, TypeError, "drift: .* found str '0.1'"),
  'complex': ({'drift': 1j}, TypeError, 'found complex'),
}


@pytest.mark.parametrize('name', WRONG_DRIFTS)
@every_form
def test_wrong_drifts(make, name):
  """At trace time, so that no step of a run is lost."""
  passed, error, message = WRONG_DRIFTS[name]
  tx, params = make(strength=spd.within_budget(0.1)), normal(0)
  with pytest.raises(error, match=message):
    jax.eval_shape(lambda state: tx.update(params, state, params, **passed), tx.init(params))


@every_form
def test_a_zero_anchor_has_no_relative_distance(make):
  tx, params = make(0, strength=spd.within_distance(0.1)), normal(0)
  with pytest.raises(ValueError, match='the anchor is zero'):
    tx.update(params, tx.init(params), params)


@every_form
def test_a_state_of_another_strength(make):
  """As after a checkpoint of a run with a number."""
  budget, number = make(strength=spd.within_distance(0.1)), make(strength=1.0)
  params = normal(0)
  for tx, other in ((budget, number), (number, budget)):
    with pytest.raises(ValueError, match='the optimizer state was made with a'):
      tx.update(params, other.init(params), params)


# What is measured.


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_kl_is_that_of_scipy(dtype):
  """Catches the other direction, a sum where there is a mean, and logits taken for logarithms."""
  rng = np.random.default_rng(0)
  new, base = jnp.asarray(3 * rng.standard_normal((2, 5, 4, 7)), dtype)
  counts = rng.random((5, 4)) < 0.6
  p, p_0 = (special.softmax(np.asarray(x, np.float64), -1) for x in (new, base))
  expected = stats.entropy(p_0, p, axis=-1)
  np.testing.assert_allclose(spd.kl_from_base(new, base), expected.mean(), rtol=1e-5)
  found = spd.kl_from_base(new, base, where=counts)
  np.testing.assert_allclose(found, expected[counts].mean(), rtol=1e-5)
  assert found.dtype == jnp.float32


def test_kl_where_a_class_is_ruled_out():
  """By a logit of −∞; catches ∞ − ∞, in the value, in the gradient, or on the way."""
  logits, base = jnp.array([1.0, 2.0, -INF]), jnp.array([2.0, 2.0, -INF])
  with jax.debug_nans(True):
    value, gradient = jax.value_and_grad(spd.kl_from_base)(logits, base)
  p, p_0 = (special.softmax(np.asarray(x, np.float64)) for x in (logits, base))
  np.testing.assert_allclose(value, stats.entropy(p_0, p), rtol=1e-5)
  np.testing.assert_allclose(gradient, p - p_0, rtol=1e-5)


def test_cosine_is_that_of_numpy():
  rng = np.random.default_rng(0)
  new, base = rng.standard_normal((2, 6, 5))
  cosines = np.sum(new * base, -1) / np.linalg.norm(new, axis=-1) / np.linalg.norm(base, axis=-1)
  np.testing.assert_allclose(spd.cosine_from_base(new, base), np.mean(1 - cosines), rtol=1e-5)
  rows = np.arange(6) % 2 == 0
  found = spd.cosine_from_base(new, base, where=rows)
  np.testing.assert_allclose(found, np.mean(1 - cosines[rows]), rtol=1e-5)


@pytest.mark.parametrize('measure', [spd.kl_from_base, spd.cosine_from_base])
def test_measures_at_their_ends(measure):
  """Nothing moved is 0; no token at all is NaN, which `update` takes for no measurement."""
  same = np.array([[1.0, 2.0, 0.5]])
  assert abs(measure(same, same)) < 1e-6
  assert np.isnan(measure(same, same, where=np.array([False])))


def test_classes_that_are_ruled_out_count_for_nothing():
  """Logits of −∞, of a masked vocabulary; catches 0 · ∞."""
  base = jnp.array([[1.0, 2.0, -INF]])
  new = base + jnp.array([[0.5, 0.0, 0.0]])
  np.testing.assert_allclose(
    spd.kl_from_base(new, base), spd.kl_from_base(new[:, :2], base[:, :2]), rtol=1e-6
  )


@every_form
def test_where_no_layer_is_held_a_distance_is_no_error(make):
  tx, params = make(free='**', strength=spd.within_distance(0.1)), normal(0)
  _, state = tx.update(params, tx.init(params), params)
  assert budget_of(state).measured == 0


def test_a_step_inside_a_conditional_without_jit():
  """Where the count is a number, and what depends on it is traced."""
  tx, params = optax.apply_if_finite(spd.adam_spd(0.1), 2), jnp.ones(2)
  _, state = tx.update(params, tx.init(params), params)
  assert optax.tree.get(state, 'anchor').tolist() == [1, 1]


# In the log.


def logged(path, drifts, budget=0.5, every=1, **options):
  """A log of one layer whose drift is given."""
  tx = optax.chain(spd.projection_decay(0, spd.within_budget(budget)), optax.sgd(0.1))
  params = jnp.ones(2)
  state = tx.init(params)
  with spd.AuditLog(path, transform='projection_decay') as log:
    for i, drift in enumerate(drifts):
      _, state = tx.update(params, state, params, drift=drift)
      if i % every == 0:
        log.record(i + 1, state, **options)
  return path


def test_the_log_has_budget_drift_and_strength(tmp_path):
  path = logged(tmp_path / 'run.jsonl', [0.1, 0.5, NAN], metrics={'loss': 1.0})
  metrics = [record.metrics for record in audit.read(path).records]
  assert [x['spd/budget'] for x in metrics] == [0.5] * 3
  np.testing.assert_allclose([x['spd/drift'] for x in metrics], [0.1, 0.5, 0.5], rtol=1e-6)
  np.testing.assert_allclose([x['spd/strength'] for x in metrics], [0, 1, 1], rtol=1e-5)
  assert metrics[0]['loss'] == 1


def test_what_scalars_returns_may_be_logged(tmp_path):
  """It has the names of the log's own metrics, too."""
  tx, params = spd.adam_spd(0.1, strength=spd.within_distance(0.1)), jnp.ones(2)
  _, state = tx.update(params, tx.init(params), params)
  found = spd.scalars(state)
  with spd.AuditLog(tmp_path / 'run.jsonl') as log:
    log.record(1, state, found)
  assert audit.read(tmp_path / 'run.jsonl').records[0].metrics == found


def test_a_metric_of_the_same_name_is_the_users(tmp_path, capsys):
  """Without a budget; catches a report that looks for the drift beside it."""
  tx, params = spd.adam_spd(0.1), jnp.ones(2)
  _, state = tx.update(params, tx.init(params), params)
  with spd.AuditLog(tmp_path / 'run.jsonl') as log:
    log.record(1, state, {'spd/budget': 3.0})
  assert main(['report', str(tmp_path / 'run.jsonl')]) == 0
  assert re.search('spd/budget .* 3 ', capsys.readouterr().out)


VERDICTS = {
  'never bound': ([0.01, 0.02], ['kept: the last drift is 0.02, 4 % of 0.5', 'never bound']),
  'kept': (
    [0.1, 0.6, 0.49],
    [
      *('kept: the last drift is 0.49, 98 %', 'above it in 1 of 3 records', 'at most 1.2 times'),
      *('bound from step 2 on, in 67 % of the records', 'Cost: strength'),
    ],
  ),
  'nearly': ([0.1, 0.52], ['kept within 10 %: the last drift is 0.52, 104 % of 0.5']),
  'not kept': ([0.1, 0.9], ['not kept: the last drift is 0.9, 180 % of 0.5']),
  'better than the start': ([-0.3, -0.1], ['kept: the last drift is -0.1', 'never bound']),
  'not measured': ([NAN, None], ['0.5, but no drift was measured, so all layers were free']),
  'between records': (
    [0.1] + [0.6] * 4 + [0.1],
    ['kept: the last drift is 0.1', 'bound between records only', 'held in 67 % of the updates'],
  ),
}


@pytest.mark.parametrize('name', VERDICTS)
def test_the_report_says_what_became_of_the_budget(tmp_path, capsys, monkeypatch, name):
  monkeypatch.setenv('COLUMNS', '400')
  drifts, words = VERDICTS[name]
  path = logged(tmp_path / 'run.jsonl', drifts, every=5 if name == 'between records' else 1)
  assert main(['report', str(path), '--html', str(tmp_path / 'run.html')]) == 0
  printed = capsys.readouterr().out
  assert all(word in printed for word in words), printed
  assert words[0].split(':')[0] in (tmp_path / 'run.html').read_text()


def test_two_budgets_are_told_apart(tmp_path, capsys, monkeypatch):
  """Catches layers that are counted for the budget of others."""
  monkeypatch.setenv('COLUMNS', '400')
  params = {'a': jnp.ones(2), 'b': jnp.ones(2)}
  strengths = {'a': spd.within_budget(1e6), 'b': spd.within_budget(0.01)}
  parts = {k: optax.chain(spd.projection_decay(0, s), optax.sgd(0.1)) for k, s in strengths.items()}
  tx = optax.partition(parts, {'a': 'a', 'b': 'b'})
  state = tx.init(params)
  with spd.AuditLog(tmp_path / 'run.jsonl') as log:
    for step in range(3):
      _, state = tx.update(params, state, params, drift=0.02)
      log.record(step, state)
  assert main(['report', str(tmp_path / 'run.jsonl')]) == 0
  verdict = capsys.readouterr().out.splitlines()[0]
  assert 'State_0/budget kept' in verdict
  assert 'never bound' in verdict
  assert 'State_1/budget not kept' in verdict
  assert 'held in 100 % of the updates' in verdict


@pytest.mark.parametrize(
  ('drift', 'message'),
  [(0.1, None), (-0.1, None), (NAN, 'the budget has seen no drift in 100 updates')],
)
def test_free_layers_are_no_reason_to_warn(tmp_path, recwarn, drift, message):
  """Unless the budget never sees a drift."""
  logged(tmp_path / 'run.jsonl', [drift] * 105)
  said = [str(warning.message) for warning in recwarn]
  assert [message in text for text in said] == ([True] if message else [])


def test_a_budget_that_is_too_tight_is_said(tmp_path):
  """And not that the chain's order or the margin is wrong, as where a layer is always held."""
  with pytest.warns(UserWarning, match='the budget is so tight that every layer was held') as found:
    logged(tmp_path / 'run.jsonl', [0.9] * 110)
  assert not any('no longer selective' in str(warning.message) for warning in found)
