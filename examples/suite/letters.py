"""Pictures of letters in many fonts, and of emoji by two vendors: 64 × 64 pixels."""

import io
import json
import string
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from suite import packages

SIDE = 64
FONTS = {
  'pool': (
    'font-amatic-sc==0.0.4',
    'fontpkg-caveat==2.0',
    'fontpkg-dancing-script==2.1',
    'fontpkg-delius==1.1',
    'fontpkg-great-vibes==1.103',
    'fontpkg-indie-flower==2.0',
    'fontpkg-lobster==2.100',
    'fontpkg-pacifico==3.1',
    'fontpkg-permanent-marker==1.1',
    'fontpkg-satisfy==1.1',
    'fontpkg-zeyada==1.2',
  ),
  'test': (
    'font-intuitive==0.0.4',
    'fontpkg-kalam==2.1',
    'fontpkg-oleo-script==1.2',
    'fontpkg-shadows-into-light==1.0',
    'fontpkg-yellowtail==1.2',
  ),
  'serif': (
    'fontpkg-crimson-text==1.100',
    'fontpkg-eb-garamond==1.3',
    'fontpkg-libre-baskerville==2.5',
    'fontpkg-playfair-display==1.203',
    'fontpkg-pt-serif==1.0',
  ),
  'monospaced': (
    'fontpkg-dm-mono==1.0',
    'fontpkg-ibm-plex-mono==2.3',
    'fontpkg-inconsolata==3.1',
    'fontpkg-jetbrains-mono==2.211',
    'fontpkg-space-mono==1.3',
  ),
  'poster': (
    'fontpkg-alfa-slab-one==2.0',
    'fontpkg-black-ops-one==1.4',
    'fontpkg-bungee==2.0',
    'fontpkg-gravitas-one==1.1',
    'fontpkg-press-start-2p==3.0',
  ),
}
EACH = {'pool': 30, 'test': 10}  # pictures of each letter, in upper and in lower case
EACH_OOD = 7
EMOJI = {
  'google': 'emoji-datasource-google@16.0.0',
  'twitter': 'emoji-datasource-twitter@16.0.0',
}
THINGS = ('Activities', 'Food & Drink', 'Objects')
PAIRS = 156


def font(wheel: Path) -> ImageFont.FreeTypeFont:
  """The regular style of the font in a package."""
  files = packages.members(wheel, r'.*\.ttf')
  best = min(files, key=lambda name: ('Italic' in name, 'Regular' not in name, name))
  return ImageFont.truetype(io.BytesIO(files[best]), 96)


def drawn(letter: str, font: ImageFont.FreeTypeFont, rng: np.random.Generator) -> np.ndarray:
  """A letter of some size, turned and shifted a little: dark ink on light paper with grain."""
  canvas = Image.new('L', (400, 400))
  ImageDraw.Draw(canvas).text((200, 200), letter, 255, font, anchor='mm')
  ink = canvas.crop(canvas.getbbox())
  scale = rng.uniform(34, 52) / max(ink.size)
  ink = ink.resize([max(round(n * scale), 1) for n in ink.size], Image.Resampling.LANCZOS)
  ink = ink.rotate(rng.uniform(-12, 12), Image.Resampling.BICUBIC, expand=True)
  mask = Image.new('L', (SIDE, SIDE))
  mask.paste(ink, tuple(int((SIDE - n) / 2 + rng.uniform(-5, 5)) for n in ink.size))
  dark, light = rng.uniform(0, 80), rng.uniform(170, 255)
  grey = light + (dark - light) * np.asarray(mask, float) / 255
  return np.clip(grey + rng.normal(0, 8, grey.shape), 0, 255).astype(np.uint8)


def alphabet(kind: str, seed: int, each: int = 0) -> tuple[np.ndarray, np.ndarray]:
  """Pictures of the letters in a kind of fonts in turn, and which letter of 26 it is."""
  rng = np.random.default_rng(seed)
  fonts = [font(packages.fetched(package)) for package in FONTS[kind]]
  each = each or EACH.get(kind, EACH_OOD)
  letters = np.repeat(list(string.ascii_letters), each)
  pictures = [drawn(letter, fonts[i % len(fonts)], rng) for i, letter in enumerate(letters)]
  labels = [string.ascii_lowercase.index(letter.lower()) for letter in letters]
  return np.stack(pictures), np.array(labels, np.int32)


def emoji(vendor: str) -> list[Image.Image]:
  """Pictures of things on white, 64 × 64 in colour."""
  archive = packages.fetched(EMOJI[vendor], packages.NPM)
  entries = json.loads(packages.member(archive, 'package/emoji.json'))
  files = packages.members(archive, r'.*/64/[^/]*')
  pictures = {Path(name).name: content for name, content in files.items()}
  names = [
    entry['image']
    for entry in sorted(entries, key=lambda entry: entry['sort_order'])
    if entry['category'] in THINGS and all(entry[f'has_img_{each}'] for each in EMOJI)
  ]
  chosen = np.random.default_rng(0).permutation(names)[:PAIRS]
  return [on_white(Image.open(io.BytesIO(pictures[name])).convert('RGBA')) for name in chosen]


def on_white(picture: Image.Image, shift: tuple[float, ...] = (0, 0)) -> Image.Image:
  """The picture near the middle of a white square."""
  paper = Image.new('RGBA', (SIDE, SIDE), 'white')
  at = (round((SIDE - n) / 2 + by) for n, by in zip(picture.size, shift, strict=True))
  paper.paste(picture, tuple(at), picture)
  return paper.convert('RGB')


def turned(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
  """The same thing, smaller, turned and shifted."""
  side = rng.integers(36, 53)
  small = picture.convert('RGBA').resize((side, side), Image.Resampling.LANCZOS)
  small = small.rotate(rng.uniform(-30, 30), Image.Resampling.BICUBIC, expand=True)
  return on_white(small, rng.uniform(-6, 6, 2))


def build() -> dict[str, np.ndarray]:
  """All pictures and labels."""
  made = {}
  for seed, kind in enumerate(FONTS):
    made[f'{kind}/pictures'], made[f'{kind}/labels'] = alphabet(kind, seed)
  rng = np.random.default_rng(0)
  emojis = {vendor: emoji(vendor) for vendor in EMOJI}
  emojis['turned'] = [turned(picture, rng) for picture in emojis['google']]
  return made | {f'emoji/{name}': np.stack(pictures) for name, pictures in emojis.items()}
