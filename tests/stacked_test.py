"""Layers that are stacked without `stack_axis`: one warning that says what to pass."""

import itertools
import warnings

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
import pytest
from flax import linen as nn
from flax import nnx

import spd_optax as spd
from spd_optax import trees

DEPTH, WIDTH = 3, 8


def struct(*shape):
  return jax.ShapeDtypeStruct(shape, jnp.float32)


class Block(nn.Module):
  """A layer of a transformer, with one kind of weights of each rank."""

  bias: bool = True

  @nn.compact
  def __call__(self, x, _=None):
    attention = nn.MultiHeadDotProductAttention(num_heads=2, use_bias=self.bias)
    x = x + attention(nn.LayerNorm(use_bias=self.bias)(x))
    return x + nn.Dense(WIDTH, use_bias=self.bias)(nn.tanh(nn.Dense(16)(x))), None


class Model(nn.Module):
  """A stack of blocks, scanned along an axis or a loop."""

  axis: int | None = None
  name_of_scan: str | None = None
  bias: bool = True

  @nn.compact
  def __call__(self, x):
    if self.axis is None:
      for i in range(DEPTH):
        x, _ = Block(self.bias, name=f'{self.name_of_scan or "block"}_{i}')(x)
    else:
      axes, rngs = {'params': self.axis}, {'params': True}
      scan = nn.scan(Block, variable_axes=axes, split_rngs=rngs, length=DEPTH)
      x, _ = scan(self.bias, name=self.name_of_scan)(x, None)
    return nn.Dense(5, name='head')(x)


def linen(*args, **kwargs):
  return jax.eval_shape(Model(*args, **kwargs).init, jax.random.key(0), jnp.ones((1, 4, WIDTH)))


def vmapped():
  """Layers of Equinox, stacked by vmap, in a module."""
  keys = jax.random.split(jax.random.key(0), DEPTH)
  layers = eqx.filter_vmap(lambda key: eqx.nn.Linear(4, 6, key=key))(keys)
  return {'layers': layers, 'head': eqx.nn.Linear(4, 2, key=keys[0])}


def vmapped_nnx():
  class Net(nnx.Module):
    def __init__(self, rngs):
      make = nnx.vmap(lambda rngs: nnx.Linear(4, 6, rngs=rngs), in_axes=(nnx.StateAxes({...: 0}),))
      self.blocks = make(nnx.Rngs(0).fork(split=DEPTH))
      self.head = nnx.Linear(6, 2, rngs=rngs)

  return nnx.state(Net(nnx.Rngs(0)), nnx.Param)


def maxtext():
  """Of a decoder of MaxText: layers on axis 1, and no biases."""
  attention = {x: {'kernel': struct(32, 4, 2, 16)} for x in ('query', 'key', 'value')}
  attention['out'] = {'kernel': struct(2, 4, 16, 32)}
  mlp = {'wi_0': struct(32, 4, 64), 'wi_1': struct(32, 4, 64), 'wo': struct(64, 4, 32)}
  norms = {'pre_norm': {'scale': struct(32, 4)}}
  layers = {'self_attention': attention, 'mlp': mlp, **norms}
  top = {'token_embedder': struct(100, 32), 'decoder_norm': {'scale': struct(32)}}
  return {'params': {**top, 'decoder': {'layers': layers}}}


def lora():
  """Adapters alone, of scanned layers."""
  a, b = struct(12, 32, 4), struct(12, 4, 32)
  return {'decoder': {'layers': {x: {'lora_a': a, 'lora_b': b} for x in 'qv'}}}


def two():
  """Two stacks on one axis, and one on the other."""
  stack = {'kernel': struct(6, 4, 5), 'bias': struct(6, 5)}
  other = {'kernel': struct(4, 7, 5), 'bias': struct(5, 7)}
  return {'enc': {'layers': stack}, 'dec': {'layers': stack}, 'blocks': other}


STACKED = {
  'linen, axis 0': (linen(0), {0: ['params/ScanBlock_0']}),
  'linen, axis 1': (linen(1, 'layers'), {1: ['params/layers']}),
  'linen, blocks': (linen(0, 'blocks', bias=False), {0: ['params/blocks']}),
  'big_vision': (linen(0, 'encoderblock'), {0: ['params/encoderblock']}),
  'MaxText': (maxtext(), {1: ['params/decoder/layers']}),
  'LoRA': (lora(), {0: ['decoder/layers']}),
  'Haiku': (
    {'net/__layer_stack_no_per_layer/linear': {'w': struct(5, 4, 4), 'b': struct(5, 4)}},
    {0: ['net/__layer_stack_no_per_layer']},
  ),
  'Equinox': (vmapped(), {0: ['layers']}),
  'nnx': (vmapped_nnx(), {0: ['blocks']}),
  'in a list of stages': (
    {'stages': [{'blocks': {'k': struct(2, 4, 4), 'b': struct(2, 4)}}]},
    {0: ['stages/0/blocks']},
  ),
  'stacks in a list': (
    {'blocks': [{'layers': {'k': struct(n, 4, 4), 'b': struct(n, 4)}} for n in (2, 3)]},
    {0: ['blocks/0/layers', 'blocks/1/layers']},
  ),
  'several': (two(), {0: ['dec/layers', 'enc/layers'], 1: ['blocks']}),
}


def warned(tx, params):
  """What `init` says."""
  with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter('always')
    jax.eval_shape(tx.init, params)
  return [str(warning.message) for warning in caught]


MAKERS = {
  'adam_spd': lambda **options: spd.adam_spd(1e-3, **options),
  'in a chain': lambda **options: optax.chain(spd.projection_decay(**options), optax.adam(1e-3)),
  'l2_sp': spd.l2_sp,
}


@pytest.mark.parametrize('name', STACKED)
def test_stacked_layers_are_noticed(name):
  """Catches a scanned model that is one layer in silence, and advice that does not work."""
  params, expected = STACKED[name]
  params = eqx.filter(params, lambda x: hasattr(x, 'dtype'))
  (message,) = warned(spd.adam_spd(1e-3), params)
  assert f'Pass stack_axis={expected} ' in message
  tx = spd.adam_spd(1e-3, stack_axis=expected)
  assert not warned(tx, params)
  shapes = {name: x.shape for name, x in jax.eval_shape(tx.init, params)[0].condition.items()}
  for axis, some in expected.items():
    for path, leaf in trees.flatten(params).by_path.items():
      if any(path.startswith(f'{place}/') for place in some):
        assert shapes[path.replace('/', '~')] == (leaf.shape[axis],)


@pytest.mark.parametrize('make', MAKERS.values(), ids=MAKERS)
def test_it_can_be_answered(make):
  """Catches a warning that cannot be turned off, and one about leaves that are not held."""
  params = two()
  assert len(warned(make(), params)) == 1
  assert not warned(make(stack_axis={}), params)
  assert not warned(make(stack_axis=lambda path, leaf: None), params)
  assert not warned(make(free=['layers', 'blocks']), params)


def mlp(*widths, bias=True, key='layers', name='dense_{}'):
  pairs = list(itertools.pairwise(widths))
  leaves = [
    {'kernel': struct(*pair), **({'bias': struct(pair[1])} if bias else {})} for pair in pairs
  ]
  return {key: {name.format(i): layer for i, layer in enumerate(leaves)}}


class Convolutions(nn.Module):
  """Kernels that agree on their first two axes."""

  bias: bool

  @nn.compact
  def __call__(self, x):
    for width in (4, 8, 8):
      x = nn.Conv(width, (3, 3), use_bias=self.bias)(x)
    return x


def convolutions(bias):
  images = jnp.ones((1, 8, 8, 1))
  return jax.eval_shape(Convolutions(bias).init, jax.random.key(0), images)['params']


def attention(**kwargs):
  layer = nn.MultiHeadDotProductAttention(**kwargs)
  return jax.eval_shape(layer.init, jax.random.key(0), jnp.ones((1, 4, WIDTH)))['params']


def equinox_mlp(**kwargs):
  return eqx.filter(eqx.nn.MLP(8, 8, 8, 3, key=jax.random.key(0), **kwargs), eqx.is_array)


def nnx_list():
  class Net(nnx.Module):
    def __init__(self, rngs):
      self.layers = nnx.List([nnx.Linear(8, 8, rngs=rngs) for _ in range(3)])
      self.blocks = nnx.Dict(a=nnx.Conv(8, 8, (3, 3), rngs=rngs), b=nnx.LayerNorm(8, rngs=rngs))

  return nnx.state(Net(nnx.Rngs(0)), nnx.Param)


def block(width):
  scale = {'scale': struct(width)}
  return {'attention': {x: struct(width, width) for x in 'qkvo'}, 'norm': scale}


QKV = {x: {'kernel': struct(8, 2, 4)} for x in ('query', 'key', 'value')}
ORDINARY = {
  'MLP': mlp(8, 8, 8),
  'MLP without biases': mlp(8, 8, 8, 8, bias=False),
  'MLP of names': mlp(8, 8, 8, name='layers_{}', key='blocks'),
  'one vector of a scan': {'scan': {'a': struct(8), 'b': struct(8)}},
  'linen': linen(),
  'linen, layers': linen(None, 'layers', bias=False),
  'linen convolutions': {'layers': convolutions(True)},
  'linen convolutions without biases': {'blocks': convolutions(False)},
  'attention': {'layers': attention(num_heads=2)},
  'attention without biases': {'layers': attention(num_heads=2, use_bias=False)},
  'QKV alone': {'layers': QKV},
  'equinox': equinox_mlp(),
  'equinox without biases': equinox_mlp(use_bias=False, use_final_bias=False),
  'nnx': nnx_list(),
  'T5': {'encoder': {'block': [{'layer': [block(8), mlp(8, 8, 8)]} for _ in range(2)]}},
  'ViT': {f'block_{i}': block(8) for i in range(3)},
  'a list of layers': {'layers': [block(8), block(8)]},
  'experts': {'block_0': {'experts': {'wi': struct(4, 8, 16), 'wo': struct(4, 16, 8)}}},
  'one layer': {'layers': {'kernel': struct(1, 4, 4), 'bias': struct(1, 4)}},
  'one leaf': {'layers': {'kernel': struct(3, 4, 4)}, 'head': struct(4, 2)},
  'an array': struct(100_000),
}


@pytest.mark.parametrize('name', ORDINARY)
def test_ordinary_models_are_left_alone(name):
  """Catches a false alarm."""
  params = ORDINARY[name]
  assert not warned(spd.adam_spd(1e-3), params)
  assert not warned(spd.adam_spd(1e-3), {'params': params, 'head': struct(4, 2)})


@pytest.mark.examples
def test_models_of_the_examples_are_left_alone():
  """Catches a false alarm on real models."""
  import finetune_t5
  import finetune_vit
  import t5
  from suite import efficientnet, minilm

  image, tokens = jnp.ones((1, 32, 32, 3)), jnp.ones((1, 5), int)
  models = {
    'BERT': jax.eval_shape(minilm.MiniLM(3, 9).init, jax.random.key(0), tokens),
    'ViT': finetune_vit.small_vit().params,
    'T5': finetune_t5.small_t5(t5.Bytes()).params,
    'EfficientNet': jax.eval_shape(efficientnet.EfficientNet(5).init, jax.random.key(0), image),
  }
  for name, params in models.items():
    assert not warned(spd.adam_spd(1e-3), params), name


def test_flatten_above_is_noticed():
  """Catches a whole model that is one layer in silence; an array alone is not warned of."""
  params = {'a': struct(3, 4), 'b': struct(4)}
  for tx in (optax.flatten(spd.adam_spd(1e-3)), optax.chain(optax.flatten(spd.l2_sp()))):
    (message,) = warned(tx, params)
    assert 'optax.flatten makes one leaf' in message
  chain = optax.chain(spd.projection_decay(), optax.flatten(optax.adam(1e-3)))
  assert not warned(chain, params)
  assert not warned(spd.adam_spd(1e-3), struct(12))
