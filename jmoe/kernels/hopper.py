"""What the kernels for Hopper GPUs (H100, H200) share: blocks, tiles, stores.

Warp-specialised Pallas Mosaic GPU: in each block of threads one warpgroup copies tiles
into shared memory (TMA) and two multiply them (wgmma).  The grid is persistent: as many
blocks as the chip has multiprocessors walk over the output tiles in bands, so that the
weights of a band stay in cache.

A row tile is one block of the layout, `BLOCK` rows of one expert, so that no tile spans
two experts and nothing is masked.
"""
# SPDX-License-Identifier: Apache-2.0

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.extend.core import jaxpr_as_fun

from jmoe.kernels.devices import HOPPER_BLOCK
from jmoe.kernels.varying import differs, like, struct as struct, together

BLOCK = HOPPER_BLOCK
_WAVES = 4  # lots of blocks over a mesh; two were slower, eight no faster
DEPTH = 64  # of the contracted dimension in a step: 128 bytes of a 16-bit type


def depth(dtype: Any) -> int:
  """Of the contracted dimension in a step: 128 bytes, as wide as swizzled rows are."""
  return 128 // jnp.dtype(dtype).itemsize


@dataclasses.dataclass(frozen=True)
class Tile:
  """An output tile of two warpgroups.

  Args:
    rows, cols: of both together.
    by_cols: each takes half of the columns, or else half of the rows.
    stages: steps whose operands are in shared memory.
    band: row tiles that are walked before the next column tile.
    cluster: thread blocks that make tiles side by side and copy what these have in
      common once for all.
    alternating: a warpgroup makes every other tile by itself.
    in_flight: the products of a step are waited for behind those of the next.
  """

  rows: int
  cols: int
  by_cols: bool
  stages: int = 4
  band: int = 8
  cluster: int = 1
  alternating: bool = False
  in_flight: bool = False

  def that_fits(self, number: int) -> "Tile":
    """The same, without a cluster where that many tiles cannot be shared out evenly."""
    return self if number % self.cluster == 0 else dataclasses.replace(self, cluster=1)

  def member(self) -> Any:
    """Which thread block of its cluster this is."""
    return 0 if self.cluster == 1 else lax.axis_index("cluster")

  @property
  def own(self) -> tuple[int, int]:
    """Rows and columns of one warpgroup."""
    if self.alternating:
      return self.rows, self.cols
    if self.by_cols:
      return self.rows, self.cols // 2
    return self.rows // 2, self.cols


def multiprocessors() -> int:
  """Of the default device; an H100's where there is none to ask."""
  count = getattr(jax.devices()[0], "core_count", None)
  on_gpu = jax.default_backend() in ("cuda", "gpu")
  return int(count) if on_gpu and count else 132


def waves(*operands: Any) -> int:
  """In how many lots of thread blocks, one after another, a kernel is launched.

  A persistent kernel has a block for each multiprocessor, and each block its share of
  the tiles from the beginning.  Where an exchange holds some multiprocessors, blocks
  that wait for these begin when it ends: the whole kernel takes up to twice as long.
  Where operands differ between devices of a mesh blocks therefore end early, and others
  go on wherever there is room.  On a device alone nothing runs beside a kernel.
  """
  return _WAVES if differs(*operands) else 1


def swizzled(dtype: Any, minor: int) -> tuple[Any, ...]:
  """The layout of a tile in shared memory that wgmma reads without conflicts."""
  bits = jnp.dtype(dtype).itemsize * 8
  swizzle = plgpu.find_swizzle(minor * bits)
  return (
    plgpu.TilingTransform((8, swizzle * 8 // bits)),
    plgpu.SwizzleTransform(swizzle),
  )


def transposed(ref: Any) -> Any:
  """A view of a tile in shared memory; its name moved between versions of jax."""
  if hasattr(ref, "transpose"):
    return ref.transpose((1, 0))
  return plgpu.transpose_ref(ref, (1, 0))


def accumulator(rows: int, cols: int) -> Any:
  """float32 sums in the registers of a warpgroup."""
  kind: Any = getattr(plgpu, "ACC")  # noqa: B009  (named where pyright cannot see)
  return kind((rows, cols), jnp.float32)


def staging(tile_rows: int, dtype: Any) -> Any:
  """Shared memory through which warpgroups store: [warpgroup, slot, rows, cols]."""
  slots = 2 if jnp.dtype(dtype).itemsize == 2 else 1
  shape = (2, slots, min(64, tile_rows), 64)
  return plgpu.SMEM(shape, dtype, transforms=swizzled(dtype, 64))


def store(
  value: Array, staged: Any, group: Array, place: Callable[[int, int, int, int], Any]
) -> None:
  """A warpgroup's tile to global memory, in pieces, by the slots in turn.

  Args:
    value: [rows, cols] in registers, in the dtype of `staged`.
    staged: from `staging`.
    group: which warpgroup this is.
    place: (row, rows, column, columns) -> where that piece goes.
  """
  _, slots, rows, cols = staged.shape
  slot = 0
  plgpu.wait_smem_to_gmem(0, wait_read_only=True)
  for r in range(0, value.shape[0], rows):
    for c in range(0, value.shape[1], cols):
      plgpu.wait_smem_to_gmem(slots - 1, wait_read_only=True)
      staged[group, slot] = value[r : r + rows, c : c + cols]
      plgpu.commit_smem()
      plgpu.copy_smem_to_gmem(staged.at[group, slot], place(r, rows, c, cols))
      slot = (slot + 1) % slots


def nothing(*_: Any, **__: Any) -> None:
  """For a step that a kernel does not have."""


def launch(
  body: Callable[..., None],
  out: Any,
  *,
  blocks: int,
  name: str,
  cluster: int = 1,
  updated: int = 0,
) -> Callable[..., Any]:
  """A persistent kernel of three warpgroups a thread block.

  Args:
    body: (operands, results) as refs.
    out: the results' shapes; those that are written over operands come first.
    blocks: thread blocks, or clusters of them.
    name: of the operation.
    cluster: thread blocks of a cluster.
    updated: that many operands, the first ones, are written over by as many results,
      of equal shapes.  The body gets their refs twice.
  """
  setattr(body, "__name__", name)  # noqa: B010  (profiles show it)
  threads: Any = dict(
    grid=(blocks,), grid_names=("sm",), num_threads=3, thread_name="wg"
  )
  if cluster > 1:
    threads.update(cluster=(cluster,), cluster_names=("cluster",))
  compiler_params = plgpu.CompilerParams(
    lowering_semantics=plgpu.LoweringSemantics.Warpgroup,
    approx_math=True,  # exponentials to two units in the last place of float32
  )
  kernel: Any = plgpu.kernel(
    body, out_type=out, compiler_params=compiler_params, **threads
  )

  def in_place(*operands):
    # XLA fuses the slices of a loop's arrays with the kernels that read or write them,
    # and forgets there which results stand in an operand's place: no operand may be a
    # slice, no result may be written into one.
    operands = lax.optimization_barrier(operands)
    kept = operands[updated:]

    def run(refs):
      def with_twice(*parts):
        both, others = parts[:updated], parts[updated:]
        body(*both, *others[: len(kept)], *both, *others[len(kept) :])

      mesh = plgpu.Mesh(**threads)
      made: Any = pl.kernel(
        with_twice,
        out_type=tuple(out[updated:]),
        mesh=mesh,
        compiler_params=compiler_params,
        name=name,
      )
      for ref, result in zip(refs[updated:], made(*refs[:updated], *kept), strict=True):
        ref[...] = result

    # Never read, and so never made: the refs only carry results out.
    blank = tuple(lax.empty(o.shape, o.dtype) for o in out[updated:])
    return lax.optimization_barrier(pl.run_state(run)((*operands[:updated], *blank)))

  def call(*operands):
    operands = together(*operands)
    function: Any = in_place if updated else kernel
    if updated and differs(*operands):
      # jax has no refs of arrays that differ between devices of a mesh, and needs none:
      # the same program, traced for one device.  Before 0.11 it does not run there.
      function = kernel
      if jax.__version_info__ >= (0, 11):
        one = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in operands]
        function = jaxpr_as_fun(jax.make_jaxpr(in_place)(*one))
    return like(jax.named_call(function, name=name)(*operands), *operands)

  return call


def scoped(**allocations: Any) -> Callable[[Callable[..., None]], None]:
  """Runs a function with allocations that all warpgroups share."""

  def run(function):
    pl.run_scoped(function, collective_axes="wg", **allocations)

  return run
