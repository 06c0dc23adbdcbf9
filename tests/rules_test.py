"""Rules of one's own: what decides how far a layer is brought home, as one value.

The rules here keep two numbers per layer; a loop in NumPy says how they evolve.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from by_reference import ADAM, own
from contract_test import bits, loop, make_step, noise, normal

import spd_optax as spd
from spd_optax import audit

STRENGTH, DECAY, MARGIN = 0.75, 0.625, 0.5
INIT = {'mean': 0.0, 'square': 1.0}


def steady(rule, norms, numbers):
  """Averages of ⟨g, d⟩ and of its square; a layer is held where the first is not small."""
  inner = norms['inner']
  mean = rule.decay * numbers['mean'] + (1 - rule.decay) * inner
  square = rule.decay * numbers['square'] + (1 - rule.decay) * inner**2
  return mean > -rule.margin * jnp.sqrt(square), {'mean': mean, 'square': square}


class HoldIfSteady(spd.Rule):
  """For both forms: the part of the way home grows with the mean."""

  decay: float = DECAY
  margin: float = MARGIN
  needs = ()
  numbers = INIT

  def decide(self, norms, numbers, strength):
    condition, numbers = steady(self, norms, numbers)
    ratio = jnp.where(condition, jnp.abs(jnp.tanh(numbers['mean'])), 0)
    return spd.Decision(condition=condition, ratio=ratio, scale=strength * ratio, numbers=numbers)


class HoldOutward(spd.Rule):
  """Around an optimizer alone: the part of the way home is a part of what the step grew by."""

  decay: float = DECAY
  margin: float = MARGIN
  needs = ('after', 'gradient_norm', 'step')
  numbers = INIT

  def decide(self, norms, numbers, strength):
    condition, numbers = steady(self, norms, numbers)
    before, after, size = norms['distance'], norms['after'], norms['gradient_norm']
    ratio = jnp.maximum(after - before, 0) / (after + norms['step']) * size / (size + 1)
    return spd.Decision(condition=condition, ratio=ratio, scale=strength * ratio, numbers=numbers)


class Loop:
  """The same rules in NumPy: layers in loops, in float64."""

  def __init__(self, anchors, layers, outward):
    self.anchors, self.layers, self.outward = anchors, layers, outward
    self.mean = dict.fromkeys(layers, INIT['mean'])
    self.square = dict.fromkeys(layers, INIT['square'])
    self.constrained = dict.fromkeys(layers, 0)
    self.condition, self.ratio, self.distance = {}, {}, {}

  def scales(self, params, gradients, updates):
    """How far home each leaf, or slice of it, shall go: (leaf's name, index) -> scale."""
    found = {}
    for layer, members in self.layers.items():
      g, d, moved = (
        np.concatenate([np.ravel(tree[name][at]) for name, at in members])
        for tree in (
          gradients,
          {n: params[n] - self.anchors[n] for n in params},
          {n: params[n] + updates[n] - self.anchors[n] for n in params},
        )
      )
      inner, before, after, size = g @ d, *map(np.linalg.norm, (d, moved, g))
      step = np.linalg.norm(moved - d)
      self.mean[layer] = DECAY * self.mean[layer] + (1 - DECAY) * inner
      self.square[layer] = DECAY * self.square[layer] + (1 - DECAY) * inner**2
      held = self.mean[layer] > -MARGIN * np.sqrt(self.square[layer])
      if self.outward:
        ratio = max(after - before, 0) / (after + step) * size / (size + 1)
      else:
        ratio = abs(np.tanh(self.mean[layer])) if held else 0.0
      self.condition[layer], self.ratio[layer], self.distance[layer] = held, ratio, before
      self.constrained[layer] += bool(held)
      found |= dict.fromkeys(members, STRENGTH * ratio if held else 0.0)
    return found


NAMES = {'body/kernel': ('body', 'kernel'), 'head': ('head',)}
WHOLE, STACKED, GROUPED = {}, {'stack_axis': {'body': 0, 'head': None}}, {'group': lambda p: 'all'}
LAYERS = {
  'whole': (WHOLE, {name: [(name, ())] for name in NAMES}),
  'stacked': (
    STACKED,
    {**{('body/kernel', at): [('body/kernel', at)] for at in range(3)}, 'head': [('head', ())]},
  ),
  'group': (GROUPED, {'all': [(name, ()) for name in NAMES]}),
}
every_layout = pytest.mark.parametrize('layout', LAYERS)
INNER = optax.adam(**ADAM)


def around(rule, **options):
  return spd.with_projection_decay(INNER, 0, STRENGTH, rule=rule, **options)


def in_chain(rule, **options):
  return optax.chain(spd.projection_decay(0, STRENGTH, rule=rule, **options), INNER)


FORMS = {
  'around': (around, HoldIfSteady(), False),
  'around, after': (around, HoldOutward(), True),
  'in the chain': (in_chain, HoldIfSteady(), False),
}
every_form = pytest.mark.parametrize('form', FORMS)


def flat(tree):
  """Arrays in float64 by their names."""
  return {'body/kernel': np.float64(tree['body']['kernel']), 'head': np.float64(tree['head'])}


def nested(leaves):
  as_arrays = {name: jnp.asarray(x, jnp.float32) for name, x in leaves.items()}
  return {'body': {'kernel': as_arrays['body/kernel']}, 'head': as_arrays['head']}


def spd_state(state):
  """The library's own state, around or in a chain."""
  return own(state if hasattr(state, 'projection_decay') else state[0])


def per_layer(values, layout):
  """Values by layer as the state has them: slices side by side, '~' in names."""
  if layout != 'stacked':
    return {name.replace('/', '~'): np.asarray(value) for name, value in values.items()}
  slices = np.array([values['body/kernel', at] for at in range(3)])
  return {'body~kernel': slices, 'head': np.asarray(values['head'])}


def assert_values(state, judge, layout):
  """The state has the numbers of the loop, by name."""
  found = spd_state(state)
  assert set(found.rule_state) == set(INIT)
  pairs = [
    (found.rule_state['mean'], judge.mean, 'mean'),
    (found.rule_state['square'], judge.square, 'square'),
    (optax.tree.get(state, 'mean'), judge.mean, 'mean'),
    (found.condition, judge.condition, 'condition'),
    (found.ratio, judge.ratio, 'ratio'),
    (found.distance, judge.distance, 'distance'),
    (found.constrained, judge.constrained, 'constrained'),
  ]
  for values, wanted, name in pairs:
    wanted = per_layer(wanted, layout)
    assert values.keys() == wanted.keys()
    for layer in wanted:
      message = f'{name} of {layer}'
      np.testing.assert_allclose(values[layer], wanted[layer], 2e-4, 1e-5, err_msg=message)


@every_layout
@every_form
def test_the_numbers_evolve_as_a_loop_says(form, layout):
  """Catches numbers that are lost, of another layer, of the wrong step, or begin at 0."""
  make, rule, outward = FORMS[form]
  options, layers = LAYERS[layout]
  tx = make(rule, **options)
  params, state, inner_state = normal(0), tx.init(normal(0)), INNER.init(normal(0))
  judge = Loop(dict.fromkeys(NAMES, 0.0), layers, outward)
  start = per_layer(dict.fromkeys(layers, INIT['square']), layout)
  for layer, wanted in start.items():
    np.testing.assert_array_equal(spd_state(state).rule_state['square'][layer], wanted)
  step, conditions = jax.jit(tx.update), []
  for at in range(8):
    gradients = jax.tree.map(lambda g, at=at: g[at], noise(0))
    g, theta = flat(gradients), flat(params)
    updates, state = step(gradients, state, params)
    if make is in_chain:
      scales = judge.scales(theta, g, dict.fromkeys(NAMES, 0.0))
      for (name, index), scale in scales.items():
        g[name][index] += scale * theta[name][index]
      wanted, inner_state = INNER.update(nested(g), inner_state, params)
      wanted = flat(wanted)
    else:
      wanted, inner_state = INNER.update(gradients, inner_state, params)
      wanted = flat(wanted)
      moved = {name: theta[name] + wanted[name] for name in NAMES}
      for (name, index), scale in judge.scales(theta, g, wanted).items():
        wanted[name][index] -= scale * moved[name][index]
    for name, found in flat(updates).items():
      np.testing.assert_allclose(found, wanted[name], rtol=2e-4, atol=1e-5, err_msg=name)
    assert_values(state, judge, layout)
    conditions += judge.condition.values()
    params = optax.apply_updates(params, updates)
  assert any(conditions)  # else the loop says little
  assert not all(conditions)


def kinds(tree):
  return jax.tree.map(lambda x: (x.shape, x.dtype), tree)


@functools.cache
def trained(form, layout):
  """Params and states of a run, whose names have slashes and slices; shared by the tests."""
  make, rule, _ = FORMS[form]
  tx = make(rule, **LAYERS[layout][0])
  return loop(jax.jit(make_step(tx)), normal(0), tx.init(normal(0)), noise(0))


# A stack has values of both shapes.
@pytest.mark.parametrize(
  'layout', ['stacked', *(pytest.param(x, marks=pytest.mark.slow) for x in ('whole', 'group'))]
)
@every_form
def test_the_numbers_keep_their_form(form, layout):
  """Catches numbers of another shape or dtype after a step, in scan, and in vmap."""
  make, rule, _ = FORMS[form]
  tx = make(rule, **LAYERS[layout][0])
  step, announced = make_step(tx), kinds(jax.eval_shape(tx.init, normal(0)))
  state = spd_state(tx.init(normal(0)))
  shape = (3,) if layout == 'stacked' else ()
  layer = 'all' if layout == 'group' else 'body~kernel'
  assert kinds(state.rule_state['mean'])[layer] == (shape, jnp.float32)
  trail = trained(form, layout)
  assert all(kinds(state) == announced for _, state in trail)
  scan = jax.jit(lambda c, gs: jax.lax.scan(lambda c, g: (step(*c, g), None), c, gs)[0])
  _, scanned = scan((normal(0), tx.init(normal(0))), noise(0))
  seeds = (0, 5)
  stack = lambda *xs: jnp.stack(xs)  # noqa: E731
  params, gradients = (jax.tree.map(stack, *map(f, seeds)) for f in (normal, noise))
  gradients = jax.tree.map(lambda g: jnp.swapaxes(g, 0, 1), gradients)
  run = loop(jax.jit(jax.vmap(step)), params, jax.vmap(tx.init)(params), gradients)
  of_first = jax.tree.map(lambda x: x[0], run[-1][1])
  assert kinds(scanned) == kinds(of_first) == announced
  for name in INIT:
    wanted = spd_state(trail[-1][1]).rule_state[name][layer]
    for found in (scanned, of_first):
      values = spd_state(found).rule_state[name][layer]
      np.testing.assert_allclose(values, wanted, rtol=1e-3, atol=1e-5)


def states(form, layout):
  """States after each of the first steps."""
  return [state for _, state in trained(form, layout)[1:4]]


SHOWN = {  # layers as records name them, and as keys of scalars do
  'whole': {'body/kernel': 'body/kernel', 'head': 'head'},
  'stacked': {
    **{f'body/kernel[{at}]': f'body/kernel/{at}' for at in range(3)},
    'head': 'head',
  },
  'group': {'all': 'all'},
}


def value_in(state, layout, name, shown):
  """A number of a layer in a state, by the name that records give the layer."""
  key, _, at = shown.rstrip(']').partition('[')
  values = spd_state(state).rule_state[name][key.replace('/', '~')]
  return float(values[int(at)] if at else values)


@every_layout
@every_form
def test_reports_show_the_numbers_by_name(form, layout):
  """Catches a number that shows as the ratio or the distance, or under another layer's name."""
  state = states(form, layout)[-1]
  records = {record.name: record for record in spd.layer_report(state)}
  scalars = spd.scalars(state)
  assert records.keys() == SHOWN[layout].keys()
  for shown, key in SHOWN[layout].items():
    assert set(records[shown].rule_state) == set(INIT)
    for name in INIT:
      wanted = value_in(state, layout, name, shown)
      assert records[shown].rule_state[name] == pytest.approx(wanted, rel=1e-6)
      assert scalars[f'spd/{key}/{name}'] == pytest.approx(wanted, rel=1e-6)
    distance = spd_state(state).distance
    key, _, at = shown.rstrip(']').partition('[')
    far = distance[key.replace('/', '~')]
    assert records[shown].distance == pytest.approx(float(far[int(at)] if at else far), rel=1e-6)
  assert set(spd.scalars(state, '')) >= {f'{key}/mean' for key in SHOWN[layout].values()}


@every_layout
@every_form
def test_logs_keep_the_numbers_by_name(form, layout, tmp_path):
  """Catches a log that leaves them out, or mixes up its columns."""
  trail = states(form, layout)
  path = tmp_path / 'run.jsonl'
  with spd.AuditLog(path, transform=form) as log:
    for step, state in enumerate(trail):
      log.record(step, state)
  run = audit.read(path)
  assert len(run.records) == len(trail)
  assert sorted(run.layers) == sorted(SHOWN[layout])
  for record, state in zip(run.records, trail, strict=True):
    assert set(record.rule_state) == set(INIT)
    for name in INIT:
      wanted = [value_in(state, layout, name, shown) for shown in run.layers]
      np.testing.assert_allclose(record.rule_state[name], wanted, rtol=1e-6)
  audit.verify(path)


@pytest.mark.parametrize(
  'tx',
  [spd.projection_decay(), spd.with_projection_decay(INNER), spd.adam_spd(0.1), spd.l2_sp()],
  ids=['projection_decay', 'with_projection_decay', 'adam_spd', 'l2_sp'],
)
def test_the_default_rules_keep_no_numbers(tx):
  """Catches empty columns in states and reports."""
  state = tx.init(normal(0))
  assert own(state).rule_state == {}
  assert all(record.rule_state == {} for record in spd.layer_report(state))


@every_form
def test_a_hyperparameter_of_a_rule_is_injected(form):
  """Catches a hyperparameter that is a constant of the program, and one that is not looked up."""
  make, rule, _ = FORMS[form]
  kind = type(rule)
  tx = optax.inject_hyperparams(lambda decay: make(kind(decay=decay)))(decay=DECAY)
  state, traces = tx.init(normal(0)), []

  @jax.jit
  def step(params, state, gradients):
    traces.append(None)
    return make_step(tx)(params, state, gradients)

  for decay in (DECAY, 0.125):
    state = optax.tree.set(tx.init(normal(0)), decay=jnp.float32(decay))
    found = loop(step, normal(0), state, noise(0))[-1][1]
    plain = make(kind(decay=decay))
    wanted = loop(jax.jit(make_step(plain)), normal(0), plain.init(normal(0)), noise(0))[-1][1]
    for name in INIT:
      for layer, value in optax.tree.get(wanted, name).items():
        values = optax.tree.get(found, name)
        np.testing.assert_allclose(values[layer], value, rtol=1e-3, atol=1e-5)
  assert len(traces) == 1


def test_a_rule_is_a_pytree_of_its_hyperparameters():
  """Catches a rule that jit cannot take, and one that can be changed by mistake."""
  rule = HoldIfSteady(decay=0.25, margin=0.125)
  assert jax.tree.leaves(rule) == [0.25, 0.125]
  doubled = jax.jit(lambda rule: jax.tree.map(lambda x: 2 * x, rule))(rule)
  assert isinstance(doubled, HoldIfSteady)
  assert (float(doubled.decay), float(doubled.margin)) == (0.5, 0.25)
  with pytest.raises(AttributeError):
    rule.decay = 1.0


def constant(value):
  """A rule of a class of its own, which differs from others in what it computes alone."""

  class Constant(spd.Rule):
    needs = ()

    def decide(self, norms, numbers, strength):
      del strength
      ratio = 0 * norms['inner'] + value
      return spd.Decision(condition=ratio > 0, ratio=ratio, scale=ratio, numbers=numbers)

  return Constant()


def test_rules_of_two_classes_are_never_taken_for_each_other():
  """Catches a compiled rule that is found again for a rule of another class.

  To JAX 0.10 two pytrees made by `register_dataclass` have equal structures, whatever their
  classes and fields, so that a table of compiled functions may mix them up, if seldom.
  """
  params = {'w': jnp.ones(3)}
  for value, rule in enumerate(map(constant, range(40))):
    tx = spd.projection_decay(0, rule=rule)
    updates, state = tx.update(params, tx.init(params), params)
    assert float(state.ratio['w']) == value
    np.testing.assert_array_equal(updates['w'], np.full(3, 1.0 + value))


adam_spd = {'learning_rate': 0.125, 'eps': 2.0**-10}
SAME = {
  'projection_decay': (
    lambda: optax.chain(spd.projection_decay(), INNER),
    lambda: optax.chain(spd.projection_decay(rule=spd.GradientTurn()), INNER),
  ),
  'projection_decay, margin': (
    lambda: optax.chain(spd.projection_decay(margin=0.25), INNER),
    lambda: optax.chain(spd.projection_decay(rule=spd.GradientTurn(margin=0.25)), INNER),
  ),
  'with_projection_decay': (
    lambda: spd.with_projection_decay(INNER),
    lambda: spd.with_projection_decay(INNER, rule=spd.Projection()),
  ),
  'with_projection_decay, margin': (
    lambda: spd.with_projection_decay(INNER, margin=0.25),
    lambda: spd.with_projection_decay(INNER, rule=spd.Projection(margin=0.25)),
  ),
  'adam_spd': (
    lambda: spd.adam_spd(**adam_spd),
    lambda: spd.adam_spd(**adam_spd, rule=spd.Projection()),
  ),
}


@pytest.mark.parametrize('pair', SAME.values(), ids=SAME)
def test_the_defaults_are_rules(pair):
  """Catches a default that is not the rule that it is said to be: no bit may differ."""
  runs = []
  for make in pair:
    tx = make()
    runs.append(loop(jax.jit(make_step(tx)), normal(0), tx.init(normal(0)), noise(0)))
  assert bits(runs[0]) == bits(runs[1])
  assert jax.tree.structure(runs[0]) == jax.tree.structure(runs[1])
  assert any(n > 0 for n in spd_state(runs[0][-1][1]).constrained.values())


MISTAKES = (TypeError, ValueError)


@pytest.mark.parametrize('rule', [HoldOutward(), 'Projection'], ids=['own', 'Projection'])
def test_a_rule_of_the_step_is_no_link(rule):
  """Catches a link that is to know the step of an optimizer behind it."""
  rule = spd.Projection() if rule == 'Projection' else rule
  with pytest.raises(MISTAKES, match='with_projection_decay') as caught:
    spd.projection_decay(rule=rule).init(normal(0))
  assert type(rule).__name__ in str(caught.value)


MARGINS = {
  'projection_decay': lambda **options: spd.projection_decay(margin=0.25, **options),
  'with_projection_decay': lambda **options: spd.with_projection_decay(
    INNER, margin=0.25, **options
  ),
  'adam_spd': lambda **options: spd.adam_spd(0.1, margin=0.25, **options),
}


@pytest.mark.parametrize('make', MARGINS.values(), ids=MARGINS)
def test_a_rule_and_a_margin_are_too_much(make):
  """Catches a margin that does nothing because the rule has its own."""
  with pytest.raises(MISTAKES, match='margin') as caught:
    make(rule=HoldIfSteady())
  assert 'rule' in str(caught.value)


@pytest.mark.parametrize(
  ('rule', 'found'),
  [
    (HoldIfSteady, 'HoldIfSteady|type'),
    (lambda norms, numbers, strength: None, 'function'),
    ('projection', "str 'projection'"),
    (0.1, '0.1'),
  ],
  ids=['class', 'function', 'name', 'number'],
)
@pytest.mark.parametrize('make', [spd.projection_decay, around], ids=['link', 'around'])
def test_what_is_no_rule(make, rule, found):
  """Catches a rule that is no `Rule` and fails deep in a step."""
  with pytest.raises(TypeError, match='rule') as caught:
    make(rule=rule)
  assert any(text in str(caught.value) for text in found.split('|'))


@pytest.mark.parametrize('names', ['gradient_norm', ('gradients_norm',), ('after', 'norm')])
def test_what_a_rule_needs_has_a_known_name(names):
  """Catches a string that is taken for its letters, and a typing error that shows in a step."""

  class Typo(HoldIfSteady):
    needs = names

  with pytest.raises(TypeError, match=r"Typo.needs: .*'gradient_norm', 'after', 'step'.*found"):
    spd.with_projection_decay(INNER, rule=Typo())


@pytest.mark.parametrize('margin', [-0.5, 1.0, 2.0, np.nan])
@pytest.mark.parametrize('make', [in_chain, around], ids=['link', 'around'])
def test_an_injected_margin_out_of_range_holds_nothing(make, margin):
  """Catches a margin of 2 that holds every layer, which no error can tell of under jit."""
  tx = make(None, margin=jnp.float32(margin))
  _, state = tx.update(normal(1), tx.init(normal(0)), jax.tree.map(jnp.ones_like, normal(0)))
  assert not any(np.any(x) for x in optax.tree.get(state, 'condition').values())


GOOD = {'condition': jnp.array(True), 'ratio': jnp.float32(0), 'scale': jnp.float32(0)}
NUMBERS = {'mean': jnp.float32(0), 'square': jnp.float32(0)}


def decision(**changes):
  return lambda: spd.Decision(**{**GOOD, 'numbers': NUMBERS, **changes})


# What `decide` returns, and what the message must say besides the name of the rule.
WRONG = {
  'nothing': (lambda: None, 'None'),
  'tuple': (lambda: (True, 0.0, 0.0, NUMBERS), 'tuple'),
  'condition float': (decision(condition=jnp.float32(1)), 'condition & float32'),
  'condition shape': (decision(condition=jnp.zeros(3, bool)), r'condition & 3'),
  'ratio shape': (decision(ratio=jnp.zeros((2, 5))), r'ratio & 2, 5'),
  'ratio text': (decision(ratio='much'), "ratio & 'much'"),
  'scale shape': (decision(scale=jnp.zeros(7)), 'scale & 7'),
  'scale complex': (decision(scale=jnp.complex64(1)), 'scale & complex64'),
  'scale none': (decision(scale=None), 'scale & None'),
  'numbers missing': (decision(numbers={'mean': jnp.float32(0)}), 'square'),
  'numbers more': (decision(numbers={**NUMBERS, 'third': jnp.float32(0)}), 'third'),
  'numbers shape': (decision(numbers={**NUMBERS, 'square': jnp.zeros(11)}), 'square & 11'),
  'numbers complex': (
    decision(numbers={**NUMBERS, 'square': jnp.complex64(1)}),
    'square & complex64',
  ),
}


@pytest.mark.parametrize('jit', [True, False], ids=['jit', 'eager'])
@pytest.mark.parametrize('mistake', WRONG)
def test_a_rule_that_decides_nonsense(mistake, jit):
  """Catches a state that takes another form, and an error from inside jax."""
  make, fragments = WRONG[mistake]

  class OfMistakes(spd.Rule):
    needs = ()
    numbers = INIT

    def decide(self, norms, numbers, strength):
      del norms, numbers, strength
      return make()

  for tx in (spd.projection_decay(rule=OfMistakes()), around(OfMistakes())):
    update = jax.jit(tx.update) if jit else tx.update
    with pytest.raises(MISTAKES) as caught:
      update(normal(1), tx.init(normal(0)), normal(0))
    for text in ('OfMistakes', *fragments.split(' & ')):
      assert text in str(caught.value)


@every_layout
@pytest.mark.parametrize('make', [around, in_chain])
@pytest.mark.parametrize('dtype', ['bfloat16', 'float16', 'float32', 'complex64'])
def test_a_rule_sees_wide_arrays_per_layer(make, dtype, layout):
  """Catches sums in the dtype of narrow params, and leaves where values per layer belong."""
  seen = []

  class Looking(spd.Rule):
    needs = ('gradient_norm',)
    numbers = INIT

    def decide(self, norms, numbers, strength):
      assert set(norms) == {'inner', 'distance', 'gradient_norm'}
      assert set(numbers) == set(INIT)
      seen.extend([*norms.values(), *numbers.values()])
      del strength
      nothing = 0 * norms['inner']
      return spd.Decision(
        condition=nothing > 0, ratio=nothing, scale=nothing, numbers=dict(numbers)
      )

  params = normal(0, dtype=dtype)
  tx = make(Looking(), **LAYERS[layout][0])
  jax.eval_shape(tx.update, normal(1, dtype=dtype), jax.eval_shape(tx.init, params), params)
  assert {value.shape for value in seen} == ({(), (3,)} if layout == 'stacked' else {()})
  assert {value.dtype.name for value in seen} == {'float32'}


def test_a_rule_whose_scale_is_not_finite_moves_nothing():
  """Catches params that become NaN where a rule divides by 0."""

  class Careless(spd.Rule):
    needs = ()

    def decide(self, norms, numbers, strength):
      ratio = strength * norms['distance'] / (0 * norms['distance'])
      return spd.Decision(
        condition=norms['distance'] > 0, ratio=ratio, scale=ratio, numbers=numbers
      )

  tx = spd.projection_decay(0, rule=Careless())
  updates, state = jax.jit(tx.update)(normal(1), tx.init(normal(0)), normal(0))
  assert bits(updates) == bits(normal(1))
  assert all(state.condition.values())


@pytest.mark.parametrize('make', [around, in_chain])
def test_a_bad_strength_holds_nothing_whatever_the_rule(make):
  """Catches a rule that must check its strength by itself."""
  rule = HoldIfSteady(margin=8.0)
  tx = {
    around: spd.with_projection_decay(INNER, 0, jnp.float32(jnp.nan), rule=rule),
    in_chain: spd.projection_decay(0, jnp.float32(jnp.nan), rule=rule),
  }[make]
  plain = INNER if make is around else optax.identity()
  updates, state = tx.update(normal(1), tx.init(normal(0)), normal(0))
  assert bits(updates) == bits(plain.update(normal(1), plain.init(normal(0)), normal(0))[0])
  assert not any(own(state).condition.values())


@pytest.mark.parametrize('jit', [True, False], ids=['jit', 'eager'])
def test_a_gradient_of_nan_leaves_the_numbers_of_a_rule_alone(jit):
  """Catches a running mean that is NaN for good after one step."""
  optimizer = around(HoldIfSteady())
  params = jax.tree.map(jnp.ones_like, normal(0))
  update = jax.jit(optimizer.update) if jit else optimizer.update
  _, state = update(normal(1), optimizer.init(params), params)
  before = spd_state(state).rule_state
  gradients = jax.tree.map(lambda g: g * jnp.nan, normal(2))
  _, state = update(gradients, state, params)
  assert bits(spd_state(state).rule_state) == bits(before)
