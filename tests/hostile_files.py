"""Checkpoints made to harm whoever reads them; `damaged_files_test` loads each in a process.

    python tests/hostile_files.py DIRECTORY

writes them, loads each with little memory to spare, and prints what came of it as JSON.
"""

import io
import json
import os
import pickle
import resource
import struct
import sys
import warnings
import zipfile
from pathlib import Path
from typing import Any

import msgpack
import numpy as np

LIKE = {'w': np.zeros((2, 3), np.float32)}
DATA = np.ones((2, 3), np.float32).tobytes()
MARKER = 'unpickled'  # the file that code in a checkpoint would write
CLAIM = struct.pack('>BI', 0xDD, 1_000_000)  # msgpack: a list of a million entries follows
SPARE = 1 << 30  # bytes of address space; libraries take some for threads


class Evil:
  def __reduce__(self) -> Any:
    return Path(MARKER).touch, ()


def npy(shape: Any, data: bytes = DATA, descr: Any = '<f4') -> bytes:
  text = repr({'descr': descr, 'fortran_order': False, 'shape': shape}).encode() + b'\n'
  return b'\x93NUMPY\x01\x00' + struct.pack('<H', len(text)) + text + data


def npz(*members: tuple[str, bytes]) -> bytes:
  file = io.BytesIO()
  with warnings.catch_warnings(action='ignore'), zipfile.ZipFile(file, 'w') as archive:
    for name, content in members:
      archive.writestr(zipfile.ZipInfo(name), content, zipfile.ZIP_DEFLATED)
  return file.getvalue()


def pickled() -> bytes:
  file = io.BytesIO()
  np.savez(file, w=np.array([Evil()], object))
  return file.getvalue()


def safetensors(header: bytes, claim: int | None = None, data: bytes = DATA) -> bytes:
  return struct.pack('<Q', len(header) if claim is None else claim) + header + data


def tensor(shape: str, end: int, name: str = 'w') -> bytes:
  text = f'{{"{name}":{{"dtype":"F32","shape":{shape},"data_offsets":[0,{end}]}}}}'
  return text.encode()


def packed(shape: Any, dtype: Any = 'float32', data: bytes = DATA) -> bytes:
  return msgpack.packb({'w': msgpack.ExtType(1, msgpack.packb((shape, dtype, data)))})


def chunked(shape: dict[str, int]) -> bytes:
  return msgpack.packb({'w': {'__msgpack_chunked_array__': True, 'shape': shape, 'chunks': {}}})


BOMB = bytes(1 << 25)
NPY2 = b'\x93NUMPY\x02\x00'
NUL = b',"a\\u0000/../b":{"dtype":"F32","shape":[0],"data_offsets":[24,24]}}'
GOOD = ('w.npy', npy((2, 3)))
LOADED = {
  'good.npz': npz(GOOD),
  'good.msgpack': packed((2, 3)),
  'good.safetensors': safetensors(tensor('[2,3]', 24)),
  'bomb-beside.npz': npz(GOOD, ('x.npy', npy((1 << 23,), BOMB))),
  'bomb-behind.npz': npz(('w.npy', npy((2, 3), DATA + BOMB))),
  'outside.npz': npz(GOOD, ('../../outside.npy', npy((2, 3))), ('/etc/outside.npy', npy((2, 3)))),
  'twice.npz': npz(GOOD, GOOD),
  'zero-byte.safetensors': safetensors(tensor('[2,3]', 24)[:-1] + NUL),
}
REFUSED = {
  'pickle.npz': pickled(),
  'pickle.msgpack': pickle.dumps({'w': Evil()}),
  'pickle': pickle.dumps(Evil()),
  'claims-much.npz': npz(('w.npy', npy((1 << 40, 3)))),
  'claims-more-than-bits.npz': npz(('w.npy', npy((1 << 62, 1 << 62)))),
  'claims-what-the-params-have.npz': npz(('w.npy', npy((2, 3), b''))),
  'negative.npz': npz(('w.npy', npy((-2, 3)))),
  'header-bomb.npz': npz(('w.npy', NPY2 + struct.pack('<I', len(BOMB)) + BOMB)),
  'header-nested.npz': npz(('w.npy', b'\x93NUMPY\x01\x00' + struct.pack('<H', 9000) + b'(' * 9000)),
  'subarray.npz': npz(('w.npy', npy((2, 3), descr=('<f4', (1 << 28,))))),
  'no-array.npz': npz(GOOD, ('run.py', b'raise SystemExit')),
  'header-2-63.safetensors': safetensors(tensor('[2,3]', 24), 1 << 63),
  'header-2-64.safetensors': safetensors(tensor('[2,3]', 24), (1 << 64) - 1),
  'header-beyond.safetensors': safetensors(tensor('[2,3]', 24), 1 << 20),
  'claims-much.safetensors': safetensors(tensor('[1099511627776,3]', 3 << 42)),
  'overflow.safetensors': safetensors(tensor('[18446744073709551615,3]', 24)),
  'nested.safetensors': safetensors(b'{"w":' + b'[' * 200_000),
  'long-name.safetensors': safetensors(tensor('[2,3]', 24, 'a/' * 200_000 + 'b')),
  'lists.msgpack': CLAIM * 500 + bytes(1 << 20),
  'lists-in-array.msgpack': msgpack.packb({'w': msgpack.ExtType(1, CLAIM * 500 + bytes(1 << 20))}),
  'long-bytes.msgpack': b'\x81\xa1w\xc6\xff\xff\xff\xff',
  'long-extension.msgpack': b'\x81\xa1w\xc9\xff\xff\xff\xff\x01',
  'claims-much.msgpack': packed((1 << 40, 3)),
  'overflow.msgpack': packed((1 << 62, 0), data=b''),
  'objects.msgpack': packed((2, 3), 'object', bytes(48)),
  'chunks.msgpack': chunked({'0': 1 << 40, '1': 3}),
  'deep.msgpack': b'\x81\xa1a' * 100_000 + b'\xc0',
}


def main(folder: str) -> None:
  import jax

  import spd_optax as spd

  os.chdir(folder)
  outcomes = {}
  for name, content in (LOADED | REFUSED).items():
    Path(name).write_bytes(content)
  del content
  for name in ['good.npz', 'good.msgpack', 'good.safetensors', *LOADED, *REFUSED]:
    if name == next(iter(LOADED)) and 'good.safetensors' in outcomes:  # all is imported by now
      before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
      used = int(Path('/proc/self/statm').read_text().split()[0]) * resource.getpagesize()
      resource.setrlimit(resource.RLIMIT_AS, (used + SPARE, used + SPARE))
    try:
      spd.load_anchor(name, jax.tree.map(jax.numpy.asarray, LIKE))
      outcomes[name] = 'loaded'
    except Exception as error:
      outcomes[name] = f'{type(error).__name__}: {error}'
  grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
  print(json.dumps({'outcomes': outcomes, 'kilobytes': grown}))


if __name__ == '__main__':
  main(sys.argv[1])
