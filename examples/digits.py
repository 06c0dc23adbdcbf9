"""Real handwritten digits in several styles: what a model knows, and what is new to it.

The images are scikit-learn's bundled `load_digits` (1,797 digits by 43 people,
8×8 pixels), enlarged to 16×16. A style is a function of images and a random
generator. The foundation model learns the OLD styles; a NEW one is fine-tuned on.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from scipy import ndimage
from sklearn.datasets import load_digits

SIZE = 16
CLASSES = 10
Style = Callable[[np.ndarray, np.random.Generator], np.ndarray]


class Split(NamedTuple):
  """Images float32[n, 16, 16] in [0, 1] and labels int32[n]."""

  images: np.ndarray
  labels: np.ndarray


def load(seed: int = 0) -> tuple[Split, Split, Split]:
  """Disjoint digits: 1,000 to pre-train on, 300 to fine-tune on, 497 to test on."""
  digits = load_digits()
  images = ndimage.zoom(digits.images / 16, (1, 2, 2), order=1).astype(np.float32)
  order = np.random.default_rng(seed).permutation(len(images))
  parts = np.split(order, [1000, 1300])
  pretrain, finetune, test = (Split(images[p], digits.target[p].astype(np.int32)) for p in parts)
  return pretrain, finetune, test


def _affine(images: np.ndarray, matrix: np.ndarray) -> np.ndarray:
  center = np.full(2, (SIZE - 1) / 2)
  offset = center - matrix @ center
  return np.stack([ndimage.affine_transform(image, matrix, offset, order=1) for image in images])


def _rotation(degrees: float) -> np.ndarray:
  angle = np.deg2rad(degrees)
  return np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])


def _waves(dx: float, dy: float) -> np.ndarray:
  y, x = np.mgrid[:SIZE, :SIZE]
  return 0.5 + 0.5 * np.sin(dx * x + dy * y)


def _occlude(images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
  images = images.copy()
  for image, (y, x) in zip(images, rng.integers(0, SIZE - 5, (len(images), 2)), strict=True):
    image[y : y + 5, x : x + 5] = 0.5
  return images


OLD: dict[str, Style] = {
  'plain': lambda x, rng: x,
  'rotated': lambda x, rng: _affine(x, _rotation(30)),
  'sheared': lambda x, rng: _affine(x, np.array([[1, 0], [0.5, 1]])),
  'small': lambda x, rng: _affine(x, np.eye(2) * 1.5),
  'blurred': lambda x, rng: ndimage.gaussian_filter(x, (0, 1.2, 1.2)),
  'noisy': lambda x, rng: x + 0.3 * rng.standard_normal(x.shape),
  'textured': lambda x, rng: 0.6 * x + 0.4 * _waves(1.1, 0.7),
  'occluded': _occlude,
}

NEW: dict[str, Style] = {
  'striped': lambda x, rng: np.where(_waves(np.pi / 2, 0) > 0.5, 1 - x, x),
  'inverted': lambda x, rng: 1 - x,
  'counter-rotated': lambda x, rng: _affine(x, _rotation(-40)),
  'thick': lambda x, rng: ndimage.grey_dilation(x, (1, 4, 4)),
}

STYLES = OLD | NEW


def in_style(split: Split, style: str, seed: int = 0) -> Split:
  """The same digits in another style, clipped to [0, 1]."""
  rng = np.random.default_rng([seed, sorted(STYLES).index(style)])
  images = STYLES[style](split.images, rng)
  return Split(np.clip(images, 0, 1).astype(np.float32), split.labels)
