"""A layer in PyTorch as a row; only the process that serves such rows imports this."""
# SPDX-License-Identifier: Apache-2.0

import dataclasses
import functools
import gc
import time
from collections.abc import Callable
from typing import Any

import torch  # pyright: ignore[reportMissingImports]

from experiments.benchmarks.peers import rows
from experiments.benchmarks.shapes import Shape, routing


@dataclasses.dataclass
class Operands:
  """Leaves of the gradient, and the choices; all implementations share them."""

  shape: Shape
  x_TD: Any
  up_END: Any  # N = 2F: gate and up, one after the other or in turns
  down_EDF: Any
  weight_TK: Any
  expert_TK: Any  # i64
  dy_TD: Any

  @property
  def leaves(self) -> tuple[Any, ...]:
    return self.x_TD, self.up_END, self.down_EDF, self.weight_TK


def device() -> str:
  return "cuda" if torch.cuda.is_available() else "cpu"


@functools.lru_cache(maxsize=1)
def operands(shape: Shape) -> Operands:
  """Random bfloat16, scaled as jax's are; routing that is the same."""
  made = torch.Generator(device()).manual_seed(0)

  def normal(*size, scale=1.0):
    drawn = torch.randn(size, generator=made, device=device(), dtype=torch.bfloat16)
    return drawn.mul_(scale)

  D, F, E = shape.d_model, shape.d_ff, shape.num_experts
  expert_TK, weight_TK = (torch.as_tensor(a).to(device()) for a in routing(shape))
  given = Operands(
    shape,
    normal(shape.tokens, D),
    normal(E, 2 * F, D, scale=D**-0.5),
    normal(E, D, F, scale=F**-0.5),
    weight_TK,
    expert_TK.long(),
    normal(shape.tokens, D),
  )
  for leaf in given.leaves:
    leaf.requires_grad_()
  return given


@dataclasses.dataclass(frozen=True)
class Layer:
  """An implementation: `call(x_TD, up_END, down_EDF, weight_TK) -> y_TD`.

  Args:
    call: forward, differentiable.
    in_turns: rows of `up_END` are gate, up, gate, up.
  """

  call: Callable[..., Any]
  in_turns: bool = False


def row(name: str, made: Callable[[Operands], Layer], shape: Shape) -> rows.Row:
  """Compiled, compared with float32, its memory known.

  Raises:
    Exception: whatever an implementation that does not work here raises.
  """
  given = operands(shape)
  layer = made(given)

  def forward():
    with torch.no_grad():
      return layer.call(*given.leaves)

  def step():
    y = layer.call(*given.leaves)
    return y, torch.autograd.grad(y, given.leaves, given.dy_TD)

  calls = {"forward": forward, "step": step}
  figures: dict[str, Any] = {}
  for kind, call in calls.items():
    begin = time.perf_counter()
    wait(call())
    figures[f"{kind}_compile_s"] = time.perf_counter() - begin
    figures[f"{kind}_gb"] = _peak(call) / 1e9
  y_TD, (dx_TD, _, _, dweight_TK) = step()
  figures |= _errors(given, layer, y_TD.detach(), dx_TD, dweight_TK)
  del y_TD, dx_TD, dweight_TK
  released()

  def timed(kind: str, budget: float) -> float:
    took = rows.span(calls[kind], wait, budget)
    released()  # the other rows' processes share the device's memory
    return took

  return rows.Row(name, timed, figures)


def wait(_: Any = None) -> None:
  if torch.cuda.is_available():
    torch.cuda.synchronize()


def released() -> None:
  gc.collect()
  if torch.cuda.is_available():
    torch.cuda.empty_cache()


def _peak(call: Callable[[], Any]) -> float:
  """Bytes allocated at once in a call, operands among them."""
  if not torch.cuda.is_available():
    return 0.0  # not counted
  released()
  torch.cuda.reset_peak_memory_stats()
  wait(call())
  return float(torch.cuda.max_memory_allocated())


def _errors(
  given: Operands, layer: Layer, y_TD: Any, dx_TD: Any, dweight_TK: Any
) -> dict[str, float]:
  """Of some tokens: the output, and the gradients of inputs and routing weights."""
  worst = [0.0, 0.0]
  for t in rows.tokens(given.shape):
    x_D = given.x_TD[t].detach().float().requires_grad_()
    weight_K = given.weight_TK[t].detach().clone().requires_grad_()
    chosen = given.expert_TK[t]
    up_KND = given.up_END[chosen].detach().float()
    down_KDF = given.down_EDF[chosen].detach().float()
    F = down_KDF.shape[2]
    both_KN = torch.einsum("knd,d->kn", up_KND, x_D)
    if layer.in_turns:
      gate_KF, up_KF = both_KN[:, 0::2], both_KN[:, 1::2]
    else:
      gate_KF, up_KF = both_KN[:, :F], both_KN[:, F:]
    hidden_KF = torch.nn.functional.silu(gate_KF) * up_KF
    y_D = torch.einsum("k,kdf,kf->d", weight_K, down_KDF, hidden_KF)
    expected = (
      y_D,
      *torch.autograd.grad(y_D, (x_D, weight_K), given.dy_TD[t].float()),
    )
    found = (y_TD[t], dx_TD[t], dweight_TK[t])
    gaps = [_gap(one, other) for one, other in zip(found, expected, strict=True)]
    worst = [max(worst[0], gaps[0]), max(worst[1], *gaps[1:])]
  return {"error": worst[0], "gradient_error": worst[1]}


def _gap(found: Any, expected: Any) -> float:
  gap = torch.linalg.vector_norm(found.float() - expected.detach())
  return float(gap / torch.linalg.vector_norm(expected.detach()))
