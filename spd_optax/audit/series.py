"""A run as arrays over time, and what the tables and pictures show of it."""

import math
from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple

import numpy as np

from spd_optax import reports
from spd_optax.audit.reading import Record, Run

Curve = tuple[np.ndarray, np.ndarray]  # steps, values


class Series(NamedTuple):
  """The records of a run over T logged steps and L layers.

  Attributes:
    name: of the run, for titles.
    layers: L names.
    norms: float[L], ‖θ_0‖; NaN where not known.
    step: int[T].
    updates: int[T, L], of the state that the layer is in.
    held: bool[L], the condition at the last record.
    ratio: float[L], at the last record.
    constrained: int[T, L], updates so far with a true condition.
    distance: float[T, L].
    metrics: each of the user's by name, at the steps that have it.
  """

  name: str
  layers: list[str]
  norms: np.ndarray
  step: np.ndarray
  updates: np.ndarray
  held: np.ndarray
  ratio: np.ndarray
  constrained: np.ndarray
  distance: np.ndarray
  metrics: dict[str, Curve]


def of_run(run: Run, name: str | None = None) -> Series:
  """The records of a run, without those that it went through again."""
  records, shape = run.current(), (-1, len(run.layers))
  last = records[-1] if records else None
  return Series(
    name=run.path.stem if name is None else name,
    layers=run.layers,
    norms=run.norms,
    step=np.array([record.step for record in records], int),
    updates=np.array([record.updates for record in records], np.int32).reshape(shape),
    held=np.zeros(len(run.layers), bool) if last is None else last.held,
    ratio=np.zeros(len(run.layers)) if last is None else last.ratio,
    constrained=np.array([record.steps for record in records], np.int32).reshape(shape),
    distance=np.array([record.distance for record in records], np.float32).reshape(shape),
    metrics=_metrics(records),
  )


def _metrics(records: Sequence[Record]) -> dict[str, Curve]:
  names = dict.fromkeys(name for record in records for name in record.metrics)
  found = {}
  for name in names:
    having = [record for record in records if name in record.metrics]
    steps = np.array([record.step for record in having])
    found[name] = steps, np.array([record.metrics[name] for record in having])
  return found


def relative(series: Series) -> np.ndarray:
  """float[T, L]: the distance per ‖θ_0‖; NaN where that is 0 or not known."""
  return reports.relative(series.distance, series.norms)


def overall(series: Series) -> tuple[str, Curve]:
  """The distance over all layers, relative to the anchor where that is known, and its name."""
  far = reports.overall(series.distance, series.norms)
  if np.isfinite(far).any():
    return 'distance from the anchor, % of its norm', (series.step, 100 * far)
  return 'distance from the anchor', (series.step, np.linalg.norm(series.distance, axis=-1))


def shares(series: Series) -> np.ndarray:
  """float[L]: the share of its updates so far with a true condition; 0 before the first."""
  if not len(series.step):
    return np.zeros(len(series.layers))
  found: np.ndarray = series.constrained[-1] / np.maximum(series.updates[-1], 1)
  return found


def held_between(series: Series, most: int) -> tuple[np.ndarray, np.ndarray]:
  """The share of the updates held, between up to `most` + 1 of the logged steps.

  Returns:
    The steps at the edges, int[n + 1], and the shares, float[n, L]; NaN where the updates do not
    increase (between two of `optax.MultiSteps`, or where a run went on with a new state).
  """
  at = thinned(len(series.step), most + 1)
  if len(at) == 1:
    step = int(series.step[0])
    return np.array([step - 1, step]), shares(series)[None]
  updates = np.diff(series.updates[at], axis=0)
  steps = np.diff(series.constrained[at], axis=0)
  good = updates > 0
  return series.step[at], np.where(good, steps, np.nan) / np.where(good, updates, 1)


def thinned(count: int, most: int) -> np.ndarray:
  """Up to `most` of `count` indices, evenly, with the first and the last."""
  return np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(int))


class Block(NamedTuple):
  """Layers begin to end, under one name."""

  name: str
  begin: int
  end: int


def blocks(names: Sequence[str], most: int) -> list[Block]:
  """Each layer, or where there are many, runs of layers whose paths begin alike.

  A run is split along the next part of the path as long as the parts are not small. Names
  without common beginnings make runs of equal length, each named after its first layer.
  """
  if len(names) <= most:
    return [Block(name, i, i + 1) for i, name in enumerate(names)]
  size = math.ceil(len(names) / most)
  parts = [name.replace('[', '/[').split('/') for name in names]
  found = _split(parts, Block('', 0, len(names)), 0, size)
  if len(found) > 1:
    return found
  return [Block(names[i], i, min(i + size, len(names))) for i in range(0, len(names), size)]


def _split(parts: Sequence[Sequence[str]], block: Block, depth: int, size: int) -> list[Block]:
  """The runs within a block that agree in `depth` + 1 parts, if they have `size` on average."""
  starts = ['/'.join(part[: depth + 1]) for part in parts[block.begin : block.end]]
  lengths = [(name.replace('/[', '['), len(list(run))) for name, run in groupby(starts)]
  if len(starts) < size * len(lengths) or depth >= max(map(len, parts)):
    return [block]
  found, begin = [], block.begin
  for name, length in lengths:
    found += _split(parts, Block(name, begin, begin + length), depth + 1, size)
    begin += length
  return found
