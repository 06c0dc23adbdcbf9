"""Warnings where a transformation stands in a wrong place, and none where it stands well."""

import re
import warnings

import jax
import jax.numpy as jnp
import optax
import pytest

import spd_optax as spd

ADAM, LINK, SPD = optax.adam(0.1), spd.projection_decay(), spd.adam_spd(0.1)
SCHEDULE = optax.constant_schedule(0.1)
PARAMS = {'kernel': jnp.ones((2, 3)), 'bias': jnp.ones(3)}


class Always(spd.Rule):
  def decide(self, norms, numbers, strength):
    return spd.Decision(norms['distance'] >= 0, norms['distance'], strength)


WRONG = {
  'behind the optimizer': (
    lambda: optax.chain(ADAM, LINK),
    'behind scale_by_adam, so that it sees',
  ),
  'behind an optimizer without state': (
    lambda: optax.chain(optax.sgd(SCHEDULE), LINK),
    'behind scale_by_schedule',
  ),
  'behind it in a named chain': (
    lambda: optax.named_chain(('adam', ADAM), ('spd', LINK)),
    'behind a learning rate, scale_by_adam',
  ),
  'behind an optimizer of some params': (
    lambda: optax.chain(optax.masked(ADAM, {'kernel': True, 'bias': False}), LINK),
    'behind a learning rate, scale_by_adam',
  ),
  'behind momentum': (lambda: optax.chain(optax.sgd(0.1, momentum=0.9), LINK), 'behind trace'),
  'behind it in a chain of chains': (
    lambda: optax.chain(ADAM, optax.chain(optax.clip(1.0), LINK)),
    'behind scale_by_adam',
  ),
  'under inject_hyperparams': (
    lambda: optax.chain(ADAM, optax.inject_hyperparams(spd.projection_decay)(strength=1.0)),
    'behind scale_by_adam',
  ),
  'both forms, in a chain': (lambda: optax.chain(LINK, SPD), 'are links of one chain'),
  'both forms, one around the other': (
    lambda: spd.with_projection_decay(optax.chain(LINK, ADAM)),
    'is around a projection_decay',
  ),
  'adam_spd in it': (
    lambda: spd.with_projection_decay(optax.chain(optax.clip(1.0), SPD)),
    'is around a with_projection_decay',
  ),
  'around MultiSteps': (
    lambda: spd.with_projection_decay(optax.MultiSteps(ADAM, 2)),
    r'around optax.MultiSteps.* Put MultiSteps outside',
  ),
  'around MultiSteps in a chain': (
    lambda: spd.with_projection_decay(
      optax.chain(optax.clip(1.0), optax.MultiSteps(ADAM, 2).gradient_transformation())
    ),
    'around optax.MultiSteps',
  ),
  'around AdamW': (
    lambda: spd.with_projection_decay(optax.adamw(0.1)),
    r'weight decay toward 0 \(0.0001\).*pass weight_decay=0',
  ),
  'around a Lion with its default decay': (
    lambda: spd.with_projection_decay(optax.lion(0.1)),
    r'weight decay toward 0 \(0.001\)',
  ),
  'around an AdamW whose decay is injected': (
    lambda: spd.with_projection_decay(optax.inject_hyperparams(optax.adamw)(0.1, weight_decay=0.1)),
    r'weight decay toward 0 \(0.1\)',
  ),
  'around AdamW for some params': (
    lambda: spd.with_projection_decay(
      optax.partition({'a': optax.adamw(0.1), 'b': ADAM}, {'kernel': 'a', 'bias': 'b'})
    ),
    'weight decay toward 0',
  ),
  'adam_spd behind Adam': (
    lambda: optax.chain(optax.scale_by_adam(), SPD),
    r'adam_spd\) stands behind scale_by_adam',
  ),
  'inside schedule_free': (
    lambda: optax.contrib.schedule_free(SPD, 0.1),
    r'is inside optax.contrib.schedule_free.* Put it around',
  ),
  'a schedule behind adam_spd': (
    lambda: optax.chain(SPD, optax.scale_by_schedule(SCHEDULE)),
    r'adam_spd\) stands before scale_by_schedule',
  ),
}


@pytest.mark.parametrize('name', WRONG)
def test_a_wrong_place_is_said_once(name):
  """At the user's own line, also at trace time."""
  make, message = WRONG[name]
  init = make().init
  with pytest.warns(UserWarning, match=message) as found:
    jax.eval_shape(init, PARAMS)
  (said,) = found
  assert said.filename == __file__


IN_THE_FIRST_UPDATE = {
  'L2-SP behind a schedule': (
    lambda: optax.chain(optax.sgd(SCHEDULE), spd.l2_sp()),
    'l2_sp stands behind a learning rate, so that its pull has the wrong sign',
  ),
  'a rule of the user behind a schedule': (
    lambda: optax.chain(optax.sgd(SCHEDULE), spd.projection_decay(rule=Always())),
    'projection_decay stands behind a learning rate',
  ),
  'behind SGD': (
    lambda: optax.chain(optax.sgd(0.1), spd.projection_decay()),
    'behind a learning rate, so that it',
  ),
  'behind SGD of signs': (
    lambda: optax.chain(optax.sign_sgd(0.1), spd.projection_decay()),
    'behind a learning rate, scale_by_sign',
  ),
  'behind SGD in a named chain': (
    lambda: optax.named_chain(('sgd', optax.sgd(0.1)), ('spd', spd.projection_decay())),
    'behind a learning rate',
  ),
  'L2-SP behind SGD': (
    lambda: optax.chain(optax.sgd(0.1), spd.l2_sp()),
    'l2_sp stands behind a learning rate',
  ),
  'L2-SP behind Adam': (
    lambda: optax.chain(ADAM, spd.l2_sp()),
    'l2_sp stands behind a learning rate',
  ),
}


@pytest.mark.parametrize('jit', [True, False], ids=['jit', 'eager'])
@pytest.mark.parametrize('name', IN_THE_FIRST_UPDATE)
def test_a_learning_rate_before_is_seen_in_the_first_update(name, jit):
  """Catches the wrong sign of a pull that no test of the state can see, and a warning per step."""
  make, message = IN_THE_FIRST_UPDATE[name]
  tx = make()
  update = jax.jit(tx.update) if jit else tx.update
  with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter('always')
    state = tx.init(PARAMS)
    for _ in range(3):
      _, state = update(PARAMS, state, PARAMS)
  (said,) = caught
  assert re.search(message, str(said.message))
  assert said.filename == __file__


def with_an_unbound_variable(flag=False):
  if flag:
    extra = 1.0

  def update(updates, state, params=None):
    return jax.tree.map(lambda g: g * (extra if flag else 1.0), updates), state

  return optax.GradientTransformation(lambda params: (), update)


def _link(rate):  # a name that the library has, too
  scale = optax.scale(rate)
  return optax.GradientTransformation(
    lambda p: scale.init(p), lambda g, s, p=None: scale.update(g, s)
  )


RIGHT = {
  'around one of the user': lambda: spd.with_projection_decay(with_an_unbound_variable()),
  'around another of the user': lambda: spd.with_projection_decay(_link(0.1)),
  'around a decay that is injected as 0': lambda: optax.inject_hyperparams(
    lambda decay: spd.with_projection_decay(optax.adamw(0.1, weight_decay=decay))
  )(decay=0.0),
  'first in a chain': lambda: optax.chain(LINK, ADAM),
  'behind clipping': lambda: optax.chain(optax.clip_by_global_norm(1.0), LINK, ADAM),
  'adam_spd behind clipping': lambda: optax.chain(optax.clip_by_global_norm(1.0), SPD),
  'around a chain': lambda: spd.with_projection_decay(optax.chain(optax.clip(1.0), ADAM)),
  'around a schedule': lambda: spd.adam_spd(SCHEDULE),
  'around AdamW without decay': lambda: spd.with_projection_decay(
    optax.adamw(0.1, weight_decay=0.0)
  ),
  'around Lion without decay': lambda: spd.with_projection_decay(optax.lion(0.1, weight_decay=0.0)),
  'MultiSteps outside': lambda: optax.MultiSteps(SPD, 2),
  'for some params': lambda: optax.partition(
    {'a': optax.chain(LINK, ADAM), 'b': SPD}, {'kernel': 'a', 'bias': 'b'}
  ),
  'behind an optimizer of other params': lambda: optax.chain(
    optax.masked(ADAM, {'kernel': False, 'bias': True}),
    optax.masked(optax.chain(LINK, ADAM), {'kernel': True, 'bias': False}),
  ),
  'behind an optimizer of other params, by name': lambda: optax.named_chain(
    ('head', optax.masked(ADAM, {'kernel': False, 'bias': True})),
    ('body', optax.masked(optax.chain(LINK, ADAM), {'kernel': True, 'bias': False})),
  ),
  'adam_spd beside an optimizer of other params': lambda: optax.chain(
    optax.masked(ADAM, {'kernel': False, 'bias': True}),
    optax.masked(SPD, {'kernel': True, 'bias': False}),
  ),
  'L2-SP, decoupled': lambda: optax.chain(
    optax.scale_by_adam(), spd.l2_sp(), optax.scale_by_learning_rate(SCHEDULE)
  ),
  'L2-SP, decoupled, at a constant rate': lambda: optax.chain(
    optax.scale_by_adam(), spd.l2_sp(), optax.scale_by_learning_rate(0.1)
  ),
  'L2-SP, coupled': lambda: optax.chain(spd.l2_sp(), ADAM),
  'behind a reward turned around': lambda: optax.chain(optax.scale(-1.0), LINK, ADAM),
  'behind a scale of the loss': lambda: optax.chain(optax.scale(1 / 1024), LINK, ADAM),
  'under inject_hyperparams': lambda: optax.inject_hyperparams(spd.adam_spd)(0.1),
  'around others': lambda: spd.with_projection_decay(optax.contrib.schedule_free_adamw(0.1)),
  'finite alone': lambda: optax.apply_if_finite(optax.chain(LINK, ADAM), 3),
}


@pytest.mark.parametrize('name', RIGHT)
def test_no_false_alarm(name):
  tx = RIGHT[name]()
  with warnings.catch_warnings():
    warnings.simplefilter('error')
    tx.update(PARAMS, tx.init(PARAMS), PARAMS)
    if name != 'for some params':
      optax.tree.map_params(tx, lambda x: x, tx.init(PARAMS))
