"""A report of one run, or of two side by side: in the terminal, as pictures, and as a page."""

import base64
import io
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import rich.box
import rich.table
from rich.console import Console

from spd_optax.audit import pictures, tables
from spd_optax.audit.advice import advise
from spd_optax.audit.format import AuditFileError, Run
from spd_optax.audit.tables import Series, Table

ROWS = 40  # layers that are shown one by one in the terminal
FIRST = 20  # that are shown if there are more
WIDTH, PAGE_WIDTH = 120, 200  # of what is no terminal
PAGE = """<!doctype html>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>SPD audit</title>
<style>img { max-width: 100% }</style>
"""
TEXT = '<pre>{code}</pre>\n'


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
  known = sys.stdout.isatty() or 'COLUMNS' in os.environ
  _print(_console(None if known else WIDTH), [*facts, *_tables(series, every)], advice)
  out = out or runs[0].path.parent / ('_'.join(run.path.stem for run in runs) + '_report')
  out.mkdir(parents=True, exist_ok=True)
  drawn = {out / f'{name}.png': figure for name, figure in pictures.draw(series).items()}
  for path, figure in drawn.items():
    figure.savefig(path)
  print(f'Pictures: {", ".join(map(str, drawn))}')
  if html:
    html.write_text(_page(facts, advice, list(drawn), _tables(series, every=True)), 'utf-8')
    print(f'Page: {html}')


def _page(
  facts: Sequence[Table], advice: Sequence[str], images: Sequence[Path], shown: Sequence[Table]
) -> str:
  console = _console(PAGE_WIDTH, file=io.StringIO(), record=True)
  _print(console, facts, advice)
  page = PAGE + console.export_html(code_format=TEXT, inline_styles=True)
  for path in images:
    data = base64.b64encode(path.read_bytes()).decode()
    page += f'<p><img alt="{path.stem}" src="data:image/png;base64,{data}"></p>\n'
  _print(console, shown, [])
  return page + console.export_html(code_format=TEXT, inline_styles=True)


def _tables(runs: Sequence[Series], every: bool) -> list[Table]:
  """The metrics; then every layer, or of many layers blocks and the first of them."""
  most = None if every or len(runs[0].layers) <= ROWS else FIRST
  blocks = [tables.of_blocks(runs[0], ROWS)] if len(runs) == 1 else []
  return [tables.metrics(runs), *blocks, tables.layers(runs, most)]


def _console(width: int | None, **options: Any) -> Console:
  return Console(width=width, markup=False, emoji=False, highlight=False, **options)


def _print(console: Console, shown: Sequence[Table], advice: Sequence[str]) -> None:
  for title, header, rows in shown:
    table = rich.table.Table(title=title, title_justify='left', box=rich.box.SIMPLE_HEAD)
    table.show_header = any(header)
    for i, column in enumerate(header):
      number = i > 0 and table.show_header
      justify: Any = 'right' if number else 'left'
      table.add_column(column, justify=justify, no_wrap=number, overflow='fold')
    for row in rows:
      table.add_row(*row)
    if rows:
      console.print(table)
  for message in advice:
    console.print(f'WARNING: {message}', style='bold yellow')
