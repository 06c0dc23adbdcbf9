"""What lets whole examples run in seconds: they are tested for running, not for their speed."""

import functools
from collections.abc import Iterator
from contextlib import contextmanager

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


# The ViT of the examples with one block: it compiles in half the time.
tiny_vit = functools.partial(finetune_vit.small_vit, blocks=1)
