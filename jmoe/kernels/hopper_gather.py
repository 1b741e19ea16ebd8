"""Rows of tokens straight into a kernel's shared memory, in the experts' order.

Hopper's copying engine reads boxes, not rows from anywhere, so that the threads of the
copying warpgroup read 16 bytes each (`cp.async`) and place them as the engine would,
swizzled.  No array `[R,D]` of the rows exists, which SonicMoE (arXiv 2512.14080) does
by the same means.
"""
# SPDX-License-Identifier: Apache-2.0

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from jmoe.kernels import hopper as chip

LAG = 2  # steps whose copies may be under way when the next one is issued
_CHUNK = 16  # bytes that a thread copies at a time
_THREADS = 128


def served() -> bool:
  """Whether kernels can be compiled with it; interpreted ones cannot have it."""
  return jax.__version_info__ >= (0, 10)


def fetch(tokens: Any, token_R: Any, tile: Any, *, first: Any, col: Any) -> None:
  """Starts copies of `tokens[token_R[first + r], col + c]` into a tile, as a group.

  Called by all threads of one warpgroup.  Where the token is past the end, zeros.

  Args:
    tokens: `[T,D]` of a 16-bit type in global memory; D a multiple of 64.
    token_R: i32[R] in global memory.
    tile: [rows, cols] in shared memory, `hopper.swizzled(dtype, 64)`.
    first: i32, of the rows.
    col: i32, the first column, a multiple of 8.
  """
  (T, D), (rows, cols) = tokens.shape, tile.shape
  in_tile = plgpu.RefType(chip.swizzled(tokens.dtype, 64))
  number = plgpu.Layout.WG_SPLAT(())

  @plgpu.inline_mgpu(
    arg_types=(plgpu.RefType(), plgpu.RefType(), in_tile, number, number)
  )
  def copies(ctx, tokens, token_R, tile, first, col):
    del ctx
    _issue(tokens, token_R, tile, first, col, T, D, rows, cols)

  start: Any = copies  # the decorator hands the context in
  start(tokens, token_R, tile, jnp.int32(first), jnp.int32(col))


def arrived(behind: int) -> None:
  """Waits until all groups but the last ones are in shared memory, for all threads."""

  @plgpu.inline_mgpu()
  def wait(ctx):
    del ctx
    _asm(f"cp.async.wait_group {behind};")

  waiting: Any = wait  # the decorator hands the context in
  waiting()
  plgpu.commit_smem()


def _issue(tokens, token_R, tile, first, col, T, D, rows, cols):
  """What one thread does: its chunk of every so many rows."""
  from jax.experimental.mosaic import gpu as mgpu
  from jax.experimental.mosaic.gpu.utils import memref_ptr
  from jaxlib.mlir import ir
  from jaxlib.mlir.dialects import arith, llvm

  i32, i64 = (ir.IntegerType.get_signless(bits) for bits in (32, 64))

  def number(value, kind=i32):
    return arith.constant(kind, ir.IntegerAttr.get(kind, value))

  def wide(value):
    return arith.extsi(i64, value)

  first, col = (a.registers.item() for a in (first, col))
  source, index = (llvm.ptrtoint(i64, memref_ptr(ref)) for ref in (tokens, token_R))
  target = llvm.ptrtoint(i32, memref_ptr(tile))
  me = arith.andi(mgpu.thread_idx(), number(_THREADS - 1))
  across = cols * 2 // _CHUNK  # threads side by side of a row
  apart = _THREADS // across  # rows that are copied at a time
  chunk, row = arith.remui(me, number(across)), arith.divui(me, number(across))
  # 64 columns are one block of the tile; eight of its rows are 1024 bytes.
  block, within = arith.shrui(chunk, number(3)), arith.andi(chunk, number(7))
  at = arith.addi(col, arith.shli(chunk, number(3)))
  begin = arith.addi(index, arith.shli(wide(arith.addi(first, row)), number(2, i64)))
  found = [
    _asm(
      "ld.global.nc.s32 $0, [$1];",
      arith.addi(begin, number(4 * apart * n, i64)),
      result=i32,
      effects=False,
    )
    for n in range(rows // apart)
  ]
  for n, t in enumerate(found):
    r = arith.addi(row, number(apart * n))
    there = arith.cmpi(arith.CmpIPredicate.ult, t, number(T))
    size = arith.select(there, number(_CHUNK), number(0))
    t = arith.select(there, t, number(0))
    offset = arith.addi(arith.muli(wide(t), number(D, i64)), wide(at))
    low = arith.andi(r, number(7))
    eight = arith.addi(arith.muli(arith.shrui(r, number(3)), number(cols // 64)), block)
    place = arith.addi(
      arith.addi(arith.shli(eight, number(10)), arith.shli(low, number(7))),
      arith.shli(arith.xori(within, low), number(4)),
    )
    _asm(
      f"cp.async.cg.shared.global [$0], [$1], {_CHUNK}, $2;",
      arith.addi(target, place),
      arith.addi(source, arith.shli(offset, number(1, i64))),
      size,
    )
  _asm("cp.async.commit_group;")


def _asm(text: str, *operands: Any, result: Any = None, effects: bool = True) -> Any:
  """One PTX instruction; of registers as wide as the operands."""
  from jaxlib.mlir import ir
  from jaxlib.mlir.dialects import llvm

  def register(kind):
    return "l" if str(kind) == "i64" else "r"

  constraints = [f"={register(result)}"] if result is not None else []
  constraints += [register(value.type) for value in operands]
  kind = result if result is not None else ir.Type.parse("!llvm.void")
  return llvm.inline_asm(
    kind,
    list(operands),
    text,
    ",".join(constraints),
    has_side_effects=effects,
    asm_dialect=0,
  )
