"""The routing front's share of a layer: from logits to the layout of rows.

  python -m experiments.benchmarks.front
  python -m experiments.benchmarks.front --score sigmoid --capacity 1.25 --out FILE
  python -m experiments.benchmarks.front --compiled

A whole layer, `jmoe.moe` with a gate of its own, in bfloat16: forward, and forward with
all gradients and the losses.  A trace of its operations is divided into

  gate     the logits' product, and its gradients
  front    scores, top-k, sort, counts, queues, weights, layout; and their gradients
  rows     out to the experts and home
  experts  their products
  losses   losses, load, entropy
  other    what has no name: copies, and what XLA has put together

by the names that the layer gives them (`benchmarks.parts`).  Time is that of operations
on the device, without gaps, with command buffers off.  The target is a front of 5% of
the layer.  Without a GPU only the whole is timed, by the clock on the wall.

`--compiled` needs no GPU but jax's CUDA plugin, as `benchmarks.compiled_gpu` does: it
compiles for an H200 that is only described and counts what would be launched.  A sort
counts once there; on the chip it is a library's, with several launches.

Beside the layers, the gate's product alone: float32 at the highest precision, and by
bfloat16 parts (`benchmarks.front_gate`), with errors against float64.

Scores, choices, weights, queues and layout are compared with loops in NumPy, four
outputs with float32.

Exit codes: 0 done, 2 bad arguments or no plugin, 3 a result was wrong.
"""
# SPDX-License-Identifier: Apache-2.0

import argparse
import collections
import json
import os
import statistics
import sys
from pathlib import Path
from typing import Any

from experiments.benchmarks import front_gate, parts, tracing
from experiments.parser import Parser

TARGET = 0.05  # of the layer
SKEW = 0.3  # deviation of the log of experts' popularity, as in `shapes.routing`
KINDS = ("forward", "step")


def main(argv: list[str] | None = None) -> int:
  """Runs a command line; returns its exit code."""
  arguments = parsed(argv)
  if arguments.compiled:
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
  else:
    tracing.prepare()
  try:
    here, configs = ready(arguments)
  except (ValueError, RuntimeError) as error:
    print(f"error: {error}", file=sys.stderr)
    return 2
  import jax

  found = []
  for name, config in configs.items():
    rows = _counted(config, here, arguments) if here else _measured(config, arguments)
    for kind, row in zip(KINDS, rows, strict=True):
      found.append({"name": name, "kind": kind, **row})
      _show(found[-1])
  gate = front_gate.rows(arguments, here)
  for row in gate:
    front_gate.show(row)
  device = jax.devices()[0].device_kind
  words = ("tokens", "experts", "k", "d_model", "d_ff", "capacity", "rounds")
  given = (f" --{w.replace('_', '-')} {getattr(arguments, w):g}" for w in words)
  result = {
    "command": "python -m experiments.benchmarks.front"
    + "".join(given)
    + f" --score {' '.join(arguments.score)}"
    + " --compiled" * arguments.compiled,
    "device": "compiled for NVIDIA H200, not run" if here else device,
    "jax": jax.__version__,
    "target": TARGET,
    "rows": found,
    "gate": gate,
  }
  if arguments.out:
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=2) + "\n")
  wrong = {f"{row['name']}: {row['wrong']}" for row in found if row.get("wrong")}
  for reason in sorted(wrong):
    print(f"error: wrong result, {reason}", file=sys.stderr)
  return 3 if wrong else 0


def parsed(argv: list[str] | None) -> argparse.Namespace:
  """The arguments of a command line."""
  parser = Parser(
    prog="python -m experiments.benchmarks.front",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  add = parser.add_argument
  add("--tokens", type=int, default=32768)
  add("--experts", type=int, default=256)
  add("--k", type=int, default=8)
  add("--d-model", type=int, default=2048)
  add("--d-ff", type=int, default=768)
  add("--score", nargs="+", default=("softmax", "sigmoid"), metavar="NAME")
  add("--capacity", type=float, default=1.25, help="factor of the rows with a capacity")
  add("--rounds", type=int, default=5)
  add("--list", action="store_true", help="every operation of the front")
  add("--compiled", action="store_true", help="count launches for an H200, run nothing")
  add("--out", type=Path, help="JSON file for the figures")
  return parser.parse_args(argv)


def ready(arguments: argparse.Namespace) -> tuple[Any, dict[str, Any]]:
  """(sharding of a described H200, or None; name -> configuration)."""
  import jmoe
  from experiments.benchmarks import compiled_gpu
  from jmoe.use import use

  scores: dict[str, Any] = {
    name: getattr(jmoe.score, name, None) for name in arguments.score
  }
  if None in scores.values():
    raise ValueError(f"--score {' '.join(scores)}: use softmax or sigmoid")
  configs = {}
  for name, score in scores.items():
    for limited in (False, True):
      limit = use(jmoe.capacity.by_factor, factor=arguments.capacity)
      label = f"{name}, " + f"capacity {arguments.capacity:g}" * limited
      configs[label if limited else label + "dropless"] = jmoe.MoEConfig(
        arguments.d_model,
        arguments.experts,
        score=use(score),
        router=use(jmoe.routers.top_k, k=arguments.k),
        capacity=limit if limited else None,
        renormalise=use(jmoe.renormalise.before_dropping),
        dispatch=use(jmoe.dispatch.buckets if limited else jmoe.dispatch.sort),
        experts=use(jmoe.experts.glu, d_ff=arguments.d_ff),
        losses=(use(jmoe.losses.load_balance),),
      )
  return compiled_gpu.described() if arguments.compiled else None, configs


def operands(config: Any, tokens: int) -> tuple[Any, Any, Any]:
  """(parameters, x_TD, dy_TD); the gate in float32, all else in bfloat16.

  The first feature of every token is one, and the gate's row of it the experts'
  popularity.
  """
  import jax
  import jax.numpy as jnp

  import jmoe

  keys = jax.random.split(jax.random.key(0), 4)
  narrow = lambda tree: jax.tree.map(lambda a: a.astype(jnp.bfloat16), tree)  # noqa: E731
  made = jmoe.moe_init(keys[0], config)
  kernel_DE = made["gate"]["kernel_DE"]
  kernel_DE = kernel_DE.at[0].set(
    SKEW * jax.random.normal(keys[1], kernel_DE.shape[1:])
  )
  params = {**narrow(made), "gate": {"kernel_DE": kernel_DE}}
  size = tokens, config.d_model
  x_TD, dy_TD = (jax.random.normal(key, size, jnp.bfloat16) for key in keys[2:])
  return params, x_TD.at[:, 0].set(1), dy_TD


def functions(config: Any) -> tuple[Any, Any]:
  """Of (params, x_TD, dy_TD): y_TD; and (y_TD, losses, all gradients)."""
  import jax

  import jmoe

  def forward(params, x_TD, dy_TD):
    del dy_TD
    return jmoe.moe(params, x_TD, config)[0]

  def step(params, x_TD, dy_TD):
    def run(params, x_TD):
      y_TD, info = jmoe.moe(params, x_TD, config, train=True)
      return y_TD, sum(info.losses.values())

    (y_TD, loss), pull = jax.vjp(run, params, x_TD)
    y_TD, dy_TD = jax.lax.optimization_barrier((y_TD, dy_TD))  # as in `peers`
    return y_TD, loss, pull((dy_TD, 0.01 * jax.numpy.ones_like(loss)))

  return forward, step


def _counted(config: Any, here: Any, arguments: Any) -> list[dict[str, Any]]:
  """Launches of each part, of programs for an H200 that are not run."""
  import jax

  from experiments.benchmarks import compiled_gpu

  given = jax.tree.map(
    lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=here),
    jax.eval_shape(lambda: operands(config, arguments.tokens)),
  )
  rows = []
  for function in functions(config):
    with compiled_gpu.as_hopper():
      text: Any = jax.jit(function).trace(*given).lower().compile().as_text()
    launched = dict.fromkeys(parts.operations(text), (None, 1))
    rows.append(divided(text, launched, listed=arguments.list))
  return rows


def _measured(config: Any, arguments: Any) -> list[dict[str, Any]]:
  """Milliseconds and launches of each part, and what is wrong with the results."""
  import jax

  from experiments.benchmarks import front_check, shapes

  given = jax.jit(lambda: operands(config, arguments.tokens))()
  made = front_check.made(config, *given[:2])
  wrong = front_check.wrong(config, given[0], given[1], *made)
  rows = []
  for function in functions(config):
    call = jax.jit(function).lower(*given).compile()
    jax.block_until_ready(call(*given))
    if jax.default_backend() == "cpu":  # only an accelerator's trace has its operations
      run = lambda: call(*given)  # noqa: E731, B023
      took = shapes.seconds(run, repeats=arguments.rounds, inner=1)
      rows.append(divided("", {}, clock_ms=1e3 * statistics.median(took)))
    else:
      rounds = [tracing.measured(call, given) for _ in range(arguments.rounds)]
      rounds.sort(key=lambda found: sum(ms for ms, _ in found.values()))
      text: Any = call.as_text()
      found = rounds[len(rounds) // 2]  # one round as it was: parts add up to it
      rows.append(divided(text, found, listed=arguments.list))
      rows[-1]["ms_all"] = [sum(ms for ms, _ in r.values()) for r in rounds]
    rows[-1]["wrong"] = wrong
  return rows


def divided(
  text: str,
  found: dict[str, Any],
  *,
  clock_ms: float | None = None,
  listed: bool = False,
) -> dict[str, Any]:
  """The whole, and each part's launches, milliseconds and share.

  Args:
    text: of the compiled program.
    found: operation -> (milliseconds or None, launches).
    clock_ms: of the whole, where operations were not timed.
    listed: print the operations of the front.
  """
  belongs = parts.parts_of(text)
  ms = collections.Counter[str]()
  count = collections.Counter[str]()
  timed = bool(found) and None not in [took for took, _ in found.values()]
  for name, (took, launches) in found.items():
    one = belongs.get(name, "other")
    ms[one] += took or 0
    count[one] += launches
    if listed and one in ("front", "other"):
      long = "" if took is None else f"{took:.4f} ms"
      print(f"  {one:<6}{launches:5.1f} x {long} {name}")
  whole = sum(ms.values())
  row: dict[str, Any] = {
    "ms": whole if timed else clock_ms,
    "clock": clock_ms is not None,
  }
  row["parts"] = {
    name: {
      "launches": round(count[name], 2),
      "ms": ms[name] if timed else None,
      "share": ms[name] / max(whole, 1e-9) if timed else None,
    }
    for name in (parts.PARTS if found else ())
  }
  return row


def _show(row: dict[str, Any]) -> None:
  whole = "" if row["ms"] is None else f"{row['ms']:.2f} ms"
  print(f"{row['name']}, {row['kind']}: {whole}{' by the clock' * row['clock']}")
  for name, figures in row["parts"].items():
    cells = f"  {name:<8}{figures['launches']:6g} launches"
    if figures["ms"] is not None:
      cells += f"{figures['ms']:9.3f} ms{figures['share']:8.2%}"
      if name == "front":
        cells += f"  {'within' if figures['share'] < TARGET else 'OVER'} {TARGET:.0%}"
    print(cells, flush=True)


if __name__ == "__main__":
  sys.exit(main())
