"""What an optimizer step moves through a TPU's memory for leaves of each size, and what of it.

    python examples/benchmarks/leaf_sizes.py --model t5_base

compiles ahead of time for one v5e chip, as compiled.py does. Adam reads each of gradients, params
and its two moments once, and writes the params and the moments: 7 copies of a leaf. What SPD reads
more than once, the anchor among it, did not stay on the chip between a layer's sums and its update.
"""

import argparse
import collections
import re
import sys
from pathlib import Path
from typing import Any

import jax
from rich import filesize

sys.path.insert(0, str(Path(__file__).parents[1]))  # examples/, for what follows

import reporting
import training
from benchmarks import compiled, hlo, methods, shapes

METHODS = (methods.REFERENCE, 'projection_decay', 'adam_spd', 'adam_spd, apply')
SHOWN = 0.01  # of the params; what all smaller leaves take is not shown
# By what the name of a program's argument says: (params, state, gradients) -> (params, state).
MOVED = {
  'gradients': '^gradients',
  'params': '^params',
  'anchor': '^state.*_anchor__',
  'moments': '^state.*__[mn]u__',
  'stored by the step': '^$',
  'written': '^written$',
}


def rows(tree: shapes.Shapes, text: str) -> dict[str, dict[str, list[float]]]:
  """The traffic of a compiled step for the leaves of each size, in copies of these leaves."""
  sizes = collections.Counter(
    x.size * x.dtype.itemsize for x in jax.tree.leaves(shapes.structs(tree))
  )
  traffic = hlo.traffic_by_leaf(hlo.parse(text))
  found = {}
  for size, count in sorted(sizes.items(), reverse=True):
    share = size * count / sum(sizes.elements())
    if share < SHOWN:
      continue
    moved = {what: bytes_ for (leaf, what), bytes_ in traffic.items() if leaf == size}
    values = {'leaves': count, 'share of params, %': 100 * share}
    values['all, N'] = sum(moved.values()) / (size * count)
    for column, pattern in MOVED.items():
      here = sum(bytes_ for what, bytes_ in moved.items() if re.search(pattern, what))
      values[column] = here / (size * count)
    found[filesize.decimal(size)] = {key: [round(x, 3)] for key, x in values.items()}
  return found


def main(argv: list[str] | None = None) -> dict[str, Any]:
  """Compiles every method; returns the rows of the table."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--model', choices=shapes.MODELS, default='t5_base')
  parser.add_argument('--method', nargs='+', choices=methods.OPTIMIZERS, default=METHODS)
  parser.add_argument('--out', type=Path, default=Path('runs/leaf_sizes'))
  args = parser.parse_args(argv)
  tree = shapes.MODELS[args.model]()
  results: dict[str, Any] = {}
  with training.progress_bar() as bar:
    task = bar.add_task('compile', total=len(args.method))
    for name in args.method:
      tx = methods.OPTIMIZERS[name](compiled.nowhere(tree))
      _, text = compiled.compile_step(tx, tree, compiled.TARGETS['v5e'])
      results |= {f'{name}: {size}': row for size, row in rows(tree, text).items()}
      bar.advance(task)
  settings = {'model': args.model, 'target': 'v5e', 'compilers': compiled.compilers()}
  reporting.show('Device-memory traffic by leaf size; N: one copy of these leaves', results)
  reporting.write_json(args.out / f'{args.model}.json', settings, results)
  print(f'Results: {args.out}/{args.model}.json')
  return results


if __name__ == '__main__':
  main()
