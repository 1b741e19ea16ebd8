"""tokamax's ragged product for Hopper: as it comes, and with larger tiles by hand."""
# SPDX-License-Identifier: Apache-2.0

import functools
import importlib.util
import sys
import types
from collections.abc import Callable
from typing import Any

from jax import Array

from experiments.benchmarks.peers import mgpu, ours, rows
from experiments.benchmarks.shapes import Shape

_PROFILER = ("xprof", "xprof.cli", "xprof.cli.tools")


def missing(_: str) -> str | None:
  """Why it cannot run here; None: it can."""
  if importlib.util.find_spec("tokamax") is None:
    return "tokamax is not installed"
  try:
    imported()
  except Exception as error:  # of somebody else's code: any
    return rows.reason(error)
  return None if mgpu.on_hopper() else "needs a Hopper GPU"


def imported() -> Any:
  """The package, with an empty stand-in for a profiler that it imports and not uses."""
  if "xprof" not in sys.modules and importlib.util.find_spec("xprof") is None:
    for name in _PROFILER:
      sys.modules[name] = types.ModuleType(name)
    setattr(sys.modules["xprof.cli.tools"], "get_kernel_stats_tool", None)  # noqa: B010
  import tokamax  # pyright: ignore[reportMissingImports]

  return tokamax


def larger_tiles() -> Callable[..., Array]:
  """128 x 128 x 64 instead of its heuristic's; its search does not reach them."""
  imported()
  from tokamax._src.ops.ragged_dot import (  # pyright: ignore[reportMissingImports]
    base,
    pallas_mosaic_gpu as kernels,
  )

  def op(**more):
    tile = kernels.Config(
      block_m=128, block_n=128, block_k=64, num_stages=4, split_k=1, **more
    )
    return functools.partial(kernels.PallasMosaicGpuRaggedDot, config=tile)

  to_rows = op(persistent=False, grid_minor_dim=0, grid_tile_width=8)
  gradients = functools.partial(
    base.vjp, dlhs_ragged_dot=to_rows(), drhs_ragged_dot=op()()
  )
  dot = to_rows(vjp=gradients)
  return lambda x, w, sizes: dot(x, w, group_sizes=sizes)


def layer(shape: Shape) -> Callable[..., Array]:
  dot = functools.partial(imported().ragged_dot, implementation="mosaic")
  return ours.plain(shape, dot, both_ways=True)


def layer_of_larger_tiles(shape: Shape) -> Callable[..., Array]:
  return ours.plain(shape, larger_tiles(), both_ways=True)


LAYERS = {"tokamax": layer, "tokamax, larger tiles": layer_of_larger_tiles}
