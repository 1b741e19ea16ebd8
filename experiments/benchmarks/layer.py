"""Every dispatch against a dense feed-forward of equal FLOPs, on this machine.

  python -m experiments.benchmarks.layer
  python -m experiments.benchmarks.layer --tokens 4096 --experts 128 --k 8 --out FILE

Each row is the whole layer: gate, selection, assignment, experts, way home, losses; the
gradient is of everything learned and of the input.  The bound is a dense MLP over the
same tokens with `k * d_ff` hidden units.  Runs are interleaved, A B C A B C, and
ratios are formed within a round, so that a drifting machine cancels.  `ragged_dot` is
XLA's own product, dense on CPU and GPU, asked for by name.

Exit codes: 0 done, 2 bad arguments, 3 a result was wrong.
"""
# SPDX-License-Identifier: Apache-2.0

import argparse
import dataclasses
import json
import pathlib
import platform
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

import jmoe
from jmoe.kernels import grouped_matmul
from jmoe.use import use


@dataclasses.dataclass
class Row:
  """One implementation: a loss of (params, x) and what it holds in memory."""

  name: str
  apply: Callable[[Any, Array], Any]
  params: Any
  step: Any = None
  forward: Any = None
  times: dict[str, list[float]] = dataclasses.field(default_factory=dict)
  temp: dict[str, int] = dataclasses.field(default_factory=dict)


def rows_of(args: argparse.Namespace, key: Array) -> list[Row]:
  """The dense bound first, then every dispatch over the same parameters."""
  D, F, E, k = args.d_model, args.d_ff, args.experts, args.k
  dtype = jnp.dtype(args.dtype)
  experts = use(jmoe.experts.mlp, d_ff=F, activation=jax.nn.gelu)
  base = jmoe.MoEConfig(
    D,
    E,
    router=use(jmoe.routers.top_k, k=k),
    renormalise=use(jmoe.renormalise.before_dropping),
    experts=experts,
  )
  params = jmoe.moe_init(key, base)
  limited = dataclasses.replace(
    base,
    capacity=use(jmoe.capacity.by_factor, factor=args.capacity),
    dispatch=use(jmoe.dispatch.buckets),
  )
  asked = use(grouped_matmul, implementation="ragged_dot", allow_dense=True)
  configs = {
    "sort (dropless)": base,
    f"buckets ({args.capacity:g})": limited,
    f"einsum ({args.capacity:g})": dataclasses.replace(
      limited, dispatch=use(jmoe.dispatch.einsum), group_size=args.einsum_group
    ),
    "sort + ragged_dot": dataclasses.replace(
      base, experts=experts.replace(matmul=asked)
    ),
  }
  up, down = jax.random.split(key)
  wide = {
    "up": jax.random.normal(up, (D, k * F), jnp.float32) * D**-0.5,
    "down": jax.random.normal(down, (k * F, D), jnp.float32) * F**-0.5,
  }

  def dense(params, x):
    hidden = jax.nn.gelu(x @ params["up"].astype(dtype))
    return hidden @ params["down"].astype(dtype)

  def sparse(config):
    def apply(params, x):
      y, info = jmoe.moe(params, x, config, train=True)
      return y, 0.01 * info.losses["load_balance"] + 0.001 * info.losses["router_z"]

    return apply

  made = [Row("dense FFN, equal FLOPs", dense, wide)]
  chosen = [n for n in configs if not args.only or any(o in n for o in args.only)]
  return made + [Row(name, sparse(configs[name]), params) for name in chosen]


def compile_row(row: Row, x_TD: Array, cotangent_TD: Array) -> None:
  """Compiles forward and forward+backward, and notes their temporary memory."""

  def forward(params, x):
    out = row.apply(params, x)
    return out[0] if isinstance(out, tuple) else out

  def step(params, x):
    def loss(params, x):
      out = row.apply(params, x)
      y, extra = out if isinstance(out, tuple) else (out, 0.0)
      return jnp.vdot(y.astype(jnp.float32), cotangent_TD) + extra

    return jax.value_and_grad(loss, argnums=(0, 1))(params, x)

  row.forward = jax.jit(forward).lower(row.params, x_TD).compile()
  row.step = jax.jit(step).lower(row.params, x_TD).compile()
  for name in ("forward", "step"):
    memory = getattr(row, name).memory_analysis()
    row.temp[name] = int(memory.temp_size_in_bytes)


def measure(rows: list[Row], x_TD: Array, rounds: int) -> None:
  """Interleaved rounds; the first one warms up and is not kept."""
  for round_ in range(rounds + 1):
    for row in rows:
      for name in ("forward", "step"):
        begin = time.perf_counter()
        jax.block_until_ready(getattr(row, name)(row.params, x_TD))
        if round_:
          row.times.setdefault(name, []).append(time.perf_counter() - begin)


def wrong(rows: list[Row], x_TD: Array) -> str | None:
  """Checks the dropless rows against each other; returns what is wrong, if anything."""
  results = {r.name: np.asarray(r.forward(r.params, x_TD), np.float32) for r in rows}
  dropless = [n for n in results if n.startswith("sort")]
  for name in dropless[1:]:
    scale = np.abs(results[name]).max()
    error = np.abs(results[name] - results[dropless[0]]).max() / scale
    if not error < (1e-5 if x_TD.dtype == jnp.float32 else 3e-2):
      return f"{name} differs from {dropless[0]} by {error:.1e} of its largest value"
  return None


def front_share(args: argparse.Namespace, x_TD: Array, key: Array) -> dict[str, float]:
  """Milliseconds of routing and assignment alone, forward, beside the whole layer."""
  config = jmoe.MoEConfig(
    args.d_model,
    args.experts,
    router=use(jmoe.routers.top_k, k=args.k),
    experts=use(jmoe.experts.mlp, d_ff=args.d_ff),
  )
  params = jmoe.moe_init(key, config)

  def select(params, x):
    """From logits to rows: scores, top-k, queues, layout; without the gate's matmul."""
    logits = jmoe.gates.linear(params["gate"], x, jmoe.Context())
    return chosen(logits)

  def chosen(logits):
    scores = jmoe.score.softmax(logits)
    routing = jmoe.routers.top_k(logits, scores, scores, k=args.k)
    plan = jmoe.assign.assign(routing, jmoe.Context())
    layout = ragged(plan)
    return routing.weight, layout.token, layout.row

  from jmoe.dispatch.layout import ragged

  def layer(params, x):
    return jmoe.moe(params, x, config)[0]

  logits = jmoe.gates.linear(params["gate"], x_TD, jmoe.Context())
  timed = {
    "route_assign_ms": (jax.jit(chosen), (logits,)),
    "gate_route_assign_ms": (jax.jit(select), (params, x_TD)),
    "layer_ms": (jax.jit(layer), (params, x_TD)),
  }
  best = {}
  for name, (f, operands) in timed.items():
    jax.block_until_ready(f(*operands))
    seconds = []
    for _ in range(args.rounds):
      begin = time.perf_counter()
      jax.block_until_ready(f(*operands))
      seconds.append(time.perf_counter() - begin)
    best[name] = 1e3 * statistics.median(seconds)
  best["share"] = best["route_assign_ms"] / best["layer_ms"]
  best["share_with_gate"] = best["gate_route_assign_ms"] / best["layer_ms"]
  return best


def table(rows: list[Row]) -> list[dict[str, Any]]:
  """Medians, and medians of the ratios to the dense row of the same round."""
  dense = rows[0]
  found = []
  for row in rows:
    entry: dict[str, Any] = {"name": row.name}
    for name in ("forward", "step"):
      pairs = zip(row.times[name], dense.times[name], strict=True)
      ratios = sorted(a / b for a, b in pairs)
      entry[name] = {
        "ms": 1e3 * statistics.median(row.times[name]),
        "ratio": statistics.median(ratios),
        "ratio_low": ratios[0],
        "ratio_high": ratios[-1],
        "temp_mib": row.temp[name] / 2**20,
      }
    found.append(entry)
  return found


def main(argv: list[str] | None = None) -> int:
  parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
  parser.add_argument("--tokens", type=int, default=4096)
  parser.add_argument("--d-model", type=int, default=512)
  parser.add_argument("--d-ff", type=int, default=1024)
  parser.add_argument("--experts", type=int, default=16)
  parser.add_argument("--k", type=int, default=2)
  parser.add_argument("--capacity", type=float, default=1.25)
  parser.add_argument("--einsum-group", type=int, default=1024)
  parser.add_argument("--dtype", default="float32")
  parser.add_argument("--rounds", type=int, default=7)
  parser.add_argument("--only", nargs="*", help="parts of names; the bound always runs")
  parser.add_argument("--out", type=pathlib.Path, help="JSON file for the result")
  args = parser.parse_args(argv)
  key = jax.random.key(0)
  x_TD = jax.random.normal(key, (args.tokens, args.d_model), jnp.dtype(args.dtype))
  cotangent_TD = jax.random.normal(jax.random.key(1), x_TD.shape, jnp.float32)
  try:
    rows = rows_of(args, key)
  except ValueError as error:
    print(f"layer: {error}", file=sys.stderr)
    return 2
  for row in rows:
    compile_row(row, x_TD, cotangent_TD)
  measure(rows, x_TD, args.rounds)
  found = table(rows)
  print(
    f"{'':24}{'forward':>21}{'':9}{'forward+backward':>21}\n"
    f"{'':24}{'ms':>8}{'x dense':>9}{'MiB':>8}{'':5}{'ms':>8}{'x dense':>9}"
    f"{'(low-high)':>13}{'MiB':>8}"
  )
  for entry in found:
    f, s = entry["forward"], entry["step"]
    spread = f"({s['ratio_low']:.2f}-{s['ratio_high']:.2f})"
    print(
      f"{entry['name']:24}{f['ms']:8.1f}{f['ratio']:9.2f}{f['temp_mib']:8.0f}{'':5}"
      f"{s['ms']:8.1f}{s['ratio']:9.2f}{spread:>13}{s['temp_mib']:8.0f}"
    )
  front = front_share(args, x_TD, key)
  print(
    f"routing and assignment: {front['route_assign_ms']:.1f} ms of "
    f"{front['layer_ms']:.1f} ms forward, {100 * front['share']:.1f}% "
    f"({100 * front['share_with_gate']:.1f}% with the gate's matmul)"
  )
  problem = wrong(rows, x_TD)
  if args.out:
    args.out.parent.mkdir(parents=True, exist_ok=True)
    shape = {k: v for k, v in vars(args).items() if k not in ("out", "only")}
    result = {
      "what": "sparse layer against a dense FFN of equal FLOPs",
      "command": _command(args),
      "shape": shape,
      "machine": f"{jax.default_backend()} {platform.machine()}",
      "cores": len(jax.devices()) if jax.default_backend() != "cpu" else _cores(),
      "versions": {"python": platform.python_version(), "jax": jax.__version__},
      "rows": found,
      "front": front,
      "correct": problem is None,
    }
    args.out.write_text(json.dumps(result, indent=2) + "\n")
  if problem:
    print(f"layer: wrong result: {problem}", file=sys.stderr)
    return 3
  return 0


def _command(args: argparse.Namespace) -> str:
  """The command that does this again, wherever its result goes."""
  words = ["python -m experiments.benchmarks.layer"]
  for name in ("tokens", "d_model", "d_ff", "experts", "k", "capacity", "rounds"):
    words.append(f"--{name.replace('_', '-')} {getattr(args, name):g}")
  return " ".join([*words, f"--dtype {args.dtype}"])


def _cores() -> int:
  import os

  return len(os.sched_getaffinity(0))


if __name__ == "__main__":
  sys.exit(main())
