"""A layer in the manner of ScatterMoE (arXiv:2403.08245), which no registry carries.

As there, rows are not copied into groups: a Triton kernel reads them where they are, by
the order of their experts, multiplies blocks that belong to one expert, and writes them
grouped or where they came from.  The kernels are written here, after the paper, so that
the row says what the method does and not what its authors' code does.
"""
# SPDX-License-Identifier: Apache-2.0

import importlib.util
from typing import Any

import torch  # pyright: ignore[reportMissingImports]
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]

from experiments.benchmarks.peers.torch_rows import Layer, Operands

BLOCK = 128  # rows of a block


def missing(_: str) -> str | None:
  """Why it cannot run here; None: it can."""
  if importlib.util.find_spec("triton") is None:
    return "triton is not installed"
  return None if torch.cuda.is_available() else "needs a GPU"


@triton.jit
def _to_rows(
  x,
  w,
  y,
  order,
  expert_B,
  first_B,
  end_E,
  num_experts,
  depth,
  width,
  w_expert,
  w_depth,
  w_width,
  FAN: tl.constexpr,
  GATHER: tl.constexpr,
  SCATTER: tl.constexpr,
  ROWS: tl.constexpr,
  COLS: tl.constexpr,
  STEP: tl.constexpr,
):
  """A block of rows of one expert times some columns of its matrix."""
  num_cols = tl.cdiv(width, COLS)
  block = tl.program_id(0) // num_cols
  col = (tl.program_id(0) % num_cols) * COLS + tl.arange(0, COLS)
  expert = tl.load(expert_B + block)
  if expert >= num_experts:
    return
  row = tl.load(first_B + block) + tl.arange(0, ROWS)
  live = row < tl.load(end_E + expert)
  choice = tl.load(order + row, mask=live, other=0)
  source = choice // FAN if GATHER else row
  target = choice if SCATTER else row
  matrix = w + expert.to(tl.int64) * w_expert
  total = tl.zeros((ROWS, COLS), tl.float32)
  for begin in range(0, depth, STEP):
    k = begin + tl.arange(0, STEP)
    a = tl.load(
      x + source.to(tl.int64)[:, None] * depth + k[None, :],
      mask=live[:, None] & (k[None, :] < depth),
      other=0.0,
    )
    b = tl.load(
      matrix + k[:, None] * w_depth + col[None, :] * w_width,
      mask=(k[:, None] < depth) & (col[None, :] < width),
      other=0.0,
    )
    total += tl.dot(a, b)
  tl.store(
    y + target.to(tl.int64)[:, None] * width + col[None, :],
    total.to(y.dtype.element_ty),
    mask=live[:, None] & (col[None, :] < width),
  )


@triton.jit
def _to_matrices(
  x,
  y,
  w,
  end_E,
  depth,
  width,
  ROWS: tl.constexpr,
  COLS: tl.constexpr,
  STEP: tl.constexpr,
):
  """A tile of an expert's matrix of sums over its rows of x and y, both grouped."""
  num_cols, num_rows = tl.cdiv(width, COLS), tl.cdiv(depth, ROWS)
  place = tl.program_id(0)
  expert = place // (num_rows * num_cols)
  row = (place // num_cols % num_rows) * ROWS + tl.arange(0, ROWS)
  col = (place % num_cols) * COLS + tl.arange(0, COLS)
  begin = tl.load(end_E + expert - 1, mask=expert > 0, other=0)
  end = tl.load(end_E + expert)
  total = tl.zeros((ROWS, COLS), tl.float32)
  for first in range(begin, end, STEP):
    n = first + tl.arange(0, STEP)
    a = tl.load(
      x + n.to(tl.int64)[None, :] * depth + row[:, None],
      mask=(n[None, :] < end) & (row[:, None] < depth),
      other=0.0,
    )
    b = tl.load(
      y + n.to(tl.int64)[:, None] * width + col[None, :],
      mask=(n[:, None] < end) & (col[None, :] < width),
      other=0.0,
    )
    total += tl.dot(a, b)
  tl.store(
    w + expert.to(tl.int64) * depth * width + row[:, None] * width + col[None, :],
    total.to(w.dtype.element_ty),
    mask=(row[:, None] < depth) & (col[None, :] < width),
  )


def _tiles() -> list[Any]:
  return [
    triton.Config({"COLS": cols, "STEP": step}, num_warps=warps, num_stages=n)
    for cols, step, warps, n in ((128, 32, 4, 4), (128, 64, 8, 3), (256, 64, 8, 3))
  ]


if torch.cuda.is_available():
  _to_rows = triton.autotune(_tiles(), key=["depth", "width", "GATHER"])(_to_rows)
  _to_matrices = triton.autotune(_tiles(), key=["depth", "width"])(_to_matrices)
  _TILE: dict[str, int] = {}
else:  # interpreted
  _TILE = {"COLS": 32, "STEP": 32}


class Order:
  """The choices by expert, and the blocks of rows that they make."""

  def __init__(self, expert_TK: Any, num_experts: int, block: int = BLOCK):
    sorted_N, order_N = torch.sort(expert_TK.reshape(-1), stable=True)
    each_E = torch.arange(num_experts, device=order_N.device)
    end_E = torch.searchsorted(sorted_N, each_E, right=True)
    size_E = torch.diff(end_E, prepend=end_E.new_zeros(1))
    blocks_E = (size_E + block - 1) // block
    last_E = torch.cumsum(blocks_E, 0)
    self.num_blocks = -(-order_N.numel() // block) + num_experts
    place_B = torch.arange(self.num_blocks, device=order_N.device)
    expert_B = torch.searchsorted(last_E, place_B, right=True)
    known_B = expert_B.clamp(max=num_experts - 1)
    within_B = place_B - (last_E - blocks_E)[known_B]
    first_B = (end_E - size_E)[known_B] + within_B * block
    self.order, self.end, self.block = order_N.int(), end_E.int(), block
    self.expert_B, self.first_B = expert_B.int(), first_B.int()

  def rows(self, x: Any, w: Any, *, fan: int, gather: bool, scatter: bool) -> Any:
    """x [., depth] times w [E, depth, width], by the expert of each choice."""
    E, depth, width = w.shape
    y = x.new_empty(self.order.numel(), width)

    def grid(tile):
      return (self.num_blocks * triton.cdiv(width, tile["COLS"]),)

    kernel: Any = _to_rows
    kernel[grid](
      *(x, w, y, self.order, self.expert_B, self.first_B, self.end),
      *(E, depth, width, *w.stride()),
      FAN=fan,
      GATHER=gather,
      SCATTER=scatter,
      ROWS=self.block,
      **_TILE,
    )
    return y

  def matrices(self, x: Any, y: Any) -> Any:
    """[E, depth, width] from grouped x [N, depth] and y [N, width]."""
    E, depth, width = self.end.numel(), x.shape[1], y.shape[1]
    w = x.new_empty(E, depth, width)
    block = min(self.block, 128)

    def grid(tile):
      return (E * triton.cdiv(depth, block) * triton.cdiv(width, tile["COLS"]),)

    kernel: Any = _to_matrices
    kernel[grid](x, y, w, self.end, depth, width, ROWS=block, **_TILE)
    return w


class _Up(torch.autograd.Function):
  """Tokens in their own order to grouped rows."""

  @staticmethod
  def forward(ctx, x_TD, w_EDN, order, k):
    ctx.save_for_backward(x_TD, w_EDN)
    ctx.order, ctx.k = order, k
    return order.rows(x_TD, w_EDN, fan=k, gather=True, scatter=False)

  @staticmethod
  def backward(ctx, *grads):
    x_TD, w_EDN = ctx.saved_tensors
    (grad,) = grads
    grad = grad.contiguous()
    dx = ctx.order.rows(grad, w_EDN.transpose(1, 2), fan=1, gather=False, scatter=True)
    x_ND = x_TD[ctx.order.order.long() // ctx.k]
    dw = ctx.order.matrices(grad, x_ND).transpose(1, 2)
    return dx.view(-1, ctx.k, x_TD.shape[1]).sum(1), dw, None, None


class _Down(torch.autograd.Function):
  """Grouped rows to sums over each token's choices, by their weights."""

  @staticmethod
  def forward(ctx, h_NF, w_EFD, weight_TK, order):
    T, K = weight_TK.shape
    y_ND = order.rows(h_NF, w_EFD, fan=1, gather=False, scatter=True)
    y_TKD = y_ND.view(T, K, -1)
    ctx.save_for_backward(h_NF, w_EFD, weight_TK, y_TKD)
    ctx.order = order
    return torch.bmm(weight_TK[:, None].to(y_TKD.dtype), y_TKD)[:, 0]

  @staticmethod
  def backward(ctx, *grads):
    h_NF, w_EFD, weight_TK, y_TKD = ctx.saved_tensors
    (grad_TD,) = grads
    dweight = torch.bmm(y_TKD, grad_TD[..., None])[..., 0].to(weight_TK.dtype)
    order = ctx.order.order.long()
    weight_N = weight_TK.reshape(-1)[order].to(grad_TD.dtype)
    grad_ND = grad_TD[order // weight_TK.shape[1]] * weight_N[:, None]
    dh = ctx.order.rows(
      grad_ND, w_EFD.transpose(1, 2), fan=1, gather=False, scatter=False
    )
    dw = ctx.order.matrices(grad_ND, h_NF).transpose(1, 2)
    return dh, dw, dweight, None


def layer(given: Operands, block: int = BLOCK) -> Layer:
  shape = given.shape

  def call(x_TD, up_END, down_EDF, weight_TK):
    order = Order(given.expert_TK, shape.num_experts, block)
    both = _Up.apply(x_TD, up_END.transpose(1, 2), order, shape.k)
    gate, up = both.chunk(2, dim=-1)
    hidden = torch.nn.functional.silu(gate) * up
    return _Down.apply(hidden, down_EDF.transpose(1, 2), weight_TK, order)

  return Layer(call)


LAYERS = {"scattermoe-style": layer}
