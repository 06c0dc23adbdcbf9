"""What an optimized XLA program does with device memory, read off its text.

A chip's own memory is marked S(1), S(2), … in a shape's layout, and a host's S(5): what
lies there costs no device-memory traffic. `cost_analysis()` counts it all the same, and
on TPU `memory_analysis()` counts it as temporaries, so neither is of use here.
"""

import math
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

BITS = {'pred': 8, 'bf16': 16, 's4': 4, 'u4': 4}
SHAPE = re.compile(r'\b(pred|bf16|[sufc]\d+)\[([\d,]*)\](\{[^}]*\})?')
MOVES_NOTHING = {
  *('parameter', 'constant', 'tuple', 'get-tuple-element', 'bitcast', 'opt-barrier'),
  *('after-all', 'partition-id', 'replica-id', 'iota'),
}
COLLECTIVES = ('all-reduce', 'all-gather', 'reduce-scatter', 'all-to-all', 'collective-permute')


class Instruction(NamedTuple):
  """One line of a computation: `name = type opcode(operands), attributes`."""

  name: str
  type: str
  opcode: str
  operands: tuple[str, ...]
  attributes: str
  is_root: bool


class Program(NamedTuple):
  """The computations by name; the entry's instructions are in the order of execution."""

  computations: dict[str, list[Instruction]]
  entry: str


def parse(text: str) -> Program:
  """A program from `compiled.as_text()`."""
  computations: dict[str, list[Instruction]] = {}
  entry = current = ''
  for line in text.splitlines():
    if header := re.match(r'(ENTRY )?%?([\w.\-]+) \(.*\{$', line):
      current = header[2]
      computations[current] = []
      entry = current if header[1] else entry
    elif found := re.match(r'\s+(ROOT )?%?([\w.\-]+) = (.*)', line):
      kind, rest = _closed(found[3])
      opcode, _, rest = rest.strip().partition('(')
      operands, attributes = _closed('(' + rest)
      names = tuple(re.findall(r'%([\w.\-]+)', operands))
      instruction = Instruction(found[2], kind, opcode, names, attributes, bool(found[1]))
      computations[current].append(instruction)
  return Program(computations, entry)


def _closed(text: str) -> tuple[str, str]:
  """The first word, or all up to the bracket that closes the first one; and the rest."""
  if not text.startswith('('):
    first, _, rest = text.partition(' ')
    return first, rest
  depth = 0
  for i, character in enumerate(text):
    depth += (character == '(') - (character == ')')
    if depth == 0:
      return text[: i + 1], text[i + 1 :]
  raise ValueError(f'no closing bracket in {text!r:.200}')


def shape_bytes(kind: str, on_chip: bool = False) -> int:
  """Bytes in device memory of an array or a tuple; with `on_chip` wherever they lie."""
  total = 0
  for dtype, dims, layout in SHAPE.findall(kind):
    if on_chip or not re.search(r'S\([1-9]', layout):
      bits = BITS.get(dtype) or int(re.sub(r'\D.*', '', dtype[1:]))
      total += math.prod(int(n) for n in dims.split(',') if n) * bits // 8
  return total


def traffic(program: Program) -> int:
  """Bytes that one execution reads from and writes to device memory.

  Each array once an instruction; of conditionals the branch that later steps take (an
  anchor is captured in the other).
  """
  return sum(_moved(one, types) for one, types in _executed(program, program.entry))


def _executed(program: Program, computation: str) -> Iterator[tuple[Instruction, dict[str, str]]]:
  """What may move something, with the types of all before it."""
  types: dict[str, str] = {}
  for one in program.computations[computation]:
    types[one.name] = one.type
    if one.opcode == 'conditional':
      yield from _executed(program, _later_branch(one))
    elif one.opcode not in MOVES_NOTHING and not one.opcode.endswith('-done'):
      yield one, types


def _later_branch(one: Instruction) -> str:
  found = re.search(r'(?:false_computation=|branch_computations=\{)%?([\w.\-]+)', one.attributes)
  assert found, one
  return found[1]


def _moved(one: Instruction, types: dict[str, str]) -> int:
  """Bytes read and written by an instruction."""
  read = sum(shape_bytes(types.get(name, '')) for name in set(one.operands))
  if one.opcode == 'copy-start':  # (destination, source, context)
    return read + shape_bytes(_arrays(one.type)[0])
  if one.opcode in ('slice-start', 'slice'):  # reads as much as it makes
    made = _arrays(one.type)[one.opcode == 'slice-start']
    return (shape_bytes(made, on_chip=True) if read else 0) + shape_bytes(made)
  return read + shape_bytes(one.type)


def _arrays(kind: str) -> list[str]:
  return [match[0] for match in SHAPE.finditer(kind)]


def traffic_by_leaf(program: Program) -> dict[int, int]:
  """The traffic of one execution, by the bytes of the largest array that an instruction touches.

  What a step computes for a leaf touches arrays as large as it, and scalars.
  """
  found: dict[int, int] = {}
  for one, types in _executed(program, program.entry):
    touched = [one.type, *(types.get(name, '') for name in one.operands)]
    largest = max(shape_bytes(array, on_chip=True) for kind in touched for array in _arrays(kind))
    found[largest] = found.get(largest, 0) + _moved(one, types)
  return found


def computed(program: Program) -> tuple[int, int]:
  """How many instructions of one execution compute with arrays, and how many with scalars alone."""
  counts = [0, 0]
  for one, types in _executed(program, program.entry):
    if not one.opcode.startswith(('copy', 'slice', 'custom-call')):
      kinds = [one.type, *(types.get(name, '') for name in one.operands)]
      scalars = all(dims in ('', '1') for kind in kinds for _, dims, _ in SHAPE.findall(kind))
      counts[scalars] += 1
  return counts[False], counts[True]


def temporaries(program: Program) -> int:
  """Peak of what lies in device memory besides arguments and outputs, in bytes."""
  entry = program.computations[program.entry]
  by_name = {one.name: one for one in entry}
  root = next(one for one in entry if one.is_root)
  outputs = {_source(name, by_name) for name in (*root.operands, root.name)}
  last_use = {
    _source(name, by_name): i for i, one in enumerate(entry) for name in (one.name, *one.operands)
  }
  freed: dict[int, int] = {}
  alive = peak = 0
  for i, one in enumerate(entry):
    for buffer, size in _made(one):
      if buffer not in outputs:
        alive += size
        end = last_use.get(buffer, i)
        freed[end] = freed.get(end, 0) + size
    peak = max(peak, alive)
    alive -= freed.pop(i, 0)
  return peak


Buffer = tuple[str, str]  # the instruction that makes it, and its place in the tuple it makes


def _made(one: Instruction) -> list[tuple[Buffer, int]]:
  """The buffers that an instruction fills, and their bytes in device memory."""
  if one.opcode in MOVES_NOTHING | {'slice-start', 'conditional'} or one.opcode.endswith('-done'):
    return []
  arrays = _arrays(one.type)
  if not one.type.startswith('(') or one.opcode == 'copy-start':
    return [((one.name, ''), shape_bytes(arrays[0]))]
  return [((one.name, str(i)), shape_bytes(array)) for i, array in enumerate(arrays)]


def _source(name: str, by_name: Mapping[str, Instruction]) -> Buffer:
  """The buffer that an instruction names."""
  one, index = by_name[name], ''
  while one.opcode in ('bitcast', 'opt-barrier', 'get-tuple-element') or one.opcode.endswith(
    '-done'
  ):
    if found := re.search(r'index=(\d+)', one.attributes):
      index = found[1]
    one = by_name[one.operands[0]]
  return one.name, index


def collectives(program: Program) -> list[tuple[str, int, int]]:
  """(operation, number of arrays, bytes) of each communication between devices."""
  return [
    (opcode, len(_arrays(one.type)), shape_bytes(one.type, on_chip=True))
    for one in _all(program)
    if (opcode := one.opcode.removesuffix('-start')) in COLLECTIVES
  ]


def _all(program: Program) -> Iterator[Instruction]:
  for computation in program.computations.values():
    yield from computation
