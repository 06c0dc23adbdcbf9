"""Draws condition.png: a layer that is free, and one that is held.

python docs/pictures/condition.py
"""

from pathlib import Path

import matplotlib

matplotlib.use('Agg')
import matplotlib.pyplot as plt
import numpy as np

INK, BLUE, ORANGE, GREY = '#263238', '#1565c0', '#e65100', '#90a4ae'
THETA = np.array([2.2, 1.0])  # θ; the anchor is at the origin


def arrow(
  axes: plt.Axes, start: np.ndarray, end: np.ndarray, color: str, **options: object
) -> None:
  """One arrow from point to point."""
  style = {'arrowstyle': '-|>', 'color': color, 'lw': 2, 'shrinkA': 0, 'shrinkB': 0} | options
  axes.annotate('', end, start, arrowprops=style)


def draw(axes: plt.Axes, title: str, downhill: np.ndarray, step: np.ndarray, held: bool) -> None:
  """The plane with θ_0, θ, −g and the step."""
  radius = np.linalg.norm(THETA)
  angles = np.linspace(-0.45, 1.5, 100)
  axes.plot(radius * np.cos(angles), radius * np.sin(angles), '--', color=GREY, lw=1)
  axes.plot([0, THETA[0]], [0, THETA[1]], color=GREY, lw=1.2)
  axes.text(1.2, 0.26, 'd', color=GREY, fontsize=13)
  arrow(axes, THETA, THETA + downhill, BLUE)
  axes.text(*(THETA + downhill * 1.16 - np.array([0.1, 0.08])), '−g', color=BLUE, fontsize=13)
  after = THETA + step
  if held:
    end = after * radius / np.linalg.norm(after)
    arrow(axes, THETA, after, GREY, linestyle='--', lw=1.5)
    axes.text(
      *(after + np.array([0.06, 0.02])), "the optimizer's step", color='#607d8b', fontsize=10
    )
    arrow(axes, after, end, ORANGE, lw=1.5)
    axes.plot(*end, 'o', color=ORANGE, ms=8)
    axes.text(*(end + np.array([-0.98, -0.12])), 'taken back', color=ORANGE, fontsize=11)
  else:
    arrow(axes, THETA, after, ORANGE)
    axes.plot(*after, 'o', color=ORANGE, ms=8)
    axes.text(*(after + np.array([-0.2, 0.16])), "the optimizer's step", color=ORANGE, fontsize=11)
  axes.plot(0, 0, 's', color=INK, ms=8)
  axes.text(-0.1, -0.42, 'θ₀, pre-trained', color=INK, fontsize=11)
  axes.plot(*THETA, 'o', color=INK, ms=7)
  axes.text(*(THETA + np.array([-0.06, -0.38])), 'θ, now', color=INK, fontsize=11)
  axes.set_title(title, loc='left', fontsize=12, color=INK)
  axes.set(xlim=(-0.3, 4.3), ylim=(-0.75, 2.7), aspect='equal')
  axes.axis('off')


def main() -> None:
  """Writes the picture beside this file."""
  figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout='constrained')
  draw(
    left, 'free: −g points away from θ₀', np.array([1.15, 0.1]), np.array([0.85, 0.75]), held=False
  )
  draw(
    right, 'held: −g points back to θ₀', np.array([-1.1, -0.25]), np.array([0.5, 0.95]), held=True
  )
  figure.savefig(Path(__file__).with_suffix('.png'), dpi=110, facecolor='white')


if __name__ == '__main__':
  main()
