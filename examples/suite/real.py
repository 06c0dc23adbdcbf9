"""What is compared on real pre-trained models: one training run for each setting and rate.

The head of a loaded model is a linear probe of the training examples at first, so that Adam is
LP-FT there. WiSE-FT goes on from every method, since it costs nothing.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import optax

import spd_optax as spd
from suite import methods, peers, tried
from suite.methods import KL, WISE_FT, Method, Scalar, Setting, dial, sweep

# Test sets of the new task that have other data than the training examples. All other sets ask for
# what a model could before.
OTHER_DATA = {
  'handwriting': ('serif', 'monospaced', 'poster'),
  'minilm_tense': ('fiction', 'science'),
  'minilm_voice': ('press', 'fiction'),
}
ALPHAS = sweep(alpha=(0.8, 0.6, 0.4))


def towards_base(learning_rate: Scalar, blocks: Any = None) -> optax.GradientTransformation:
  """Adam, on a loss with the divergence from the base model's answers."""
  return optax.adam(learning_rate)


def relieved(learning_rate: Scalar, blocks: Any = None) -> optax.GradientTransformation:
  """`adam_spd` that holds a layer less firmly the more often it has been held."""
  return spd.adam_spd(learning_rate, rule=tried.Relieved())


def on_old(task: str, sets: Mapping[str, Any]) -> list[float]:
  """The score of each seed on what the model could before: the mean over these test sets.

  Args:
    task: its name.
    sets: by name of a test set out of distribution, the score of each seed.
  """
  old = [
    np.asarray(values) for name, values in sets.items() if name not in OTHER_DATA.get(task, ())
  ]
  return np.mean(old, 0).tolist()


def method(make: Callable[..., Any], settings: tuple[Setting, ...] = ({},)) -> Method:
  """A method that WiSE-FT goes on from."""
  return Method(make, settings, ends=(WISE_FT,), alphas=ALPHAS)


METHODS: dict[str, Method] = {
  'Adam': method(methods.adam),
  'L2-SP': method(methods.l2_sp, sweep(strength=(0.01, 0.001, 0.1))),
  'L2-SP, decoupled': method(methods.decoupled_l2_sp, sweep(strength=(1.0, 10.0))),
  'Cautious decay to the start': method(peers.cautious_to_start, sweep(decay=(1.0, 10.0))),
  'FTP': method(peers.ftp, sweep(k=(1.0,))),
  'DiGraP': method(peers.digrap, sweep(rate=(0.01, 0.05))),
  'KL to the base': method(towards_base, sweep(**{KL: (0.1, 1.0)})),
  'adam_spd': method(methods.around(methods.adam), dial((1, 0))),
  'adam_spd, near': method(methods.waiting, sweep(near=(20.0,))),
  'adam_spd, relieved': method(relieved),
  'projection_decay': method(methods.chained, dial((1, 0), (1, 0.05))),
  'SignificantProjection': method(methods.significant, sweep(z=(0.0,))),
}
