"""A report as one page that opens in any browser, without network."""

import base64
import io
from collections.abc import Mapping, Sequence
from html import escape

from matplotlib.figure import Figure

from spd_optax.audit.tables import Table

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1200px; margin: 2em auto; padding: 0 1em;
  color: #222; background: #fff }
img { max-width: 100%; height: auto }
table { border-collapse: collapse; margin: 1em 0; font-variant-numeric: tabular-nums }
th, td { padding: .15em .7em; border-bottom: 1px solid #ddd; text-align: right;
  overflow-wrap: anywhere }
th:first-child, td:first-child, .facts td { text-align: left }
.scroll { overflow-x: auto }
.advice { background: #fff4d6; border-left: 4px solid #d9a300; padding: .5em 1em; margin: .5em 0 }
summary { cursor: pointer; font-weight: 600 }
"""

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def page(
  title: str,
  facts: Sequence[Table],
  advice: Sequence[str],
  figures: Mapping[str, Figure],
  tables: Sequence[Table],
) -> str:
  """The page; everything that comes from a log is escaped."""
  parts = [
    '<!doctype html><html lang="en"><head><meta charset="utf-8">',
    f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
    '<meta name="viewport" content="width=device-width">',
    f'<title>{escape(title)}</title><style>{STYLE}</style></head><body>',
    f'<h1>{escape(title)}</h1>',
    *(f'<p class="advice">{escape(message)}</p>' for message in advice),
    *(_table(table, 'facts') for table in facts),
    *(
      f'<h2>{escape(name)}</h2><img alt="{escape(name)}" src="{_data(figure)}">'
      for name, figure in figures.items()
    ),
    *(_table(table, '') for table in tables if table.rows),
    '</body></html>',
  ]
  return '\n'.join(parts) + '\n'


def _table(table: Table, kind: str) -> str:
  """The table, folded where it is long."""
  header = ''.join(f'<th>{escape(cell)}</th>' for cell in table.header)
  rows = [''.join(f'<td>{escape(cell)}</td>' for cell in row) for row in table.rows]
  body = '\n'.join(f'<tr>{row}</tr>' for row in rows)
  head = f'<tr>{header}</tr>' if any(table.header) else ''
  is_open = ' open' if len(table.rows) <= 60 else ''
  return (
    f'<details{is_open}><summary>{escape(table.title)} ({len(table.rows)} rows)</summary>'
    f'<div class="scroll"><table class="{kind}">{head}\n{body}</table></div></details>'
  )


def _data(figure: Figure) -> str:
  buffer = io.BytesIO()
  figure.savefig(buffer, format='png')
  return 'data:image/png;base64,' + base64.b64encode(buffer.getvalue()).decode()
