"""Settings for every test: reproducible hypothesis runs, eight CPU devices, shared compiles."""

import os
import tempfile

# Before the first use of a backend: the sharding tests need several devices.
flags = os.environ.get('XLA_FLAGS', '')
if 'device_count' not in flags:
  os.environ['XLA_FLAGS'] = f'{flags} --xla_force_host_platform_device_count=8'
os.environ.setdefault('JAX_PLATFORMS', 'cpu')

# What one worker has compiled, the others and their subprocesses read: they inherit the variable.
if 'JAX_COMPILATION_CACHE_DIR' not in os.environ:
  compiled = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
  os.environ['JAX_COMPILATION_CACHE_DIR'] = compiled.name
os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0')
os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES', '-1')

import hypothesis  # noqa: E402  # jax reads the environment at import

hypothesis.settings.register_profile('default', deadline=None, derandomize=True, max_examples=50)
hypothesis.settings.register_profile('nightly', deadline=None, max_examples=1000)
hypothesis.settings.load_profile(os.environ.get('HYPOTHESIS_PROFILE', 'default'))
