"""What a compiled grouped matmul multiplies and moves, counted from its grid of tiles.

A custom call tells the compiler its cost itself, so that cost says nothing.  Here a
kernel's own text is read from the compiled program: the grid, the blocks that each step
holds, and the product that it forms.  How many tiles of rows it visits follows from the
sizes of the groups.  Masked rows and columns beside a matrix count as multiplied.
"""
# SPDX-License-Identifier: Apache-2.0

import base64
import dataclasses
import math
import re
from typing import Any

import numpy as np

_DYNAMIC = -(2**63)
_SIZES = {"bf16": 2, "f32": 4, "f16": 2}


@dataclasses.dataclass(frozen=True)
class Kernel:
  """One grouped matmul: rows times matrices, or the gradient of matrices."""

  name: str
  grid: tuple[int, ...]  # the visited tiles of rows as -1
  blocks: tuple[
    tuple[int, ...], ...
  ]  # of two operands and the result, in rows, columns
  product: tuple[int, int, int]  # of one step
  shapes: tuple[tuple[str, tuple[int, ...]], ...]  # of the whole two and the result
  declared_flops: float
  declared_bytes: float

  @property
  def of_matrices(self) -> bool:
    """Whether it sums over rows; the visited tiles are then innermost."""
    return self.grid[-1] == -1

  @property
  def tile(self) -> int:
    """Rows of a tile."""
    return self.blocks[0][0]

  def flops(self, sizes_E: Any) -> float:
    """Of every step that is not skipped."""
    steps = math.prod(n for n in self.grid if n > 0)
    return 2.0 * math.prod(self.product) * steps * visits(sizes_E, self.tile)

  def bytes(self, sizes_E: Any) -> float:
    """Between the chip's memory and the matrix units; a block that stays is not moved.

    A step's block is fetched if it is another than the step's before.
    """
    (one, (M, K)), (two, shape), (out, made) = self.shapes
    across, depth = (n for n in self.grid if n > 0)
    first, second, result = (_SIZES[n] for n in (one, two, out))
    tiles = touched(sizes_E, self.tile) * self.tile
    if self.of_matrices:
      return tiles * (across * K * first + depth * shape[1] * second) + result * (
        math.prod(made)
      )
    steps = visits(sizes_E, self.tile)
    N = made[1]
    times = np.count_nonzero(sizes_E) if depth == 1 else steps
    read = (tiles if depth == 1 else steps * self.tile) * across * K * first
    return read + float(times) * K * N * second + tiles * N * result


def visits(sizes_E: Any, tile: int) -> int:
  """Tiles of rows that are multiplied; one that two groups share counts twice."""
  end_E = np.cumsum(np.asarray(sizes_E, np.int64))
  start_E = end_E - sizes_E
  visited_E = -(-end_E // tile) - start_E // tile
  return int(np.sum(np.where(np.asarray(sizes_E) > 0, visited_E, 0)))


def touched(sizes_E: Any, tile: int) -> int:
  """Tiles that hold rows of any group."""
  return int(-(-np.sum(np.asarray(sizes_E, np.int64)) // tile))


def kernels(text: str) -> list[Kernel]:
  """The grouped matmuls among the custom calls of a compiled program.

  Raises:
    ValueError: a call for the matrix units that is not understood.
  """
  text = lines(text)
  shapes = _shapes(text)
  found = []
  pattern = r"%([\w.-]+) = [^\n]*? custom-call\(([^\n]*?)\), custom_call_target=\""
  for match in re.finditer(pattern + r"tpu_custom_call\"([^\n]*)", text):
    name, given, rest = match.groups()
    body = re.search(r'"body":"([^"]*)"', rest)
    code = _code(body[1]) if body else ""
    if "tpu.matmul" not in code:
      continue
    operands = re.findall(r"%([\w.-]+)", re.sub(r"/\*.*?\*/", "", given))
    found.append(_kernel(name, code, [*operands[-2:], name], shapes, rest))
  return found


def _kernel(name: str, code: str, arrays: Any, shapes: Any, rest: str) -> Kernel:
  bounds = re.search(r"iteration_bounds = array<i64: ([^>]*)>", code)
  windows = re.findall(r"window_bounds = array<i64: ([^>]*)>", code)
  # A body may have several branches, of which a step runs one.
  made = set(re.findall(r"tpu\.matmul[^\n]*? : ([^\n]*)", code))
  if bounds is None or len(windows) != 3 or len(made) != 1:
    raise ValueError(
      f"{name}: {len(windows)} blocks and {len(made)} products; want 3, 1."
    )
  grid = tuple(-1 if int(n) == _DYNAMIC else int(n) for n in bounds[1].split(","))
  if grid.count(-1) != 1 or grid[0] == -1:
    raise ValueError(f"{name}: a grid of {grid}; want one bound that is data.")
  one, _, result = re.findall(r"vector<([\dx]+)x\w+>", made.pop())[:3]
  M, N = (int(n) for n in result.split("x"))
  cost = {
    word: float(found[1]) if (found := re.search(rf'"{word}":"(\d+)"', rest)) else 0.0
    for word in ("flops", "bytes_accessed")
  }
  return Kernel(
    name,
    grid,
    tuple(tuple(int(n) for n in w.split(",")) for w in windows),
    (M, math.prod(int(n) for n in one.split("x")) // M, N),
    tuple(shapes[array] for array in arrays),
    cost["flops"],
    cost["bytes_accessed"],
  )


def _code(body: str) -> str:
  """A kernel's text, which the compiler keeps as it is or as bytecode."""
  found = base64.b64decode(body + "==")
  if found.startswith(b"module"):
    return found.decode()
  from jax._src.interpreters import mlir
  from jax._src.lib import tpu  # pyright: ignore[reportPrivateImportUsage]
  from jax._src.lib.mlir import ir  # pyright: ignore[reportPrivateImportUsage]

  context = mlir.make_ir_context()
  tpu.register_dialect(context)
  context.allow_unregistered_dialects = True
  with context, ir.Location.unknown():
    return str(ir.Module.parse(found))


def products(text: str) -> list[tuple[str, float]]:
  """Products that XLA itself makes: where each comes from, and its FLOPs.

  Counted from the three shapes as `2 M K N`; dimensions that all three have make it
  more than it is.
  """
  shapes = _shapes(text)
  found = []
  pattern = r"%([\w.-]+) = [^\n]*? (?:dot|convolution)\(([^\n]*?)\)([^\n]*)"
  for name, given, rest in re.findall(pattern, text):
    arrays = [name, *re.findall(r"%([\w.-]+)", given)]
    sizes = [float(math.prod(shapes[array][1])) for array in arrays]
    place = re.search(r'op_name="([^"]*)"', rest)
    found.append((place[1] if place else name, 2 * math.prod(sizes) ** 0.5))
  return found


def lines(text: str) -> str:
  """With each operation on one line: what a kernel says of itself may be on several."""
  return re.sub(r"\n(?!\s*(?:%|ROOT |ENTRY |\}?\n))", " ", text)


def _shapes(text: str) -> dict[str, tuple[str, tuple[int, ...]]]:
  """Of each value of one array, by its name: dtype and sizes."""
  found = re.findall(r"%([\w.-]+) = (\w+)\[([\d,]*)\]", text)
  return {
    name: (dtype, tuple(int(n) for n in sizes.split(",") if n))
    for name, dtype, sizes in found
  }
