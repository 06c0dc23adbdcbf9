"""Reports of audit logs.

    python -m spd_optax.audit report RUN.jsonl [--out DIR] [--html PAGE.html] [--all]
    python -m spd_optax.audit compare A.jsonl B.jsonl [--out DIR] [--html PAGE.html] [--all]
    python -m spd_optax.audit verify RUN.jsonl [--hash HASH]

Exit status: 0 where all is well; 1 where there is no report; 2 for a wrong command line; 3 where
the last line is torn, and the report is of every whole one.
"""

import argparse
import importlib
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from spd_optax.audit import reading, series, tables
from spd_optax.audit.advice import PATIENCE, advise
from spd_optax.audit.lines import AuditFileError
from spd_optax.audit.reading import Run
from spd_optax.audit.tables import Table

TORN = 3
ROWS = 40  # layers that are shown one by one in the terminal
WIDTH = 120  # of what is no terminal
FIRST = 20  # that are shown where there are more


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
  """The command line."""
  parser = argparse.ArgumentParser(
    prog='python -m spd_optax.audit',
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  commands = parser.add_subparsers(dest='command', required=True)
  report = commands.add_parser('report', help='tables and pictures of a run')
  compare = commands.add_parser('compare', help='two runs side by side')
  verify = commands.add_parser('verify', help='whether every line is as it was written')
  for command, names in ((report, ['run']), (compare, ['a', 'b']), (verify, ['run'])):
    for name in names:
      command.add_argument(name, type=Path, metavar=f'{name.upper()}.jsonl')
  verify.add_argument('--hash', help='a hash that the log had, to find an end that was cut off')
  for command in (report, compare):
    add: Callable[..., Any] = command.add_argument
    add('--out', type=Path, help='directory for the pictures (default: beside the log)')
    add('--html', type=Path, metavar='PAGE.html', help='also write one self-contained page')
    add('--all', action='store_true', help='every layer in the table, however many')
    add('--patience', type=int, default=PATIENCE, help='see AuditLog (default: %(default)s)')
  return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
  """Runs a command; returns the exit status."""
  args = parse(arguments)
  commands = {'report': report, 'compare': compare, 'verify': verify}
  try:
    torn: list[Run] = commands[args.command](args)
  except (AuditFileError, OSError, ImportError) as error:
    print(f'error: {tables.printable_lines(str(error))}', file=sys.stderr)
    return 1
  for run in torn:
    print(f'warning: {run.path}: {tables.torn(run)}', file=sys.stderr)
  return TORN if torn else 0


def verify(args: argparse.Namespace) -> list[Run]:
  """Checks every line."""
  run = reading.verify(args.run, args.hash)
  print(f'{run.path}: {len(run.records)} records as they were written; last hash {run.hash}')
  return [run] if run.torn else []


def report(args: argparse.Namespace) -> list[Run]:
  """Tables and pictures of one run."""
  return _show(args, [reading.read(args.run)])


def compare(args: argparse.Namespace) -> list[Run]:
  """Tables and pictures of two runs, side by side."""
  return _show(args, [reading.read(args.a), reading.read(args.b)])


def _show(args: argparse.Namespace, runs: Sequence[Run]) -> list[Run]:
  """Prints the tables and writes the pictures; returns the runs whose last line is torn."""
  pictures = _optional('spd_optax.audit.pictures')
  empty = [str(run.path) for run in runs if not (run.records and run.layers)]
  if empty:
    raise AuditFileError(f'no records yet, or no layers: {", ".join(empty)}')
  names = ['A: ', 'B: '] if len(runs) > 1 else ['']
  shown = [series.of_run(run, f'{x}{run.path.stem}') for x, run in zip(names, runs, strict=True)]
  advice = [
    f'{name}step {found.step}: {tables.printable(found.message)}'
    for name, run in zip(names, runs, strict=True)
    for found in advise(run, args.patience)
  ]
  facts = [tables.facts(run) for run in runs]
  _print([*facts, *_tables(shown, args.all)], advice)
  drawn = {
    'held': pictures.held(shown),
    'distance': pictures.distances(shown),
    'relative_distance': pictures.relative_distances(shown),
    'metrics': pictures.metrics(shown),
  }
  figures = {name: figure for name, figure in drawn.items() if figure is not None}
  _save(args.out or _beside(runs), figures)
  if args.html:
    title = ' and '.join(run.path.name for run in runs)
    page = _optional('spd_optax.audit.page').page(
      f'SPD audit: {tables.printable(title)}', facts, advice, figures, _tables(shown, True)
    )
    args.html.write_text(page, encoding='utf-8')
    print(f'Page: {args.html}')
  return [run for run in runs if run.torn]


def _tables(runs: Sequence[series.Series], every: bool) -> list[Table]:
  """The metrics; then every layer, or where there are many, blocks and the first of them."""
  first, *others = runs
  few = len(first.layers) <= ROWS
  if others:
    most = None if every or few else FIRST
    return [tables.metrics(runs), *(tables.compared(first, other, most) for other in others)]
  layers = tables.layers(first, None if every or few else FIRST)
  return [tables.metrics(runs), tables.blocks(first, ROWS), layers]


def _beside(runs: Sequence[Run]) -> Path:
  return runs[0].path.parent / ('_'.join(run.path.stem for run in runs) + '_report')


def _save(directory: Path, figures: dict[str, Any]) -> None:
  directory.mkdir(parents=True, exist_ok=True)
  for name, figure in figures.items():
    figure.savefig(directory / f'{name}.png')
  print(f'Pictures: {", ".join(str(directory / f"{name}.png") for name in figures)}')


def _print(shown: Sequence[Table], advice: Sequence[str]) -> None:
  known = sys.stdout.isatty() or 'COLUMNS' in os.environ
  console = _optional('rich.console').Console(
    width=None if known else WIDTH, markup=False, emoji=False, highlight=False
  )
  make, box = _optional('rich.table').Table, _optional('rich.box').SIMPLE_HEAD
  for table in shown:
    if table.rows:
      plain = not any(table.header)
      made = make(title=table.title, title_justify='left', show_header=not plain, box=box)
      for i, column in enumerate(table.header):
        text = plain or i == 0
        made.add_column(
          column, justify='left' if text else 'right', no_wrap=not text, overflow='fold'
        )
      for row in table.rows:
        made.add_row(*row)
      console.print(made)
  for message in advice:
    console.print(f'WARNING: {message}', style='bold yellow')


def _optional(module: str) -> Any:
  """Imports what only reports need.

  Raises:
    ImportError: naming the extra to install.
  """
  try:
    return importlib.import_module(module)
  except ImportError as error:
    raise ImportError(f"the report needs {error.name}: pip install 'spd_optax[audit]'") from error


if __name__ == '__main__':
  sys.exit(main())
