"""Lets tests on a CPU use an anchor in the host's memory, as an accelerator would.

A CPU has the same kinds of memory as an accelerator, but the library does not use them there.
This is the one place where tests change what the library sees of its devices.
"""

from spd_optax import placement


def like_an_accelerator(monkeypatch):
  """The library believes that every device has memory of its own beside its host's."""
  monkeypatch.setattr(placement, 'memory_kinds', lambda device: {'device', 'pinned_host'})
