"""T5 as a Flax nnx module, its parts named as those of PyTorch's T5 in transformers.

T5 1.0 (relu, one embedding for input and output), 1.1 and ByT5 (gated gelu, a head of its own).
There is no dropout. `load` and `checkpoints.write` read and write directories of safetensors.
"""

import functools
import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tokenizers import Tokenizer

import checkpoints

Config = Mapping[str, Any]
FEED_FORWARD = {
  'relu': jax.nn.relu,
  'gated-gelu': functools.partial(jax.nn.gelu, approximate=True),
}


def linear(inputs: int, outputs: int, spread: float, rngs: nnx.Rngs) -> nnx.Linear:
  """A matrix without a bias."""
  init = nnx.initializers.normal(spread)
  return nnx.Linear(inputs, outputs, use_bias=False, kernel_init=init, rngs=rngs)


def norm(config: Config, rngs: nnx.Rngs) -> nnx.RMSNorm:
  """T5's norm, which subtracts no mean."""
  epsilon = config.get('layer_norm_epsilon', 1e-6)
  return nnx.RMSNorm(config['d_model'], epsilon=epsilon, rngs=rngs)


class Attention(nnx.Module):
  """Attention whose logits are not scaled, but have a bias."""

  def __init__(self, config: Config, rngs: nnx.Rngs, positions: bool = False):
    width, inner = config['d_model'], config['num_heads'] * config['d_kv']
    self.heads = config['num_heads']
    self.q = linear(width, inner, (width * config['d_kv']) ** -0.5, rngs)
    self.k = linear(width, inner, width**-0.5, rngs)
    self.v = linear(width, inner, width**-0.5, rngs)
    self.o = linear(inner, width, inner**-0.5, rngs)
    if positions:
      self.relative_attention_bias = nnx.Embed(
        config.get('relative_attention_num_buckets', 32),
        self.heads,
        embedding_init=nnx.initializers.normal(width**-0.5),
        rngs=rngs,
      )

  def __call__(self, x: jax.Array, bias: jax.Array, source: jax.Array | None = None) -> jax.Array:
    source = x if source is None else source
    q, k, v = (
      part(y).reshape(*y.shape[:2], self.heads, -1)
      for part, y in ((self.q, x), (self.k, source), (self.v, source))
    )
    mixed = jax.nn.dot_product_attention(q, k, v, bias=bias, scale=1.0)
    return self.o(mixed.reshape(*x.shape[:2], -1))


class FeedForward(nnx.Module):
  """Two layers; a gated one has another matrix beside the first."""

  def __init__(self, config: Config, rngs: nnx.Rngs):
    kind, width, hidden = config.get('feed_forward_proj', 'relu'), config['d_model'], config['d_ff']
    if kind not in FEED_FORWARD:
      raise ValueError(f'feed_forward_proj: {kind} is none of {", ".join(FEED_FORWARD)}')
    self.kind = kind
    for name in ('wi_0', 'wi_1') if kind.startswith('gated') else ('wi',):
      setattr(self, name, linear(width, hidden, width**-0.5, rngs))
    self.wo = linear(hidden, width, hidden**-0.5, rngs)

  def __call__(self, x: jax.Array) -> jax.Array:
    act = FEED_FORWARD[self.kind]
    gated = self.kind.startswith('gated')
    return self.wo(act(self.wi_0(x)) * self.wi_1(x) if gated else act(self.wi(x)))


class Residual(nnx.Module):
  """x + part(norm(x)); the part has a name."""

  def __init__(self, name: str, part: nnx.Module, config: Config, rngs: nnx.Rngs):
    self.name = name
    setattr(self, name, part)
    self.layer_norm = norm(config, rngs)

  def __call__(self, x: jax.Array, *more: jax.Array) -> jax.Array:
    return x + getattr(self, self.name)(self.layer_norm(x), *more)


class Stack(nnx.Module):
  """An encoder or a decoder."""

  def __init__(self, config: Config, decodes: bool, rngs: nnx.Rngs):
    depth = config['num_layers']
    if decodes:
      depth = config.get('num_decoder_layers') or depth
    self.decodes, self.distance = decodes, config.get('relative_attention_max_distance', 128)
    blocks = {}
    for i in range(depth):
      parts = {'SelfAttention': Attention(config, rngs, positions=i == 0)}
      if decodes:
        parts['EncDecAttention'] = Attention(config, rngs)
      parts['DenseReluDense'] = FeedForward(config, rngs)
      layers = [Residual(name, part, config, rngs) for name, part in parts.items()]
      blocks[str(i)] = nnx.Dict(layer=nnx.Dict({str(j): each for j, each in enumerate(layers)}))
    self.block = nnx.Dict(blocks)
    self.final_layer_norm = norm(config, rngs)

  def __call__(self, x: jax.Array, bias: jax.Array, *encoded: jax.Array) -> jax.Array:
    """Reads x; `bias` hides tokens of it; `encoded` is the bias and the states to look at."""
    table = self.block['0'].layer['0'].SelfAttention.relative_attention_bias
    at = buckets(x.shape[1], table.num_embeddings, self.distance, not self.decodes)
    bias = bias + table(at).transpose(2, 0, 1)
    for block in self.block.values():
      first, *cross, last = block.layer.values()
      x = first(x, bias)
      for layer in cross:
        x = layer(x, *encoded)
      x = last(x)
    return self.final_layer_norm(x)


class T5(nnx.Module):
  """Tokens int[n, t], which of them are seen, and the decoder's tokens -> logits."""

  def __init__(self, config: Config, rngs: nnx.Rngs, head: bool = False):
    width, rows = config['d_model'], config['vocab_size']
    tied = config.get('tie_word_embeddings', True)
    self.scale = width**-0.5 if config.get('scale_decoder_outputs', tied) else 1.0
    init = nnx.initializers.normal(1.0)
    self.shared = nnx.Embed(rows, width, embedding_init=init, rngs=rngs)
    self.encoder = Stack(config, False, rngs)
    self.decoder = Stack(config, True, rngs)
    if head:
      self.lm_head = linear(width, rows, 1.0, rngs)

  def __call__(self, inputs: jax.Array, seen: jax.Array, decoder_inputs: jax.Array) -> jax.Array:
    return self.decode(self.encode(inputs, seen), seen, decoder_inputs)

  def encode(self, inputs: jax.Array, seen: jax.Array) -> jax.Array:
    """What the decoder looks at: float32[n, t, width]."""
    return self.encoder(self.shared(inputs), hidden(seen)[:, None, None])

  def decode(self, encoded: jax.Array, seen: jax.Array, tokens: jax.Array) -> jax.Array:
    """Logits of what comes after each of the decoder's tokens."""
    causal = hidden(jnp.tri(tokens.shape[1]))
    bias = hidden(seen)[:, None, None]
    x = self.scale * self.decoder(self.shared(tokens), causal[None, None], bias, encoded)
    return self.lm_head(x) if hasattr(self, 'lm_head') else self.shared.attend(x)


def hidden(seen: jax.Array) -> jax.Array:
  """What is added to attention's logits: much less than they are where nothing is seen."""
  return jnp.where(seen > 0, 0.0, -1e9)


def buckets(length: int, count: int, most: int, both_ways: bool) -> np.ndarray:
  """T5's classes of distances, from query to key: int[length, length].

  Small distances have a class each, larger ones share them, log-evenly up to `most`.
  """
  key, query = np.meshgrid(np.arange(length), np.arange(length))
  ahead = key - query
  count = count // 2 if both_ways else count
  far = np.abs(ahead)  # a decoder sees nothing ahead
  exact = count // 2
  ratio = np.log(np.maximum(far, 1).astype(np.float32) / exact) / math.log(most / exact)
  shared = np.minimum(exact + (ratio * (count - exact)).astype(int), count - 1)
  return np.where(far < exact, far, shared) + (count * (ahead > 0) if both_ways else 0)


class Encoding(NamedTuple):
  """As `tokenizers.Encoding`."""

  ids: list[int]


class Bytes:
  """ByT5's tokens, a byte + 3 and 125 sentinels; the methods are those of `Tokenizer`."""

  def __init__(self) -> None:
    special, sentinels = ['<pad>', '</s>', '<unk>'], [f'<extra_id_{i}>' for i in range(125)]
    self.tokens = [x.encode() for x in special] + [bytes([i]) for i in range(256)]
    self.tokens += [x.encode() for x in sentinels]
    self.ids = {x: self.tokens.index(x.encode()) for x in special + sentinels}

  def get_vocab_size(self) -> int:
    return len(self.tokens)

  def token_to_id(self, token: str) -> int:
    """The id of a special token or sentinel."""
    return self.ids[token]

  def encode(self, text: str, add_special_tokens: bool = True) -> Encoding:
    found: list[int] = []
    for part in re.split(r'(<extra_id_\d+>)', text):
      found += [self.ids[part]] if part in self.ids else [byte + 3 for byte in part.encode()]
    return Encoding([*found, self.ids['</s>']] if add_special_tokens else found)

  def decode(self, ids: Any, skip_special_tokens: bool = True) -> str:
    kept = [i for i in ids if not skip_special_tokens or 3 <= i < 259]
    return b''.join(self.tokens[i] for i in kept).decode(errors='ignore')


def with_weights(config: Config, tensors: Mapping[str, jax.Array]) -> checkpoints.Model:
  """The model of a file's tensors."""
  head = 'lm_head.weight' in tensors
  abstract = nnx.eval_shape(lambda: T5(config, nnx.Rngs(0), head))
  return checkpoints.filled(checkpoints.split(abstract, config), tensors)


def load(checkpoint: str) -> tuple[checkpoints.Model, Any]:
  """A model, and its tokenizer: tokenizer.json, or bytes if there is no such file."""
  config, tensors, folder = checkpoints.read(checkpoint)
  model = with_weights(config, tensors)
  if (folder / 'tokenizer.json').exists():
    tokenizer = Tokenizer.from_file(str(folder / 'tokenizer.json'))
    tokenizer.no_padding()
    tokenizer.no_truncation()
  elif (folder / 'spiece.model').exists():
    raise ValueError(f'{checkpoint}: its tokenizer is not saved as tokenizer.json.')
  else:
    tokenizer = Bytes()
  if (size := tokenizer.get_vocab_size()) > config['vocab_size']:
    raise ValueError(
      f'{checkpoint}: its embedding has {config["vocab_size"]} rows, but its tokenizer '
      f'({type(tokenizer).__name__}) has {size} tokens. Pass a checkpoint with a row '
      'for every token, next to the tokenizer.json that it was trained with.'
    )
  return model, tokenizer
