"""A whole training step: time, share of the chip's matmul rate, memory, where it goes.

  python -m experiments.benchmarks.step --config small --arms sparse,dense --seeds 3
  python -m experiments.benchmarks.step --config small --table 30 \
      --set model.segments.0.0.0.attention.implementation=xla

Each arm is trained for some steps on random tokens packed as four documents a row, as
`experiments.series` trains it: several seeds in one vmapped program.  The bound is the
rate of bfloat16 8192^3 products, the median of five, measured before every arm; FLOPs
are those of `jmoe.analysis.cost`, so that padding and recomputation count as lost.

`--table N` traces three steps more and lists the N operations that took longest, with
the place in the program that they come from.  `--parts` divides such a trace by the
names that a layer gives its parts (`benchmarks.parts`): routing is the gate, the front,
rows out and home, and losses; `other` is attention, the head and the optimizer.  Both
turn off command buffers, which the profiler cannot look into; the steps timed by the
clock are then slower where many small operations are launched.

  python -m experiments.benchmarks.step --config dag_moe --seeds 3 --parts \
      --arms sparse,finer=2,finer=4,dag=1,dag=2 --out FILE

Exit codes: 0 done, 2 bad arguments.
"""
# SPDX-License-Identifier: Apache-2.0

import argparse
import json
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from experiments import configs
from experiments.benchmarks import parts, tracing
from experiments.parser import Parser


def main(argv: list[str] | None = None) -> int:
  """Runs a command line; returns its exit code."""
  parser = Parser(
    prog="python -m experiments.benchmarks.step",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  add = parser.add_argument
  add("--config", required=True, choices=configs.names(), metavar="NAME")
  add("--arms", default="sparse", help="separated by commas; see experiments.arms")
  add("--seeds", type=int, default=1, help="in one program")
  add("--steps", type=int, default=10, help="timed, after three that are not")
  add("--set", action="append", default=[], metavar="PATH=VALUE")
  add("--table", type=int, default=0, metavar="N", help="operations to list")
  add("--parts", action="store_true", help="time of routing, rows, experts, messages")
  add("--ahead", type=int, default=1, metavar="N", help="arms compiled at a time")
  add("--out", type=Path, help="JSON file for the figures, rewritten after each arm")
  arguments = parser.parse_args(argv)
  if arguments.table or arguments.parts:
    tracing.prepare()
  from experiments import arms, settings

  found = []
  try:
    base = settings.with_settings(configs.load(arguments.config), arguments.set)
    runs = [arms.arm(base, name) for name in arguments.arms.split(",")]
  except (ValueError, TypeError) as error:
    print(f"error: {error}", file=sys.stderr)
    return 2
  with ThreadPoolExecutor(max(1, arguments.ahead)) as pool:
    # All before the first is timed, as compiling takes cores and tunes on the chip.
    compiled = list(pool.map(lambda run: _compiled(run, arguments.seeds), runs))
  for run, one in zip(runs, compiled, strict=True):
    found.append(_measured(run, one, arguments))
    if arguments.out:
      arguments.out.parent.mkdir(parents=True, exist_ok=True)
      arguments.out.write_text(json.dumps(found, indent=2) + "\n")
  if arguments.parts:
    print("\n".join(_by_parts(found)))
  return 0


def _compiled(run: Any, num: int) -> tuple[Any, Any, float]:
  """(program, compiled step of all seeds, seconds that it took)."""
  import jax
  import numpy as np

  from experiments import batches, program, seeds

  lengths = np.ones(run.model.vocab_size, np.int32)
  made = program.program(run, byte_lengths=lengths, num_domains=1)
  state = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct((num, *x.shape), x.dtype), jax.eval_shape(made.init)
  )
  batch = batches.shapes(run.data.batch, run.data.seq, models=num)
  begin = time.perf_counter()
  step = seeds.jitted(made.train_step).lower(state, batch).compile()
  return made, step, time.perf_counter() - begin


def _measured(
  run: Any, compiled: tuple[Any, Any, float], arguments: argparse.Namespace
) -> dict[str, Any]:
  """One arm: its figures, printed too."""
  import jax
  import numpy as np

  from experiments import seeds
  from experiments.benchmarks import shapes
  from jmoe.analysis import cost

  num, data = arguments.seeds, run.data
  made, step, compiling = compiled
  batch = _batch(np.random.default_rng(0), num, data.batch, data.seq)
  state = seeds.stack([made.of_seed(n).init() for n in range(num)])
  memory = step.memory_analysis()
  ceiling = shapes.ceiling()
  batch = jax.device_put(batch)
  times = []
  for n in range(3 + arguments.steps):
    begin = time.perf_counter()
    state, metrics, _ = step(state, batch)
    jax.block_until_ready(state)
    if n >= 3:
      times.append(time.perf_counter() - begin)
  seconds = statistics.median(times)
  flops = (
    3 * cost.flops_per_token(run.model, seq=data.seq) * num * data.batch * data.seq
  )
  figures = {
    "arm": run.name,
    "seeds": num,
    "ms": 1e3 * seconds,
    "ms_all": [1e3 * t for t in times],
    "tokens_per_second": num * data.batch * data.seq / seconds,
    "tflops": flops / seconds / 1e12,
    "ceiling_tflops": ceiling / 1e12,
    "share": flops / seconds / ceiling,
    "compile_s": compiling,
    "arguments_gib": memory.argument_size_in_bytes / 2**30,
    "temporary_gib": memory.temp_size_in_bytes / 2**30,
    "device": jax.devices()[0].device_kind,
    "jax": jax.__version__,
  }
  print(
    f"{run.name:<16}{figures['ms']:9.1f} ms ({1e3 * min(times):.1f} to "
    f"{1e3 * max(times):.1f}){figures['tokens_per_second'] / 1e3:9.0f}k tokens/s"
    f"{figures['tflops']:8.1f} TFLOP/s, {figures['share']:.3f} of "
    f"{figures['ceiling_tflops']:.0f}{figures['temporary_gib']:8.1f} GiB temporary, "
    f"compiled in {compiling:.0f} s",
    flush=True,
  )
  if arguments.parts:
    figures["parts"] = divided(
      step.as_text(), tracing.measured(step, (state, batch), kept=0)
    )
  if arguments.table:
    if arguments.parts:  # the state was donated
      state = seeds.stack([made.of_seed(n).init() for n in range(num)])
    figures["table"] = tracing.shown(step, (state, batch), arguments.table, kept=0)
  return figures


def divided(text: str, found: dict[str, tuple[float, float]]) -> dict[str, float]:
  """Milliseconds of operations by part of `parts.ALL`; all zero without a device trace.

  Args:
    text: of the compiled program.
    found: operation -> (milliseconds, launches), from `tracing.measured`.
  """
  belongs = parts.parts_of(text)
  spent: dict[str, float] = dict.fromkeys(parts.ALL, 0.0)
  for name, (ms, _) in found.items():
    spent[belongs.get(name, "other")] += ms
  return spent


def _by_parts(found: list[dict[str, Any]]) -> list[str]:
  """Lines of a table: milliseconds by part, and the share of routing."""
  heads = [f"{'ms of operations':<16}{'step':>9}{'traced':>9}"]
  heads += [f"{name:>10}" for name in parts.ALL]
  lines = ["".join(heads) + f"{'routing':>10}{'of step':>9}"]
  for row in found:
    spent = row["parts"]
    total = sum(spent.values())
    routing = sum(spent[name] for name in parts.ROUTING)
    cells = "".join(f"{ms:>10.2f}" for ms in spent.values())
    lines.append(
      f"{row['arm']:<16}{row['ms']:>9.1f}{total:>9.1f}{cells}{routing:>10.2f}"
      + (f"{routing / total:>9.1%}" if total else f"{'no trace':>9}")
    )
  return lines


def _batch(rng: Any, num: int, rows: int, seq: int) -> dict[str, Any]:
  """Random bytes, four documents a row."""
  import numpy as np

  shape = (num, rows, seq)
  place = np.arange(seq, dtype=np.int32)
  quarter = max(1, seq // 4)
  return {
    "inputs": rng.integers(0, 256, shape, dtype=np.int32),
    "targets": rng.integers(0, 256, shape, dtype=np.int32),
    "scored": np.ones(shape, np.int32),
    "domain": np.zeros(shape, np.int32),
    "segment": np.broadcast_to(place // quarter + 1, shape).astype(np.int32),
    "position": np.broadcast_to(place % quarter, shape).astype(np.int32),
  }


if __name__ == "__main__":
  sys.exit(main())
