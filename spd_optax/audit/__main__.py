"""Reports of audit logs.

    python -m spd_optax.audit report RUN.jsonl [--out DIR] [--html PAGE.html] [--all]
    python -m spd_optax.audit compare A.jsonl B.jsonl [--out DIR] [--html PAGE.html] [--all]
    python -m spd_optax.audit verify RUN.jsonl [--hash HASH]

Exit status: 0 if all is well; 1 if there is no report; 2 for a wrong command line; 3 if
the last line is torn, and the report is of every whole one.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from spd_optax.audit import format, tables
from spd_optax.audit.advice import PATIENCE
from spd_optax.audit.format import AuditFileError, Run

TORN = 3


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
  for command, names in ((report, ['RUN']), (compare, ['A', 'B']), (verify, ['RUN'])):
    metavars = tuple(f'{name}.jsonl' for name in names)
    command.add_argument('logs', type=Path, nargs=len(names), metavar=metavars)
  verify.add_argument('--hash', help='a hash that the log had, to find an end that was cut off')
  for command in (report, compare):
    command.add_argument('--out', type=Path, help='directory for the pictures (beside the log)')
    command.add_argument('--html', type=Path, metavar='PAGE.html', help='also write one page')
    command.add_argument('--all', action='store_true', help='every layer, however many')
    command.add_argument(
      '--patience', type=_count, default=PATIENCE, help='see AuditLog (default: %(default)s)'
    )
  return parser.parse_args(arguments)


def _count(text: str) -> int:
  if not (text.isdecimal() and int(text) >= 1):
    raise argparse.ArgumentTypeError(f'expected an integer of 1 or more, found {text!r}')
  return int(text)


def main(arguments: Sequence[str] | None = None) -> int:
  """Runs a command; returns the exit status."""
  args = parse(arguments)
  try:
    if args.command == 'verify':
      runs = [format.verify(args.logs[0], args.hash)]
      print(f'{runs[0].path}: {len(runs[0].records)} records as they were written; ', end='')
      print(f'last hash {runs[0].hash}')
    else:
      runs = [format.read(path) for path in args.logs]
      _report(runs, args)
  except (AuditFileError, OSError, ImportError) as error:
    print(f'error: {_lines(str(error))}', file=sys.stderr)
    return 1
  torn = [run for run in runs if run.torn]
  for run in torn:
    print(_lines(f'warning: {run.path}: {tables.torn(run)}'), file=sys.stderr)
  return TORN if torn else 0


def _report(runs: Sequence[Run], args: argparse.Namespace) -> None:
  try:
    from spd_optax.audit import report
  except ImportError as error:
    raise ImportError(f"the report needs {error.name}: pip install 'spd_optax[audit]'") from error
  report.show(runs, args.out, args.html, args.all, args.patience)


def _lines(text: str) -> str:
  """A message of several lines, each without characters that could steer a terminal."""
  return '\n'.join(map(tables.printable, text.split('\n')))


if __name__ == '__main__':
  sys.exit(main())
