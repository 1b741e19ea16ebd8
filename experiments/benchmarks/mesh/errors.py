"""How far a step over several devices is from float32, on what can be recomputed.

Four tokens' outputs and gradients, and the gradient of one expert's last matrix, which
is a sum over the tokens of all devices.  It is one program, compiled beside the step: a
hundred small ones took longer than all that is timed.
"""
# SPDX-License-Identifier: Apache-2.0

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from experiments.benchmarks.mesh.layer import Operands
from experiments.benchmarks.peers import rows
from experiments.benchmarks.peers.jax_rows import NAMES, exact, relative

_MULTIPLE = 1024  # of tokens of the last expert, so that routings share a program


class Check(NamedTuple):
  """A program that compares a step's results.

  Args:
    program: from `compiled`.
    given: the operands of the step.
    room: tokens of the last expert that it takes.
  """

  program: Any
  given: Operands
  room: int

  def __call__(
    self, arguments: tuple[Any, ...], results: Any, routing: str
  ) -> dict[str, Any]:
    """Relative errors, and the share that was dropped, of arguments with a routing."""
    own = _of_last(self.given, routing, self.room)
    found = jax.device_get(self.program(arguments, results, own))
    names = "error", "gradient_error", "matrix_error", "dropped"
    return dict(zip(names, map(float, found), strict=True))


def compiled(given: Operands, routings: Sequence[str], results: Any) -> Check:
  """The check of a step.

  Args:
    given: the operands of the step.
    routings: with which it runs.
    results: shapes and shardings of what the step gives.
  """
  most = max(len(_tokens_of_last(given, kind)[0]) for kind in routings)
  room = -(-most // _MULTIPLE) * _MULTIPLE
  own = jax.eval_shape(lambda: _of_last(given, routings[0], room))
  return Check(jax.jit(_gaps).lower(given.like, results, own).compile(), given, room)


def _of_last(given: Operands, routing: str, room: int) -> tuple[Any, Any]:
  """(i32[N], f32[N]) tokens that the last expert takes and their weights, and zeros."""
  token_n, weight_n = _tokens_of_last(given, routing)
  more = (0, room - len(token_n))
  return np.pad(token_n.astype(np.int32), more), np.pad(weight_n, more)


def _tokens_of_last(given: Operands, routing: str) -> tuple[np.ndarray, np.ndarray]:
  weight_TK, expert_TK = map(np.asarray, given.routed(routing))
  token_n, choice_n = np.nonzero(expert_TK == given.shape.num_experts - 1)
  return token_n, weight_TK[token_n, choice_n].astype(np.float32)


def _gaps(arguments: Any, results: Any, own: tuple[Array, Array]) -> tuple[Array, ...]:
  params, x_TD, weight_TK, dy_TD, expert_TK = arguments
  y_TD, dropped, (d_params, dx_TD, dweight_TK) = results
  gate_EDF = params[NAMES[0]]
  at = np.array(rows.tokens_of(x_TD.shape[0]))

  def expected(one: tuple[Array, ...]) -> Any:
    x_D, weight_K, dy_D, expert_K = one
    return exact(x_D, weight_K, [params[name][expert_K] for name in NAMES], dy_D)

  exactly = lax.map(expected, (x_TD[at], weight_TK[at], dy_TD[at], expert_TK[at]))
  found = y_TD[at], dx_TD[at], dweight_TK[at]
  y, dx, dweight = map(relative, found, exactly)
  token_N, weight_N = own
  gate_DF, up_DF = (params[name][gate_EDF.shape[0] - 1] for name in NAMES[:2])
  last_FD = _down(x_TD[token_N], weight_N, dy_TD[token_N], gate_DF, up_DF)
  matrix = relative(d_params[NAMES[2]][gate_EDF.shape[0] - 1], last_FD)
  return y, jnp.maximum(dx, dweight), matrix, jnp.mean(dropped)


def _down(x_ND, weight_N, dy_ND, gate_DF, up_DF) -> Array:
  """f32[F,D] the gradient of an expert's last matrix."""
  x_ND, dy_ND, gate_DF, up_DF = (
    a.astype(jnp.float32) for a in (x_ND, dy_ND, gate_DF, up_DF)
  )
  with jax.default_matmul_precision("highest"):
    hidden_NF = jax.nn.silu(x_ND @ gate_DF) * (x_ND @ up_DF)
    return hidden_NF.T @ (dy_ND * weight_N[:, None])
