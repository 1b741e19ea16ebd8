"""The cells of a sweep: what each one is, where it is, and how far it has come."""
# SPDX-License-Identifier: Apache-2.0

import dataclasses
import itertools
import json
import re
from collections.abc import Sequence

from etils import epath

from experiments import configs, workdir
from experiments.errors import BadData
from jmoe.use import nearest

_LONGEST = 200  # letters of a folder's name; file systems take 255 bytes


@dataclasses.dataclass(frozen=True)
class Cell:
  """One run: `experiments.main` with these arguments."""

  config: str
  settings: tuple[str, ...]  # the seed among them
  folder: epath.Path

  @property
  def name(self) -> str:
    """Of its folder."""
    return self.folder.name

  def state(self) -> str:
    """'finished', 'stopped' or 'new'."""
    if not (self.folder / "config.json").exists():
      return "new"
    summary = self.folder / "summary.json"
    if not summary.exists():
      return "stopped"
    try:
      finished = json.loads(summary.read_text()).get("finished")
    except (ValueError, AttributeError):
      raise BadData(f"{summary} is not a JSON object; remove it.") from None
    return "finished" if finished else "stopped"


def cells(
  names: Sequence[str],
  *,
  seeds: str,
  settings: Sequence[str],
  grids: Sequence[str],
  out: str,
) -> list[Cell]:
  """Every config with every value of each grid and every seed, checked.

  Args:
    names: of configs.
    seeds: integers with commas between.
    settings: "path=value" of every cell.
    grids: "path=value,value" each; commas within brackets or quotes do not part.
    out: folder of the cells' folders.

  Raises:
    ValueError, TypeError: an argument does not fit, two cells have one folder, or a
      folder is of another run.
  """
  for name in names:
    if name not in configs.names():
      raise ValueError(
        f"--config {name}: unknown config; {nearest(name, configs.names())}"
      )
  for setting in settings:
    if setting.partition("=")[0] == "seed":
      raise ValueError(f"--set {setting}: give --seeds {setting[5:]} instead.")
  axes = [_axis(grid) for grid in grids]
  paths = [grid.partition("=")[0] for grid in grids]
  for path in paths:
    if paths.count(path) > 1:
      raise ValueError(f"--grid {path} is given twice; write all values in one.")
  found = []
  for name, values, seed in itertools.product(
    names, itertools.product(*axes), _seeds(seeds)
  ):
    folder = workdir.opened(out) / _folder(name, values, seed)
    found.append(Cell(name, (*settings, *values, f"seed={seed}"), folder))
  folders = [cell.name for cell in found]
  for folder in folders:
    if folders.count(folder) > 1:
      raise ValueError(
        f"two cells are {folder!r}; give each config, value and seed once."
      )
  for cell in found:
    workdir.prepared(configs.load(cell.config), cell.folder, settings=cell.settings)
  return found


def listed(cells: Sequence[Cell]) -> str:
  """A line for each cell: its number, how far it is, and its folder."""
  width = len(str(len(cells) - 1))
  return "\n".join(
    f"{n:>{width}}  {cell.state():<8}  {cell.folder}" for n, cell in enumerate(cells)
  )


def _seeds(text: str) -> list[int]:
  seeds = text.split(",")
  if not all(seed.strip().isdecimal() for seed in seeds):
    raise ValueError(f"--seeds {text}: give integers from 0, such as 0,1,2.")
  return [int(seed) for seed in seeds]


def _axis(grid: str) -> list[str]:
  path, equals, text = grid.partition("=")
  values = _split(text)
  if not equals or not all(value.strip() for value in values):
    raise ValueError(f"--grid {grid}: write path=value,value, e.g. optim.clip=1,2.")
  if path == "seed":
    raise ValueError(f"--grid {grid}: give --seeds {text} instead.")
  return [f"{path}={value.strip()}" for value in values]


def _split(text: str) -> list[str]:
  """At commas outside of brackets and quotes.

  >>> _split("1,(2,3),'a,b'")
  ['1', '(2,3)', "'a,b'"]
  """
  parts, depth, quote = [""], 0, ""
  for letter in text:
    if quote:
      quote = "" if letter == quote else quote
    elif letter in "'\"":
      quote = letter
    else:
      depth += (letter in "([{") - (letter in ")]}")
    if letter == "," and not depth and not quote:
      parts.append("")
    else:
      parts[-1] += letter
  return parts


def _folder(config: str, values: Sequence[str], seed: int) -> str:
  """Such as 'tiny,optim.clip=2,seed=0', of letters that every file system takes."""
  parts = [config, *values, f"seed={seed}"]
  name = ",".join(re.sub(r"[^A-Za-z0-9._=+-]+", "_", part) for part in parts)
  if len(name) > _LONGEST:
    raise ValueError(
      f"a cell's folder would have a name of {len(name)} letters, {name[:40]}...; "
      "sweep over shorter values, or over a config that holds the long ones."
    )
  return name
