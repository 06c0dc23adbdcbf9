"""What an optimized XLA program does with device memory, read off its text.

A chip's own memory is marked S(1), S(2), … in a shape's layout, and a host's S(5): what
lies there costs no device-memory traffic. `cost_analysis()` counts it all the same, and
on TPU `memory_analysis()` counts it as temporaries, so neither is of use here.
"""

import math
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

BITS = {'pred': 8, 'bf16': 16, 's4': 4, 'u4': 4}
SHAPE = re.compile(r'\b(pred|bf16|[suc]\d+|f\d+\w*)\[([\d,]*)\](\{[^}]*\})?')
MOVES_NOTHING = {
  *('parameter', 'constant', 'tuple', 'get-tuple-element', 'bitcast', 'opt-barrier'),
  *('after-all', 'partition-id', 'replica-id', 'iota'),
}
NOT_COUNTED = {'while', 'async-start', 'all-gather-start', 'collective-permute-start'}
COLLECTIVES = ('all-reduce', 'all-gather', 'reduce-scatter', 'all-to-all', 'collective-permute')


class Instruction(NamedTuple):
  """One line of a computation: `name = type opcode(operands), attributes`."""

  name: str
  type: str
  opcode: str
  operands: tuple[str, ...]
  attributes: str
  is_root: bool


Buffer = tuple[str, int]  # the instruction that fills it, and its place in the tuple it makes
Value = Buffer | list[Any]  # what a name stands for: a buffer, or a tuple of values


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
  return sum(traffic_by_leaf(program).values())


def traffic_by_leaf(program: Program) -> dict[tuple[int, str], int]:
  """The traffic of one execution by the size of a leaf, and by what is read of it.

  The size, in bytes, is that of the largest array that an instruction touches: what a step
  computes for a leaf touches arrays as large as it, and scalars. What is read is named by the
  argument of the program; it is '' for what the step wrote itself, and 'written' for writes.
  """
  entry = program.computations[program.entry]
  value_of, arguments = _values(entry), {one.name for one in entry if one.opcode == 'parameter'}

  def argument(name: str) -> str:
    value = value_of.get(name)  # None within a conditional
    return value[0] if isinstance(value, tuple) and value[0] in arguments else ''

  found: dict[tuple[int, str], int] = {}
  for one, types in _executed(program, program.entry):
    largest = max((shape_bytes(x, on_chip=True) for x in _touched(one, types)), default=0)
    moved = [(argument(name), size) for name, size in _read(one, types).items()]
    for what, size in (*moved, ('written', shape_bytes(_made(one)))):
      found[largest, what] = found.get((largest, what), 0) + size
  return {key: size for key, size in found.items() if size}


def computed(program: Program) -> tuple[int, int]:
  """How many instructions of one execution compute with arrays, and how many with scalars alone.

  Copies and slices compute nothing, nor does what joins slices that were fetched apart.
  """
  counts = [0, 0]
  for one, types in _executed(program, program.entry):
    if not one.opcode.startswith(('copy', 'slice')) and 'ConcatBitcast' not in one.attributes:
      counts[all(_is_scalar(array) for array in _touched(one, types))] += 1
  return counts[False], counts[True]


def instructions(program: Program) -> int:
  """All instructions, also those within fusions: what the compiler has worked on."""
  return sum(map(len, program.computations.values()))


def _executed(program: Program, computation: str) -> Iterator[tuple[Instruction, dict[str, str]]]:
  """What may move something, with the types of all before it."""
  types: dict[str, str] = {}
  for one in program.computations[computation]:
    types[one.name] = one.type
    if one.opcode in NOT_COUNTED:
      raise NotImplementedError(f'what a {one.opcode} moves: {one.name}')
    if one.opcode == 'conditional':
      yield from _executed(program, _later_branch(one))
    elif one.opcode not in MOVES_NOTHING and not one.opcode.endswith('-done'):
      yield one, types


def _later_branch(one: Instruction) -> str:
  found = re.search(r'(?:false_computation=|branch_computations=\{)%?([\w.\-]+)', one.attributes)
  assert found, one
  return found[1]


def _touched(one: Instruction, types: dict[str, str]) -> list[str]:
  """The types of the arrays that an instruction reads and makes."""
  return [
    x for kind in (one.type, *(types.get(n, '') for n in one.operands)) for x in _arrays(kind)
  ]


def _arrays(kind: str) -> list[str]:
  return [match[0] for match in SHAPE.finditer(kind)]


def _is_scalar(array: str) -> bool:
  return math.prod(int(n) for n in SHAPE.findall(array)[0][1].split(',') if n) == 1


def _read(one: Instruction, types: dict[str, str]) -> dict[str, int]:
  """Bytes that an instruction reads of each operand; of a slice as much as it makes."""
  read = {name: shape_bytes(types.get(name, '')) for name in one.operands}
  if one.opcode not in ('slice-start', 'slice'):
    return read
  made = shape_bytes(_made(one), on_chip=True)
  return {name: made if size else 0 for name, size in read.items()}


def _made(one: Instruction) -> str:
  """The type of what an instruction makes, without its operand and context."""
  if one.opcode == 'copy-start':  # (destination, source, context)
    return _arrays(one.type)[0]
  return _arrays(one.type)[1] if one.opcode == 'slice-start' else one.type


def temporaries(program: Program) -> int:
  """Peak of what lies in device memory besides arguments and outputs, in bytes.

  Without what is within a conditional, and what it returns.
  """
  entry = program.computations[program.entry]
  value_of = _values(entry)
  root = next(one for one in entry if one.is_root)
  outputs = set(_buffers(value_of[root.name]))
  last_use = {
    buffer: i
    for i, one in enumerate(entry)
    for name in (one.operands if one.opcode not in MOVES_NOTHING else ())  # to name is not to use
    for buffer in _buffers(value_of[name])
  }
  freed: dict[int, int] = {}
  alive = peak = 0
  for i, one in enumerate(entry):
    for buffer in _buffers(value_of[one.name]):
      if buffer[0] == one.name and buffer not in outputs and _stores(one):
        size = shape_bytes((_arrays(_made(one)) or [''])[buffer[1]])
        alive += size
        end = last_use.get(buffer, i)
        freed[end] = freed.get(end, 0) + size
    peak = max(peak, alive)
    alive -= freed.pop(i, 0)
  return peak


def _stores(one: Instruction) -> bool:
  return one.opcode not in MOVES_NOTHING | {'slice-start', 'conditional'}


def _values(computation: Sequence[Instruction]) -> dict[str, Value]:
  """The buffers behind each name."""
  found: dict[str, Value] = {}
  for one in computation:
    match one.opcode:
      case 'tuple':
        found[one.name] = [found[name] for name in one.operands]
      case 'get-tuple-element':
        whole, index = found[one.operands[0]], re.search(r'index=(\d+)', one.attributes)
        found[one.name] = whole[int(index[1])] if isinstance(whole, list) and index else whole
      case opcode if opcode in ('bitcast', 'opt-barrier') or opcode.endswith('-done'):
        found[one.name] = found[one.operands[0]]
      case _:
        made = _made(one)
        several = made.startswith('(') and one.opcode != 'conditional'
        parts: list[Value] = [(one.name, i) for i in range(len(_arrays(made)))]
        found[one.name] = parts if several else (one.name, 0)
  return found


def _buffers(value: Value) -> Iterator[Buffer]:
  if isinstance(value, tuple):
    yield value
  else:
    for part in value:
      yield from _buffers(part)


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
