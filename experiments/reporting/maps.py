"""Maps of load and of likeness: a small picture with axes around it, as SVG text.

One cell is one pixel of an indexed PNG, which the browser scales without smoothing: a
page of two hundred maps stays small, which drawn cells or matplotlib's axes would not.
"""
# SPDX-License-Identifier: Apache-2.0

import base64
import io
from collections.abc import Sequence

import matplotlib
import numpy as np
from markupsafe import Markup, escape
from matplotlib.colors import Colormap, to_hex
from matplotlib.ticker import MaxNLocator
from PIL import Image

_LEVELS = 33  # shades: as many as one tells apart, and one for about even
_WIDEST = 2.0  # powers of two of an even load that the colours reach, up and down
_COLOURS = matplotlib.colormaps["RdBu_r"].resampled(_LEVELS)
_ALIKE = matplotlib.colormaps["viridis"].resampled(_LEVELS)
_HEIGHT = 100  # of the cells, if rows are numbers
_TOP, _BOTTOM, _RIGHT = 18, 30, 10
_LETTER = 5.8  # width at most
_NAME = 22  # letters of a row's name that are shown


def scale() -> list[str]:
  """CSS colours from a quarter of an even load to four times of it."""
  return [to_hex(_COLOURS(x)) for x in np.linspace(0, 1, 9)]


def alike_scale() -> list[str]:
  """CSS colours from 0 to 1, of `alike_map`."""
  return [to_hex(_ALIKE(x)) for x in np.linspace(0, 1, 9)]


def load_map(
  load: np.ndarray,
  *,
  title: str,
  x: str,
  y: str = "",
  rows: Sequence[str] | None = None,
  columns: tuple[int, int] | None = None,
  even: np.ndarray | None = None,
  numbers: bool = False,
  width: int = 175,
) -> Markup:
  """A map of loads against an even one; an <svg> element.

  Args:
    load: f64[R,C], nan where there is no such expert.
    title: above it.
    x: what columns are.
    y: what rows are.
    rows: names of rows; numbers from 0 if None.
    columns: first and last number of the columns; from 0 if None.
    even: f64[R,1] or f64[1,C] load that counts as even; the mean of each row if None.
    numbers: write the ratio into each cell.
    width: of the cells together, in pixels.
  """
  mean = np.nanmean(load, axis=1, keepdims=True) if even is None else even
  ratio = load / np.where(mean > 0, mean, 1.0)
  shades = np.log2(np.clip(ratio, 2.0 ** -(2 * _WIDEST), None))
  image = _png((shades + _WIDEST) / (2 * _WIDEST), _COLOURS)
  height = _HEIGHT if rows is None else max(13 * len(load), 26)
  written = ratio if numbers else np.full_like(ratio, np.nan)
  size = (width, height)
  return _framed(
    image, written, size, title=title, x=x, y=y, rows=rows, columns=columns
  )


def alike_map(
  values: np.ndarray,
  *,
  title: str,
  x: str,
  y: str = "",
  rows: Sequence[str] | None = None,
) -> Markup:
  """A square map of numbers from 0 to 1, such as cosines; an <svg> element.

  Args:
    values: f64[N,N], nan for none.
    title, x, y, rows: as of `load_map`.
  """
  width = 175 if rows is None else max(13 * len(values), 65)
  nothing = np.full_like(values, np.nan)
  size = (width, width)
  image = _png(values, _ALIKE)
  return _framed(image, nothing, size, title=title, x=x, y=y, rows=rows, columns=None)


def _framed(
  image: str,
  written: np.ndarray,
  size: tuple[int, int],
  *,
  title: str,
  x: str,
  y: str,
  rows: Sequence[str] | None,
  columns: tuple[int, int] | None,
) -> Markup:
  """A picture with its axes; `written` is what stands in its cells, nan for nothing."""
  num_rows, num_columns = written.shape
  width, height = size
  names = [x if len(x) <= _NAME else x[: _NAME - 1] + "…" for x in rows or ()]
  left = 34 if rows is None else 10 + _LETTER * max(map(len, names))
  parts = [
    _text(left, 12, title, "title"),
    Markup(
      f'<image x="{left}" y="{_TOP}" width="{width}" height="{height}" '
      f'preserveAspectRatio="none" href="data:image/png;base64,{image}"/>'
    ),
    Markup(f'<rect x="{left}" y="{_TOP}" width="{width}" height="{height}"/>'),
  ]
  first, last = columns or (0, num_columns - 1)
  for value in _ticks(first, last):
    # A cell spans its number plus and minus a half.
    place = left + width * (value - first + 0.5) / (last - first + 1)
    parts.append(_text(place, _TOP + height + 12, str(value), "middle"))
  parts.append(_text(left + width / 2, _TOP + height + 25, x, "middle"))
  for row in range(num_rows) if names else _ticks(0, num_rows - 1):
    place = _TOP + height * (row + 0.5) / num_rows + 3.5
    parts.append(_text(left - 5, place, names[row] if names else str(row), "end"))
  if y:
    parts.append(
      Markup('<g transform="translate(9 {}) rotate(-90)">{}</g>').format(
        _TOP + height / 2, _text(0, 0, y, "middle")
      )
    )
  for (row, column), value in np.ndenumerate(written):
    if np.isfinite(value):
      dark = not 0.5 < value < 2
      place = left + width * (column + 0.5) / num_columns
      level = _TOP + height * (row + 0.5) / num_rows + 3
      parts.append(_text(place, level, f"{value:.2f}", "light" if dark else "cell"))
  whole, high = round(left + width + _RIGHT), round(_TOP + height + _BOTTOM)
  start = Markup(
    '<svg class="map" role="img" aria-label="{}" viewBox="0 0 {} {}" '
    'style="width: {}px">'
  ).format(title, whole, high, whole)
  return start + Markup("").join(parts) + Markup("</svg>")


def _png(part: np.ndarray, colours: Colormap) -> str:
  """Base64 of a picture, a pixel for each cell; `part` is 0 to 1 of the colours."""
  index = np.clip(np.floor(part * _LEVELS), 0, _LEVELS - 1)
  index = np.where(np.isfinite(part), index, _LEVELS).astype(np.uint8)
  image = Image.fromarray(index, mode="P")
  palette = (255 * colours(np.arange(_LEVELS))[:, :3]).round().astype(int)
  image.putpalette([*palette.flatten().tolist(), 255, 255, 255])
  stream = io.BytesIO()
  image.save(stream, format="PNG", optimize=True, transparency=_LEVELS)
  return base64.b64encode(stream.getvalue()).decode()


def _ticks(first: int, last: int) -> list[int]:
  values = MaxNLocator(4, integer=True, min_n_ticks=1).tick_values(first, last)
  return [int(value) for value in values if first <= value <= last]


def _text(x: float, y: float, text: str, kind: str) -> Markup:
  return Markup('<text x="{:g}" y="{:g}" class="{}">{}</text>').format(
    round(x, 1), round(y, 1), kind, escape(text)
  )
