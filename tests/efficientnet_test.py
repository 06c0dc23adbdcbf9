"""The pre-trained EfficientNet of the comparison suite: its layers, weights and scores."""

from pathlib import Path

import jax
import numpy as np
import pytest

from suite import efficientnet, packages

pytestmark = pytest.mark.examples


@pytest.mark.parametrize(('size', 'stride'), [(3, 1), (3, 2), (5, 2)])
def test_shifted_pictures_convolve_as_xla_does(size: int, stride: int) -> None:
  """Catches padding at the wrong end, and taps in another order."""
  x = jax.random.normal(jax.random.key(0), (2, 8, 6, 4))
  module = efficientnet.Depthwise(size, stride)
  params = module.init(jax.random.key(1), x)
  kernel = params['params']['kernel'].reshape(size, size, 1, 4)
  expected = jax.lax.conv_general_dilated(
    x,
    kernel,
    (stride, stride),
    'SAME',
    dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
    feature_group_count=4,
  )
  np.testing.assert_allclose(module.apply(params, x), expected, atol=1e-5)


@pytest.mark.skipif(
  not Path(packages.FOLDER, 'efficientnet_lite0.npz').exists(), reason='the weights are not cached'
)
def test_logits_are_those_of_the_original() -> None:
  """Catches weights that are read or folded wrongly; the logits are PyTorch's."""
  x = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3)).astype(np.uint8)
  module = efficientnet.EfficientNet(1000)
  logits = jax.jit(module.apply)({'params': efficientnet.weights()}, x)
  expected = [
    [-2.073112, 0.132206, -0.703274, 0.498737, 0.895598, -0.625617],
    [-0.038107, -0.789261, -0.210613, 0.389570, 2.157440, 0.245605],
  ]
  np.testing.assert_allclose(logits[:, :6], expected, atol=1e-3)
  assert np.argmax(logits, -1).tolist() == [111, 490]
