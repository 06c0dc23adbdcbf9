"""Results as a table, a JSON file and a picture; shared by the examples.

    python examples/reporting.py README.md examples/README.md docs/evidence.md docs/understand/*.md

puts the tables of the committed results into the documents that name them.
"""

import argparse
import json
import math
import platform
import re
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use('Agg')
import matplotlib.pyplot as plt
import numpy as np
from rich.console import Console
from rich.table import Table

import spd_optax

Values = Sequence[float]
Results = Mapping[str, Mapping[str, Values | str]]  # cells by method and column


def mean_and_error(values: Values) -> tuple[float, float]:
  """The mean and its standard error (NaN for a single value)."""
  spread = np.std(values, ddof=1) if len(values) > 1 else math.nan
  return float(np.mean(values)), float(spread / math.sqrt(len(values)))


def cell(values: Values | str, digits: int = 1) -> str:
  """'83.2 ± 0.4'; the mean alone for a single value; words as they are."""
  if isinstance(values, str):
    return values
  mean, error = mean_and_error(values)
  return f'{mean:.{digits}f}' + ('' if math.isnan(error) else f' ± {error:.{digits}f}')


def rows(results: Results) -> list[list[str]]:
  """A header and a row per method; '–' where a method lacks a column."""
  columns = list(dict.fromkeys(column for row in results.values() for column in row))
  lines = [['method', *columns]]
  for method, values in results.items():
    lines.append([method, *(cell(values[c]) if c in values else '–' for c in columns)])
  return lines


def markdown(results: Results) -> str:
  """The table for a README."""
  header, *body = rows(results)
  lines = [header, ['---', *['---:'] * (len(header) - 1)], *body]
  return '\n'.join('| ' + ' | '.join(line) + ' |' for line in lines)


def show(title: str, results: Results) -> None:
  """Prints the table."""
  header, *body = rows(results)
  table = Table(title=title, title_justify='left')
  for i, column in enumerate(header):
    table.add_column(column, justify='right' if i else 'left')
  for line in body:
    table.add_row(*line)
  Console(markup=False).print(table)


def write_json(path: Path, settings: Mapping[str, Any], results: Mapping[str, Any]) -> None:
  """Writes settings, results and the versions that made them."""
  path.parent.mkdir(parents=True, exist_ok=True)
  names = ('jax', 'jaxlib', 'optax', 'flax')
  versions = {name: metadata.version(name) for name in names} | {
    'spd_optax': spd_optax.__version__,  # of the code that runs, installed or not
    'python': platform.python_version(),
  }
  document = {'settings': dict(settings), 'versions': versions, 'results': results}
  path.write_text(json.dumps(document, indent=1) + '\n')


def publish(args: argparse.Namespace, title: str, results: Mapping[str, Any]) -> None:
  """Prints the table, and writes it with the command line's settings to `args.out`."""
  settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
  show(title, results)
  write_json(args.out / 'results.json', settings, results)


BLOCK = re.compile(r'(<!-- results: (\S+) -->\n).*?(<!-- end of results -->)', re.DOTALL)


def with_tables(document: str, root: Path) -> str:
  """The Markdown document with the table of each results file that it names.

  `FILE#TABLE` is a table of a file that holds several.
  """

  def fill(block: re.Match[str]) -> str:
    path, _, name = block[2].partition('#')
    results = json.loads((root / path).read_text())['results']
    return f'{block[1]}\n{markdown(results[name] if name else results)}\n\n{block[3]}'

  return BLOCK.sub(fill, document)


def scatter(
  axes: plt.Axes, results: Mapping[str, Mapping[str, Values]], x_name: str, y_name: str
) -> None:
  """Methods as points with standard errors: the new task against the old."""
  markers = 'oshD^vPX*<>'
  for i, (method, values) in enumerate(results.items()):
    (x, x_error), (y, y_error) = mean_and_error(values[x_name]), mean_and_error(values[y_name])
    axes.errorbar(
      x,
      y,
      xerr=None if math.isnan(x_error) else x_error,
      yerr=None if math.isnan(y_error) else y_error,
      fmt=markers[i % len(markers)],
      markersize=8,
      capsize=2,
      label=method,
    )
  axes.set(xlabel=x_name, ylabel=y_name)
  axes.grid(alpha=0.3)
  axes.legend(fontsize=8)


if __name__ == '__main__':
  for name in sys.argv[1:]:
    path = Path(name)
    path.write_text(with_tables(path.read_text(), Path(__file__).parent.parent))
