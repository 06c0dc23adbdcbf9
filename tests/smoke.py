"""What lets whole examples run in seconds: they are tested for running, not for their speed."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax

import finetune_vit


@contextmanager
def quick_compiles() -> Iterator[None]:
  """Programs are compiled in less time, and run slower; later ones again as users run them."""
  jax.config.update('jax_disable_most_optimizations', True)
  try:
    yield
  finally:
    jax.config.update('jax_disable_most_optimizations', False)
    jax.clear_caches()


def tiny_vit(seed: int = 0, small: Any = finetune_vit.small_vit) -> Any:
  """The ViT of the examples with one block: it compiles in half the time."""
  model = small()
  model.config.num_hidden_layers = 1
  return type(model)(model.config, seed=seed)
