"""The gate's product by itself: float32's own units beside bfloat16 parts.

For `benchmarks.front`: time, launches, and errors against float64, of bfloat16 tokens
and a float32 matrix, forward and with both gradients.
"""
# SPDX-License-Identifier: Apache-2.0

import argparse
import statistics
from typing import Any

from experiments.benchmarks import parts, tracing

_SAMPLE = 64  # tokens, and features, that are computed again in float64


def rows(arguments: argparse.Namespace, here: Any) -> list[dict[str, Any]]:
  """A row of each way, forward and with gradients.

  Args:
    arguments: `tokens`, `d_model`, `experts` and `rounds` are read.
    here: a sharding of a described GPU, for which launches are counted; None: here.
  """
  import jax

  given = jax.eval_shape(lambda: _operands(arguments))
  if here is None:
    given = jax.jit(lambda: _operands(arguments))()
  else:
    given = jax.tree.map(
      lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=here), given
    )
  found = []
  for name, product in _ways().items():
    for kind, function in _functions(product).items():
      call: Any = jax.jit(function).lower(*given).compile()
      row: dict[str, Any] = {"name": name, "kind": kind, "ms": None, "errors": None}
      row["launches"] = len(parts.operations(call.as_text()))
      if here is None:
        row["errors"] = _errors(given, call(*given))
        if jax.default_backend() != "cpu":  # only an accelerator's trace has operations
          rounds = [tracing.measured(call, given) for _ in range(arguments.rounds)]
          times = [sum(ms for ms, _ in one.values()) for one in rounds]
          row["ms"], row["ms_all"] = statistics.median(times), times
      found.append(row)
  return found


def show(row: dict[str, Any]) -> None:
  """Prints a row."""
  took = "" if row["ms"] is None else f"{row['ms']:9.3f} ms"
  wrong = ", ".join(f"{n} {e:.1e}" for n, e in (row["errors"] or {}).items())
  print(
    f"gate alone, {row['name']}, {row['kind']}: {row['launches']} launches{took}"
    + (f", relative errors: {wrong}" if wrong else ""),
    flush=True,
  )


def _operands(arguments: argparse.Namespace) -> tuple[Any, Any, Any]:
  import jax
  import jax.numpy as jnp

  keys = jax.random.split(jax.random.key(0), 3)
  T, D, E = arguments.tokens, arguments.d_model, arguments.experts
  x_TD = jax.random.normal(keys[0], (T, D), jnp.bfloat16)
  w_DE = D**-0.5 * jax.random.normal(keys[1], (D, E), jnp.float32)
  return x_TD, w_DE, jax.random.normal(keys[2], (T, E), jnp.float32)


def _ways() -> dict[str, Any]:
  import jax
  import jax.numpy as jnp

  from jmoe.kernels.split_product import split_product

  def highest(x_TD, w_DE):
    precision = jax.lax.Precision.HIGHEST
    return jnp.einsum("TD,DE->TE", x_TD.astype(jnp.float32), w_DE, precision=precision)

  return {
    "float32, highest precision": highest,
    "bfloat16 parts": lambda x_TD, w_DE: split_product("TD,DE->TE", x_TD, w_DE),
  }


def _functions(product: Any) -> dict[str, Any]:
  import jax

  def forward(x_TD, w_DE, g_TE):
    del g_TE
    return (product(x_TD, w_DE),)

  def step(x_TD, w_DE, g_TE):
    y_TE, pull = jax.vjp(product, x_TD, w_DE)
    return y_TE, *pull(g_TE)

  return {"forward": forward, "step": step}


def _errors(given: Any, results: Any) -> dict[str, float]:
  """Of the norm, over a sample; the tokens' gradient is in bfloat16."""
  import numpy as np

  x_TD, w_DE, g_TE = given
  wide = lambda a: np.asarray(a).astype(np.float64)  # noqa: E731
  t, d = (np.unique(np.linspace(0, n - 1, _SAMPLE).astype(int)) for n in x_TD.shape)
  expected = {
    "logits": wide(x_TD[t]) @ wide(w_DE),
    "d tokens": wide(g_TE[t]) @ wide(w_DE).T,
    "d matrix": wide(x_TD[:, d]).T @ wide(g_TE),
  }
  picked = (t, t, d)
  return {
    name: float(np.linalg.norm(wide(a[at]) - expected[name]))
    / float(np.linalg.norm(expected[name]))
    for name, a, at in zip(expected, results, picked, strict=False)
  }
