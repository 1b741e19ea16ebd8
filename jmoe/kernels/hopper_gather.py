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

_CHUNK = 16  # bytes that a thread copies at a time
_THREADS = 128
_NUMBER: Any = plgpu.Layout.WG_SPLAT(())


def served() -> bool:
  """Whether kernels can be compiled with it; interpreted ones cannot have it."""
  return jax.__version_info__ >= (0, 10)


def signals(stages: int) -> Any:
  """Shared memory for a barrier of each slot, which the copies themselves arrive at.

  Pallas's own barriers cannot be told by copies of threads.
  """
  return plgpu.SMEM((2 * stages,), jnp.int32)


def prepare(signals: Any, stages: int) -> None:
  """Makes the barriers; by one warpgroup, before any other looks at them."""

  def make(ctx, signals):
    del ctx
    from jax.experimental.mosaic import gpu as mgpu

    with mgpu.single_thread(scope=mgpu.ThreadSubset.WARPGROUP):
      for slot in range(stages):
        _asm(f"mbarrier.init.shared.b64 [$0], {_THREADS};", _shared(signals, 8 * slot))

  _inline(make, plgpu.RefType())(signals)
  plgpu.commit_smem()


def fetch(
  tokens: Any, token_R: Any, tile: Any, signals: Any, slot: Any, *, first: Any, col: Any
) -> None:
  """Starts copies of `tokens[token_R[first + r], col + c]`, which tell when they end.

  Called by all threads of one warpgroup.  Where the token is past the end, zeros.

  Args:
    tokens: `[T,D]` of a 16-bit type in global memory; D a multiple of 64.
    token_R: i32[R] in global memory.
    tile: [rows, cols] in shared memory, `hopper.swizzled(dtype, 64)`.
    signals: from `signals`.
    slot: i32, whose barrier is told.
    first: i32, of the rows.
    col: i32, the first column, a multiple of 8.
  """
  (T, D), (rows, cols) = tokens.shape, tile.shape

  def copies(ctx, tokens, token_R, tile, signals, slot, first, col):
    del ctx
    slot, first, col = (a.registers.item() for a in (slot, first, col))
    _issue(tokens, token_R, tile, first, col, T, D, rows, cols)
    _asm("cp.async.mbarrier.arrive.noinc.shared.b64 [$0];", _shared(signals, slot=slot))

  refs = plgpu.RefType(), plgpu.RefType()
  in_tile = plgpu.RefType(chip.swizzled(tokens.dtype, 64))
  call = _inline(copies, *refs, in_tile, plgpu.RefType(), *[_NUMBER] * 3)
  call(tokens, token_R, tile, signals, *map(jnp.int32, (slot, first, col)))


def arrived(signals: Any, slot: Any, turn: Any) -> None:
  """Waits for the copies into a slot, the `turn`-th ones, and shows them to wgmma."""

  def wait(ctx, signals, slot, parity):
    del ctx
    slot, parity = slot.registers.item(), parity.registers.item()
    _asm(
      "{ .reg .pred done; again: "
      "mbarrier.try_wait.parity.shared::cta.b64 done, [$0], $1; "
      "@!done bra again; }",
      _shared(signals, slot=slot),
      parity,
    )
    _asm("fence.proxy.async.shared::cta;")

  call = _inline(wait, plgpu.RefType(), _NUMBER, _NUMBER)
  call(signals, jnp.int32(slot), jnp.int32(turn & 1))


def _inline(function: Any, *kinds: Any) -> Any:
  return plgpu.inline_mgpu(arg_types=kinds)(function)


def _shared(ref: Any, offset: int = 0, slot: Any = None) -> Any:
  """The address in shared memory of a barrier."""
  from jax.experimental.mosaic.gpu.utils import memref_ptr
  from jaxlib.mlir import ir
  from jaxlib.mlir.dialects import arith, llvm

  i32 = ir.IntegerType.get_signless(32)

  def number(value):
    return arith.constant(i32, ir.IntegerAttr.get(i32, value))

  address = llvm.ptrtoint(i32, memref_ptr(ref))
  if slot is not None:
    return arith.addi(address, arith.muli(slot, number(8)))
  return arith.addi(address, number(offset))


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
