"""Which leaves cost an optimizer step more than one pass: its traffic by their size.

    python examples/benchmarks/leaf_sizes.py --model t5_base

compiles ahead of time, as compiled.py does, for one chip. A leaf that the chip can keep between its
layer's sums and its update takes 8 passes (Adam's 7, and the anchor's read), others take more.
"""

import argparse
import collections
import math
import sys
from pathlib import Path
from typing import Any

from rich import filesize

sys.path.insert(0, str(Path(__file__).parents[1]))  # examples/, for what follows

import reporting
import training
from benchmarks import compiled, hlo, methods, shapes

METHODS = (methods.REFERENCE, 'form 1', 'form 2', 'form 2, apply')
SHOWN = 0.01  # of the params; what all smaller leaves take is not shown


def rows(tree: shapes.Shapes, text: str) -> dict[str, dict[str, list[float]]]:
  """The traffic of a compiled step for the leaves of each size, in copies of these leaves."""
  sizes = collections.Counter(4 * math.prod(leaf) for leaf in shapes.each(tree))
  traffic = hlo.traffic_by_leaf(hlo.parse(text))
  found = {}
  for size, count in sorted(sizes.items(), reverse=True):
    share = size * count / (4 * shapes.parameters(tree))
    if share >= SHOWN:
      values = {
        'leaves': count,
        'share of params, %': 100 * share,
        'passes, N': traffic[size] / (size * count),
      }
      found[filesize.decimal(size)] = {key: [round(x, 3)] for key, x in values.items()}
  return found


def main(argv: list[str] | None = None) -> dict[str, Any]:
  """Compiles every method; returns the rows of the table."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--target', choices=('v5e', 'h200'), default='v5e')
  parser.add_argument('--model', choices=shapes.MODELS, default='t5_base')
  parser.add_argument('--method', nargs='+', choices=methods.OPTIMIZERS, default=METHODS)
  parser.add_argument('--out', type=Path, default=Path('runs/leaf_sizes'))
  args = parser.parse_args(argv)
  tree, target = shapes.MODELS[args.model](), compiled.TARGETS[args.target]
  results: dict[str, Any] = {}
  with training.progress_bar() as bar:
    task = bar.add_task('compile', total=len(args.method))
    for name in args.method:
      tx = methods.OPTIMIZERS[name](compiled.nowhere(tree))
      _, text = compiled.compile_step(tx, tree, target)
      results |= {f'{name}: {size}': row for size, row in rows(tree, text).items()}
      bar.advance(task)
  settings = {'model': args.model, 'target': args.target, 'compilers': compiled.compilers()}
  reporting.show('Device-memory traffic by leaf size; N: one copy of these leaves', results)
  name = f'{args.model}_{args.target}'
  reporting.write_json(args.out / f'{name}.json', settings, results)
  print(f'Results: {args.out}/{name}.json')
  return results


if __name__ == '__main__':
  main()
