"""What an optimized XLA program does with device memory, read off its text.

A chip's own memory is marked S(1), S(2), … in a shape's layout, and a host's S(5): what
lies there costs no device-memory traffic. `cost_analysis()` counts it all the same, and
on TPU `memory_analysis()` counts it as temporaries, so neither is of use here.
"""

import math
import re
from collections.abc import Iterator
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
  return _traffic(program, program.entry)


def _traffic(program: Program, computation: str) -> int:
  types: dict[str, str] = {}
  total = 0
  for one in program.computations[computation]:
    types[one.name] = one.type
    if one.opcode == 'conditional':
      total += _traffic(program, _later_branch(one))
    elif one.opcode not in MOVES_NOTHING and not one.opcode.endswith('-done'):
      total += _moved(one, types)
  return total


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


def temporaries(program: Program) -> int:
  """Peak of what lies in device memory besides arguments and outputs, in bytes."""
  entry = program.computations[program.entry]
  by_name = {one.name: one for one in entry}
  source = {one.name: _source(one, by_name) for one in entry}
  root = next(one for one in entry if one.is_root)
  outputs = {source[name] for name in (*root.operands, root.name)}
  last_use = {source[name]: i for i, one in enumerate(entry) for name in (one.name, *one.operands)}
  freed: dict[int, int] = {}
  alive = peak = 0
  for i, one in enumerate(entry):
    if source[one.name] == one.name and one.name not in outputs:
      made = one.type if one.opcode != 'copy-start' else _arrays(one.type)[0]
      size = (
        0 if one.opcode in MOVES_NOTHING | {'slice-start', 'conditional'} else shape_bytes(made)
      )
      alive += size
      freed[last_use[one.name]] = freed.get(last_use[one.name], 0) + size
    peak = max(peak, alive)
    alive -= freed.pop(i, 0)
  return peak


def _source(one: Instruction, by_name: dict[str, Instruction]) -> str:
  """The instruction whose buffer this one names."""
  while one.opcode in ('bitcast', 'opt-barrier', 'get-tuple-element') or one.opcode.endswith(
    '-done'
  ):
    one = by_name[one.operands[0]]
  return one.name


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
