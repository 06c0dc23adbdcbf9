"""A report of one run, or of two side by side: in the terminal, as pictures, and as a page."""

import base64
import io
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import jinja2
import rich.box
import rich.console
import rich.table

from spd_optax.audit import pictures, tables
from spd_optax.audit.advice import advise
from spd_optax.audit.format import AuditFileError, Run
from spd_optax.audit.tables import Series, Table

ROWS = 40  # layers that are shown one by one in the terminal
FIRST = 20  # that are shown if there are more
WIDTH = 120  # of what is no terminal
TEMPLATE = Path(__file__).with_name('page.html')


def show(
  runs: Sequence[Run], out: Path | None, html: Path | None, every: bool, patience: int
) -> None:
  """Prints the tables of one or two runs, and writes the pictures; see `__main__`.

  Raises:
    AuditFileError: if a run has no records.
  """
  empty = [str(run.path) for run in runs if not (run.records and run.layers)]
  if empty:
    raise AuditFileError(f'no records yet, or no layers: {", ".join(empty)}')
  starts = ['A: ', 'B: '] if len(runs) > 1 else ['']
  named = list(zip(starts, runs, strict=True))
  series = [Series(run, start + run.path.stem) for start, run in named]
  advice = [
    f'{start}step {found.step}: {tables.printable(found.message)}'
    for start, run in named
    for found in advise(run, patience)
  ]
  facts = [tables.facts(run) for run in runs]
  _print([*facts, *_tables(series, every)], advice)
  out = out or runs[0].path.parent / ('_'.join(run.path.stem for run in runs) + '_report')
  out.mkdir(parents=True, exist_ok=True)
  drawn = {}
  for name, figure in pictures.draw(series).items():
    figure.savefig(buffer := io.BytesIO(), format='png')
    drawn[out / f'{name}.png'] = buffer.getvalue()
  for path, data in drawn.items():
    path.write_bytes(data)
  print(f'Pictures: {", ".join(map(str, drawn))}')
  if html:
    template = jinja2.Template(TEMPLATE.read_text('utf-8'), autoescape=True, trim_blocks=True)
    page = template.render(
      title='SPD audit: ' + tables.printable(' and '.join(run.path.name for run in runs)),
      advice=advice,
      facts=facts,
      pictures={path.stem: base64.b64encode(data).decode() for path, data in drawn.items()},
      tables=_tables(series, every=True),
    )
    html.write_text(page, encoding='utf-8')
    print(f'Page: {html}')


def _tables(runs: Sequence[Series], every: bool) -> list[Table]:
  """The metrics; then every layer, or of many layers blocks and the first of them."""
  most = None if every or len(runs[0].layers) <= ROWS else FIRST
  blocks = [tables.of_blocks(runs[0], ROWS)] if len(runs) == 1 else []
  return [
    table for table in (tables.metrics(runs), *blocks, tables.layers(runs, most)) if table.rows
  ]


def _print(shown: Sequence[Table], advice: Sequence[str]) -> None:
  known = sys.stdout.isatty() or 'COLUMNS' in os.environ
  console = rich.console.Console(
    width=None if known else WIDTH, markup=False, emoji=False, highlight=False
  )
  for title, header, rows in shown:
    table = rich.table.Table(title=title, title_justify='left', box=rich.box.SIMPLE_HEAD)
    table.show_header = any(header)
    for i, column in enumerate(header):
      number = i > 0 and table.show_header
      table.add_column(
        column, justify='right' if number else 'left', no_wrap=number, overflow='fold'
      )
    for row in rows:
      table.add_row(*row)
    console.print(table)
  for message in advice:
    console.print(f'WARNING: {message}', style='bold yellow')
