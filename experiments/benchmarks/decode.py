"""The layer with few tokens, as in decoding, against reading its experts once.

  python -m experiments.benchmarks.decode --shape qwen3
  python -m experiments.benchmarks.decode --shape qwen3 --queued

With few tokens a layer takes as long as the matrices of the experts that were chosen
take to be read.  The bound is their bytes over the rate at which this device copies,
measured here; the target is 1.5 times the bound and 40 microseconds.  Every call has
other tokens and choices than the one before, so that no cache holds its matrices.

The time is that of the operations on the device, from a trace, without the gaps between
them; `--queued` times many calls in a row instead, gaps and all, with the command
buffers that XLA makes by itself and a trace cannot look into.  Every token of every
call is compared with float32.

Exit codes: 0 done, 2 bad arguments, 3 a result was wrong.
"""
# SPDX-License-Identifier: Apache-2.0

import argparse
import dataclasses
import functools
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import numpy as np

from experiments.benchmarks import shapes, tracing
from experiments.parser import Parser

TOKENS = (1, 8, 64, 256)
DRAWS = 8  # batches of tokens with choices of their own
_FACTOR, _EXTRA = 1.5, 40e-6  # of the target: times the bound, and seconds
_WRONG = 2e-2  # relative error of bfloat16 that is no rounding


def main(argv: list[str] | None = None) -> int:
  """Runs a command line; returns its exit code."""
  parser = Parser(
    prog="python -m experiments.benchmarks.decode",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  add = parser.add_argument
  add("--shape", required=True, choices=sorted(shapes.SHAPES), metavar="NAME")
  add("--tokens", type=int, nargs="+", default=TOKENS, metavar="T")
  add("--rounds", type=int, default=5)
  add("--queued", action="store_true", help="calls in a row instead of a trace")
  add("--table", type=int, default=0, metavar="N", help="operations to list")
  add("--out", type=Path, help="JSON file for the figures")
  arguments = parser.parse_args(argv)
  if min(arguments.tokens) < 1:
    parser.error(f"--tokens {min(arguments.tokens)} is less than one token")
  if not arguments.queued:
    tracing.prepare()
  import jax

  from experiments.benchmarks.peers import ours

  shape = shapes.SHAPES[arguments.shape]
  # Only an accelerator's trace has a device's operations.
  queued = arguments.queued or jax.default_backend() == "cpu"
  params = ours.operands(dataclasses.replace(shape, tokens=1))[0]
  rate = bandwidth()
  print(f"{rate / 1e12:.2f} TB/s copied; {'calls in a row' if queued else 'traced'}")
  found = [
    _measured(shape, n, params, rate, arguments, queued) for n in arguments.tokens
  ]
  result = {
    "shape": arguments.shape,
    "command": f"python -m experiments.benchmarks.decode --shape {arguments.shape}"
    + " --queued" * arguments.queued,
    "device": jax.devices()[0].device_kind,
    "jax": jax.__version__,
    "queued": queued,
    "bytes_per_second": rate,
    "rows": found,
  }
  if arguments.out:
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=2) + "\n")
  wrong = [str(row["tokens"]) for row in found if not row["error"] < _WRONG]
  if wrong:
    print(f"error: wrong result of {', '.join(wrong)} tokens", file=sys.stderr)
    return 3
  return 0


def bandwidth(size: int | None = None) -> float:
  """Bytes a second, read and written, that copying a large array moves.

  The faster of a copy by the driver and one by a kernel, so that the bound is strict.
  """
  import jax
  import jax.numpy as jnp

  if size is None:
    size = 1 << 24 if jax.default_backend() == "cpu" else 1 << 31
  x = jax.random.bits(jax.random.key(0), (size // 4,), jnp.uint32)
  best = 0.0
  for function in (jnp.copy, jnp.invert):
    copied = jax.jit(function)
    times = shapes.seconds(lambda: copied(x), repeats=5, inner=5)  # noqa: B023
    best = max(best, 2 * x.nbytes / statistics.median(times))
  return best


def touched(shape: shapes.Shape, expert_TK: Any) -> tuple[int, int]:
  """Experts that some token chose, and the bytes of their bfloat16 matrices."""
  count = len(np.unique(expert_TK))
  return count, count * 3 * shape.d_model * shape.d_ff * 2


def target(num_bytes: float, rate: float) -> float:
  """Seconds in which a layer that reads so many bytes should be done."""
  return _FACTOR * num_bytes / rate + _EXTRA


def _measured(
  shape: shapes.Shape,
  tokens: int,
  params: Any,
  rate: float,
  arguments: argparse.Namespace,
  queued: bool,
) -> dict[str, Any]:
  """One number of tokens: its figures, printed too."""
  import jax

  from experiments.benchmarks.peers import ours

  small = dataclasses.replace(shape, tokens=tokens)
  batches, read, counts = [], [], []
  for draw in range(DRAWS):
    expert_TK, weight_TK = shapes.routing(small, seed=draw)
    count, num_bytes = touched(small, expert_TK)
    counts.append(count)
    read.append(num_bytes)
    key = jax.random.key(draw)
    x_TD = jax.random.normal(key, (tokens, shape.d_model), jax.numpy.bfloat16)
    batches.append(jax.device_put((x_TD, weight_TK, expert_TK)))
  layer = jax.jit(ours.layer(small)).lower(params, *batches[0]).compile()

  def run():
    return [layer(params, *batch) for batch in batches]

  error = max(
    float(_gap(layer(params, *batch), _exact()(params, *batch))) for batch in batches
  )
  jax.block_until_ready(run())
  if queued:
    times = shapes.seconds(run, repeats=arguments.rounds, inner=10)
  else:
    times = [tracing.spent(run) / 1e3 for _ in range(arguments.rounds)]
  times = [t / DRAWS for t in times]
  bound, took = statistics.mean(read) / rate, statistics.median(times)
  wanted = target(statistics.mean(read), rate)
  figures = {
    "tokens": tokens,
    "experts": statistics.mean(counts),
    "bytes": statistics.mean(read),
    "bound_us": 1e6 * bound,
    "target_us": 1e6 * wanted,
    "us": 1e6 * took,
    "us_all": [1e6 * t for t in times],
    "of_bound": took / bound,
    "of_target": took / wanted,
    "error": error,
  }
  print(
    f"{tokens:5} tokens, {figures['experts']:6.1f} experts, "
    f"{figures['bytes'] / 1e6:8.1f} MB: {figures['us']:9.1f} us, "
    f"{figures['of_bound']:6.2f} of the bound {figures['bound_us']:.1f}, "
    f"{figures['of_target']:6.2f} of the target {figures['target_us']:.1f}; "
    f"error {error:.4f}",
    flush=True,
  )
  if arguments.table and not queued:
    operands = (params, *batches[0])
    figures["table"] = tracing.shown(layer, operands, arguments.table)
  return figures


@functools.cache
def _exact() -> Any:
  """(params, x_TD, weight_TK, expert_TK) -> y_TD in float32, expert by expert.

  So that the matrices of one expert are widened at a time.
  """
  import jax
  import jax.numpy as jnp

  def whole(params, x_TD, weight_TK, expert_TK):
    x_TD = x_TD.astype(jnp.float32)

    def one(y_TD, expert):
      index, (gate, up, down) = expert
      weight_T = jnp.sum(jnp.where(expert_TK == index, weight_TK, 0), axis=1)
      gate, up, down = (m.astype(jnp.float32) for m in (gate, up, down))
      with jax.default_matmul_precision("highest"):
        y = (jax.nn.silu(x_TD @ gate) * (x_TD @ up)) @ down
      return y_TD + weight_T[:, None] * y, None

    matrices = [params[name] for name in ("gate_EDF", "up_EDF", "down_EFD")]
    experts = jnp.arange(len(matrices[0])), matrices
    return jax.lax.scan(one, jnp.zeros_like(x_TD), experts)[0]

  return jax.jit(whole)


def _gap(found: Any, expected: Any) -> Any:
  """The largest relative error of a token."""
  import jax.numpy as jnp

  norm = lambda rows: jnp.linalg.norm(rows, axis=1)  # noqa: E731
  return jnp.max(norm(found.astype(jnp.float32) - expected) / norm(expected))


if __name__ == "__main__":
  sys.exit(main())
