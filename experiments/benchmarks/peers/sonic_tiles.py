"""Tiles for sonic-moe's six products, shape by shape.

`python -m experiments.benchmarks.peers --tune-sonic` times the candidates on a GPU and
prints `TILES` anew.
"""
# SPDX-License-Identifier: Apache-2.0

from typing import Any, NamedTuple


class Tile(NamedTuple):
  """Of an output: its size, how warpgroups share it, thread blocks that share loads.

  Args:
    rows, cols: of one thread block.
    pingpong: two warpgroups take tiles in turn, or else halves of one.
    cluster: rows and columns of thread blocks.
  """

  rows: int
  cols: int
  pingpong: bool
  cluster: tuple[int, int] = (2, 1)

  @classmethod
  def of(cls, values: Any) -> "Tile":
    """From what JSON makes of one."""
    rows, cols, pingpong, cluster = values
    return cls(rows, cols, pingpong, tuple(cluster))


LEGS = ("up", "down", "dx of up", "dx of down", "dw of up", "dw of down")
GATHERED = ("up", "dx of down", "dw of up", "dw of down")
GATED = ("up", "dx of down")

_COOPERATIVE = Tile(128, 256, False)
_PINGPONG = Tile(128, 192, True)
_SQUARE = Tile(256, 192, False)

TILES: dict[str, dict[str, Tile]] = {
  "mixtral": {
    "up": _COOPERATIVE,
    "down": _SQUARE,
    "dx of up": _COOPERATIVE,
    "dx of down": _COOPERATIVE,
    "dw of up": _SQUARE,
    "dw of down": _PINGPONG,
  },
  "qwen3": {
    "up": _PINGPONG,
    "down": Tile(128, 160, True),
    "dx of up": Tile(128, 256, False, (1, 2)),
    "dx of down": _COOPERATIVE,
    "dw of up": _COOPERATIVE,
    "dw of down": _COOPERATIVE,
  },
  "olmoe": {
    "up": _PINGPONG,
    "down": _PINGPONG,
    "dx of up": Tile(128, 160, True),
    "dx of down": _COOPERATIVE,
    "dw of up": _SQUARE,
    "dw of down": _SQUARE,
  },
  "dsv3": {
    "up": _PINGPONG,
    "down": Tile(128, 160, True),
    "dx of up": Tile(128, 256, False, (1, 2)),
    "dx of down": _PINGPONG,
    "dw of up": _COOPERATIVE,
    "dw of down": _COOPERATIVE,
  },
}
TILES["tiny"] = TILES["qwen3"]  # to try the row


def leg(tuner: str, given: dict[str, Any], d_ff: int) -> str:
  """Which of a layer's six products a call of one of quack's functions is.

  Args:
    tuner: name of the function.
    given: its arguments by name.
    d_ff: of the layer, by which products of equal kind differ.
  """
  if tuner == "gemm_gated_tuned":
    return "up"
  if tuner == "gemm_dgated_tuned":
    return "dx of down"
  if given.get("cu_seqlens_k") is not None:  # contracted over rows
    return "dw of down" if given["B"].shape[-1] == d_ff else "dw of up"
  return "down" if given["A"].shape[-1] == d_ff else "dx of up"


def candidates(leg: str) -> list[Tile]:
  """What is worth trying: few, since each is compiled for some seconds.

  A leg that gathers rows cannot share columns in a cluster, and a gated one wants
  columns in multiples of 32.
  """
  tiles = [
    _PINGPONG,
    _COOPERATIVE,
    Tile(256, 128, False),
    Tile(128, 160, True),
    Tile(256, 192, False),
  ]
  if leg not in GATHERED:
    tiles.append(Tile(128, 256, False, (1, 2)))
  if leg not in GATED:
    tiles.append(Tile(192, 128, True))
  return tiles


def printed(tiles: dict[str, dict[str, Tile]]) -> str:
  """`TILES` as source."""
  lines = ["TILES: dict[str, dict[str, Tile]] = {"]
  for name, legs in tiles.items():
    lines.append(f'  "{name}": {{')
    for leg in LEGS:
      values = ", ".join(str(value) for value in legs[leg])
      lines.append(f'    "{leg}": Tile({values}),')
    lines.append("  },")
  return "\n".join([*lines, "}"])
