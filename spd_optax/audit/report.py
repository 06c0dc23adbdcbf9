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
from matplotlib.figure import Figure

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
  """Prints the tables and writes the pictures.

  Args:
    runs: one or two.
    out: directory for the pictures; None for one beside the log.
    html: path of a page to write as well.
    every: whether the tables in the terminal have every layer.
    patience: see `AuditLog`.

  Raises:
    AuditFileError: if a run has no records.
  """
  empty = [str(run.path) for run in runs if not (run.records and run.layers)]
  if empty:
    raise AuditFileError(f'no records yet, or no layers: {", ".join(empty)}')
  starts = ['A: ', 'B: '] if len(runs) > 1 else ['']
  series = [
    tables.of_run(run, start + run.path.stem) for start, run in zip(starts, runs, strict=True)
  ]
  advice = [
    f'{start}step {found.step}: {tables.printable(found.message)}'
    for start, run in zip(starts, runs, strict=True)
    for found in advise(run, patience)
  ]
  facts = [tables.facts(run) for run in runs]
  _print([*facts, *_tables(series, every)], advice)
  stem = '_'.join(run.path.stem for run in runs)
  out = out or runs[0].path.parent / f'{stem}_report'
  out.mkdir(parents=True, exist_ok=True)
  drawn = {name: _png(figure) for name, figure in pictures.draw(series).items()}
  for name, data in drawn.items():
    (out / f'{name}.png').write_bytes(data)
  print(f'Pictures: {", ".join(str(out / f"{name}.png") for name in drawn)}')
  if html:
    environment = jinja2.Environment(autoescape=True, trim_blocks=True)
    page = environment.from_string(TEMPLATE.read_text('utf-8')).render(
      title='SPD audit: ' + tables.printable(' and '.join(run.path.name for run in runs)),
      advice=advice,
      facts=facts,
      pictures={name: base64.b64encode(data).decode() for name, data in drawn.items()},
      tables=_tables(series, True),
    )
    html.write_text(page, encoding='utf-8')
    print(f'Page: {html}')


def _tables(runs: Sequence[Series], every: bool) -> list[Table]:
  """The metrics; then every layer, or of many layers blocks and the first of them."""
  most = None if every or len(runs[0].layers) <= ROWS else FIRST
  blocks = [tables.of_blocks(runs[0], ROWS)] if len(runs) == 1 else []
  return [tables.metrics(runs), *blocks, tables.layers(runs, most)]


def _png(figure: Figure) -> bytes:
  buffer = io.BytesIO()
  figure.savefig(buffer, format='png')
  return buffer.getvalue()


def _print(shown: Sequence[Table], advice: Sequence[str]) -> None:
  known = sys.stdout.isatty() or 'COLUMNS' in os.environ
  console = rich.console.Console(
    width=None if known else WIDTH, markup=False, emoji=False, highlight=False
  )
  for table in shown:
    if table.rows:
      plain = not any(table.header)
      made = rich.table.Table(
        title=table.title,
        title_justify='left',
        show_header=not plain,
        box=rich.box.SIMPLE_HEAD,
      )
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
