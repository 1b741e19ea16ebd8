"""sonic-moe (arXiv:2512.14080) with tiles that are given to it instead of searched for.

Its products come from quack, which times dozens of tiles for every new shape before the
first call.  Here each leg gets the tile of `sonic_tiles`, unless tiles are to be found.
"""
# SPDX-License-Identifier: Apache-2.0

import importlib.util
import os
import statistics
from typing import Any

import torch  # pyright: ignore[reportMissingImports]

from experiments.benchmarks.peers import rows, sonic_tiles, torch_rows
from experiments.benchmarks.peers.torch_rows import Layer, Operands
from experiments.benchmarks.shapes import SHAPES, Shape

_NEEDED = ("sonicmoe", "quack", "cutlass", "tvm_ffi")
_TUNERS = ("gemm_tuned", "gemm_gated_tuned", "gemm_dgated_tuned")


def missing(_: str) -> str | None:
  """Why it cannot run here; None: it can."""
  absent = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
  if absent:
    return f"not installed: {', '.join(absent)}"
  if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9:
    return "needs a Hopper GPU"
  return None


class Chosen:
  """Stands for one of quack's tuned functions, and looks its tile up instead.

  Args:
    tuner: quack's function.
    name: of it.
    shape: of the layer.
    tiles: leg -> tile.
  """

  def __init__(self, tuner: Any, name: str, shape: Shape, tiles: dict[str, Any]):
    self.tuner, self.name, self.shape, self.tiles = tuner, name, shape, tiles
    self.fn = tuner.fn  # what quack calls where nothing is to be tuned

  def __call__(self, *positional: Any, **named: Any) -> Any:
    given = dict(zip(self.tuner.arg_names, positional, strict=False)) | named
    tile = self.tiles[sonic_tiles.leg(self.name, given, self.shape.d_ff)]
    return self.fn(*positional, **named, config=_config(tile))


class Searching(Chosen):
  """Tries tiles on the operands of the first call of each leg; notes how long each
  took.
  """

  def __init__(self, *given: Any):
    super().__init__(*given)
    self.found: dict[str, dict[Any, float]] = {}

  def __call__(self, *positional: Any, **named: Any) -> Any:
    given = dict(zip(self.tuner.arg_names, positional, strict=False)) | named
    which = sonic_tiles.leg(self.name, given, self.shape.d_ff)
    if which not in self.found:
      self.found[which] = {}
      for tile in sonic_tiles.candidates(which):
        call = lambda: self.fn(*positional, **named, config=_config(tile))  # noqa: B023, E731
        try:
          times = [rows.span(call, torch_rows.wait, 0.02) for _ in range(3)]
        except Exception as error:  # a tile that this leg cannot have
          print(f"{which} {tile}: {rows.reason(error)}", flush=True)
          continue
        self.found[which][tile] = statistics.median(times)
        print(f"{which} {tile}: {self.found[which][tile]:.3f} ms", flush=True)
    best = min(self.found[which], key=lambda tile: self.found[which][tile])
    return self.fn(*positional, **named, config=_config(best))


def _config(tile: sonic_tiles.Tile) -> Any:
  from quack.gemm_config import GemmConfig  # pyright: ignore[reportMissingImports]

  return GemmConfig(
    tile_m=tile.rows,
    tile_n=tile.cols,
    pingpong=tile.pingpong,
    cluster_m=tile.cluster[0],
    cluster_n=tile.cluster[1],
    is_dynamic_persistent=False,
  )


def _put(kind: type[Chosen], shape: Shape, tiles: Any) -> list[Any]:
  """Replaces quack's tuned functions where it looks for them."""
  os.environ.setdefault("QUACK_CACHE_AUTOTUNING", "0")
  from quack import gemm_interface as quack  # pyright: ignore[reportMissingImports]

  made = []
  for name in _TUNERS:
    tuner = getattr(quack, name)
    chosen = kind(getattr(tuner, "tuner", tuner), name, shape, tiles)
    setattr(quack, name, chosen)
    made.append(chosen)
  return made


def _layer(given: Operands) -> Layer:
  from sonicmoe.enums import ActivationType  # pyright: ignore[reportMissingImports]
  from sonicmoe.functional import (  # pyright: ignore[reportMissingImports]
    moe_general_routing_inputs,
  )

  shape = given.shape
  token_N = torch.arange(shape.tokens, device=torch_rows.device(), dtype=torch.int32)
  token_N = token_N.repeat_interleave(shape.k)
  expert_N = given.expert_TK.reshape(-1).to(torch.int32)

  def call(x_TD, up_END, down_EDF, weight_TK):
    y_TD, _ = moe_general_routing_inputs(
      x_TD,
      weight_TK.reshape(-1),
      token_N,
      expert_N,
      up_END.permute(1, 2, 0),
      None,
      down_EDF.permute(1, 2, 0),
      None,
      shape.num_experts,
      torch.cuda.current_stream().cuda_stream,
      ActivationType.SWIGLU,
      not torch.is_grad_enabled(),  # then it need not keep the hidden rows
    )
    return y_TD

  return Layer(call, in_turns=True)


def give_tiles(name: str) -> None:
  """Has sonic-moe take the tiles that were found for experts of this name."""
  _put(Chosen, SHAPES[name], sonic_tiles.TILES[name])


def layer(given: Operands) -> Layer:
  (name,) = (n for n, shape in SHAPES.items() if shape == given.shape)
  give_tiles(name)
  return _layer(given)


def tuned(name: str) -> dict[str, Any]:
  """leg -> the fastest tile of those tried, on this GPU."""
  given = torch_rows.operands(SHAPES[name])
  searching = _put(Searching, given.shape, None)
  y_TD = _layer(given).call(*given.leaves)
  torch.autograd.grad(y_TD, given.leaves, given.dy_TD)
  torch_rows.wait()
  found = {which: times for one in searching for which, times in one.found.items()}
  return {which: min(times, key=lambda t: times[t]) for which, times in found.items()}


LAYERS = {"sonic-moe": layer}
