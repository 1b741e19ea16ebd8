"""A layer in jax as a row: compiled, compared with float32, timed in this process."""
# SPDX-License-Identifier: Apache-2.0

import functools
import time
from typing import Any

import jax
import jax.numpy as jnp

from experiments.benchmarks.peers import ours, rows
from experiments.benchmarks.shapes import Shape, routing

NAMES = ("gate_EDF", "up_EDF", "down_EFD")


def row(name: str, layer: Any, shape: Shape) -> rows.Row | rows.Missing:
  """A row, if it works here.

  Args:
    name: of the row.
    layer: shape -> `call(params, x_TD, weight_TK, expert_TK) -> y_TD`.
    shape: of the layer.
  """
  try:
    return _row(name, layer(shape), shape)
  except Exception as error:  # of somebody else's code: any
    return rows.Missing(name, rows.reason(error))


def _row(name: str, call: Any, shape: Shape) -> rows.Row | rows.Missing:
  params, x_TD = _operands(shape)
  expert_TK, weight_TK = (jnp.asarray(a) for a in routing(shape))
  dy_TD = jax.random.normal(jax.random.key(9), x_TD.shape, x_TD.dtype)

  def forward(params, x, weight):
    return call(params, x, weight, expert_TK)

  def step(params, x, weight, dy):
    y, pull = jax.vjp(forward, params, x, weight)
    # As in a model, where the gradient comes of the output; else XLA may do what makes
    # the output last, and hold on to what that needs.
    y, dy = jax.lax.optimization_barrier((y, dy))
    return y, pull(dy)

  figures: dict[str, Any] = {}
  traced = {}
  inputs = (params, x_TD, weight_TK)
  for kind, function, given in (
    ("forward", forward, inputs),
    ("step", step, (*inputs, dy_TD)),
  ):
    begin = time.perf_counter()
    compiled = jax.jit(function).lower(*given).compile()
    figures[f"{kind}_compile_s"] = time.perf_counter() - begin
    memory: Any = compiled.memory_analysis()
    needed = (
      memory.argument_size_in_bytes
      + memory.output_size_in_bytes
      + memory.temp_size_in_bytes
    )
    figures[f"{kind}_gb"] = needed / 1e9
    if needed > _memory():
      return rows.Missing(
        name, f"{kind} needs {needed / 1e9:.0f} GB of {_memory() / 1e9:.0f}"
      )
    traced[kind] = compiled, given
  y_TD, (_, dx_TD, dweight_TK) = traced["step"][0](*traced["step"][1])
  figures |= _errors(shape, y_TD, dx_TD, dweight_TK, dy_TD)

  def timed(kind: str, budget: float) -> float:
    compiled, given = traced[kind]
    return rows.span(lambda: compiled(*given), jax.block_until_ready, budget)

  return rows.Row(name, timed, figures, traced)


@functools.lru_cache(maxsize=1)
def _operands(shape: Shape) -> Any:
  return ours.operands(shape)


def _memory() -> float:
  """Bytes that a program may take on this device."""
  stats = jax.devices()[0].memory_stats() or {}
  return stats.get("bytes_limit", float("inf"))


def _errors(
  shape: Shape, y_TD: Any, dx_TD: Any, dweight_TK: Any, dy_TD: Any
) -> dict[str, float]:
  """Of some tokens: the output, and the gradients of inputs and routing weights."""
  params, x_TD = _operands(shape)
  expert_TK, weight_TK = routing(shape)
  worst = [0.0, 0.0]
  for t in rows.tokens(shape):
    matrices = [params[name][expert_TK[t]] for name in NAMES]
    expected = exact(x_TD[t], weight_TK[t], matrices, dy_TD[t])
    found = (y_TD[t], dx_TD[t], dweight_TK[t])
    gaps = [gap(one, other) for one, other in zip(found, expected, strict=True)]
    worst = [max(worst[0], gaps[0]), max(worst[1], *gaps[1:])]
  return {"error": worst[0], "gradient_error": worst[1]}


def gap(found: Any, expected: Any) -> float:
  return float(relative(found, expected))


def relative(found: Any, expected: Any) -> Any:
  """f32[] the norm of the difference over that of what is expected."""
  gap = jnp.linalg.norm(found.astype(jnp.float32) - expected)
  return gap / jnp.linalg.norm(expected)


@jax.jit
def exact(x_D: Any, weight_K: Any, matrices: Any, dy_D: Any) -> Any:
  """(y_D, dx_D, dweight_K) of a token in float32 at the highest precision."""
  gate_KDF, up_KDF, down_KFD = (m.astype(jnp.float32) for m in matrices)

  def layer(x_D, weight_K):
    with jax.default_matmul_precision("highest"):
      gate_KF, up_KF = (jnp.einsum("d,kdf->kf", x_D, m) for m in (gate_KDF, up_KDF))
      y_KD = jnp.einsum("kf,kfd->kd", jax.nn.silu(gate_KF) * up_KF, down_KFD)
      return weight_K @ y_KD

  y_D, pull = jax.vjp(layer, x_D.astype(jnp.float32), weight_K)
  return y_D, *pull(dy_D.astype(jnp.float32))
