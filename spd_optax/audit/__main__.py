"""Reports of audit logs.

    python -m spd_optax.audit report RUN.jsonl [--out DIR] [--html PAGE.html] [--all]
    python -m spd_optax.audit compare A.jsonl B.jsonl [--out DIR] [--html PAGE.html] [--all]
    python -m spd_optax.audit verify RUN.jsonl [--hash HASH]

Exit status: 0 if all is well; 1 if there is no report; 2 for a wrong command line; 3 if the last
line is torn, and the report covers every whole line.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from spd_optax.audit import format
from spd_optax.audit.advice import PATIENCE

TORN = 3
COMMANDS = {
  'report': ('tables and pictures of a run', ('RUN.jsonl',)),
  'compare': ('two runs side by side', ('A.jsonl', 'B.jsonl')),
  'verify': ('whether every line is as it was written', ('RUN.jsonl',)),
}


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
  form = argparse.RawDescriptionHelpFormatter
  parser = argparse.ArgumentParser('python -m spd_optax.audit', None, __doc__, formatter_class=form)
  commands = parser.add_subparsers(dest='command', required=True)
  for name, (what, logs) in COMMANDS.items():
    add = commands.add_parser(name, help=what).add_argument
    add('logs', type=Path, nargs=len(logs), metavar=logs)
    if name == 'verify':
      add('--hash', help='a hash that the log had, to find an end that was cut off')
    else:
      add('--out', type=Path, help='directory for the pictures (beside the log)')
      add('--html', type=Path, metavar='PAGE.html', help='also write one page')
      add('--all', action='store_true', help='every layer, however many')
      add('--patience', type=int, default=PATIENCE, help='see AuditLog (default: %(default)s)')
  return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
  """Runs a command; returns the exit status."""
  args = _parse(arguments)
  try:
    if args.command == 'verify':
      run = format.verify(args.logs[0], args.hash)
      print(f'{run.path}: {len(run.records)} records as they were written; last hash {run.hash}')
      runs = [run]
    else:
      runs = [format.read(path) for path in args.logs]
      from spd_optax.audit import report

      report.show(runs, args.out, args.html, args.all, args.patience)
  except ImportError as error:
    return _complain(f"error: the report needs {error.name}: pip install 'spd_optax[audit]'", 1)
  except (format.AuditFileError, OSError) as error:
    return _complain(f'error: {error}', 1)
  torn = [_complain(f'warning: {run.path}: {format.torn(run)}', TORN) for run in runs if run.torn]
  return max(torn, default=0)


def _complain(text: str, status: int) -> int:
  """Prints lines, each without characters that could steer a terminal; returns the status."""
  print('\n'.join(map(format.printable, text.split('\n'))), file=sys.stderr)
  return status


if __name__ == '__main__':
  sys.exit(main())
