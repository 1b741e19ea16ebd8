"""jmoe's step, measured in a process of its own."""
# SPDX-License-Identifier: Apache-2.0

import argparse
import dataclasses
import functools
import json
import math
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from experiments.benchmarks import tracing
from experiments.benchmarks.olmoe_step.size import STEPS, Size


def main() -> int:
  """Measures the step, or with `--parity` compares logits with those in a file."""
  parser = argparse.ArgumentParser()
  add = parser.add_argument
  add("--size", required=True)
  add("--keep", default="most")
  add("--chunk", type=int)
  add("--loop", action="store_true")
  add("--rounds", type=int, default=5)
  add("--table", type=int, default=0)
  add("--out", type=Path, required=True)
  add("--parity", type=Path)
  arguments = parser.parse_args()
  size = Size(**json.loads(arguments.size))
  if arguments.table:
    tracing.prepare()
  if arguments.parity:
    found = _compared(size, arguments.parity)
  else:
    found = _measured(size, arguments)
  arguments.out.write_text(json.dumps(found))
  return 0


def _measured(size: Size, arguments: argparse.Namespace) -> dict[str, Any]:
  import jax
  import jax.numpy as jnp

  from experiments.benchmarks import shapes
  from experiments.benchmarks.olmoe_step import training

  device = jax.devices()[0]
  model = training.config(size, arguments.keep, loop=arguments.loop)
  blueprint, like = training.shapes(model)
  state = training.drawn(like)
  ids = jax.random.randint(jax.random.key(7), (size.rows, size.seq), 0, size.vocab)
  step = functools.partial(
    training.train_step,
    blueprint=blueprint,
    chunk=arguments.chunk,
    in_backward=not arguments.loop,
  )
  begin = time.perf_counter()
  # Attention's own gradient mixes bfloat16 and float32.
  step = jax.jit(step, donate_argnums=0).lower(state, ids).compile()
  compiling = time.perf_counter() - begin
  memory: Any = step.memory_analysis()
  said = []

  def run(count):
    nonlocal state
    for _ in range(count):
      state, metrics = step(state, ids)
      said.append(metrics["loss"])
    jax.block_until_ready(state)

  run(3)
  # Before the ceiling's matrices are there.
  peak = (device.memory_stats() or {}).get("peak_bytes_in_use", 0)
  ceilings, times = [], []
  for _ in range(arguments.rounds):
    ceilings.append(shapes.ceiling(repeats=1))
    begin = time.perf_counter()
    run(STEPS)
    times.append((time.perf_counter() - begin) / STEPS)
  losses = [float(loss) for loss in jnp.stack(said)]
  params = sum(math.prod(x.shape) for x in like.values())
  found = {
    "what": f"jmoe, keeps {arguments.keep}" + " in a loop" * arguments.loop,
    "params": params,
    "ms": 1e3 * statistics.median(times),
    "ms_all": [1e3 * t for t in times],
    "ceilings_tflops": [c / 1e12 for c in ceilings],
    "peak_gb": peak / 1e9,
    "compiled_gb": {
      "arguments": memory.argument_size_in_bytes / 1e9,
      "temporaries": memory.temp_size_in_bytes / 1e9,
      "outputs_of_their_own": (memory.output_size_in_bytes - memory.alias_size_in_bytes)
      / 1e9,
    },
    "compile_s": compiling,
    "losses": losses,
    "right": _learns(losses, size) and params == size.params,
    "device": device.device_kind,
    "versions": {"jax": jax.__version__},
  }
  if arguments.table:
    found["table"] = tracing.shown(step, (state, ids), arguments.table, kept=0)
  return found


def _learns(losses: list[float], size: Size) -> bool:
  """Whether it starts near the uniform guess and falls on one batch, step by step."""
  near = abs(losses[0] - math.log(size.vocab)) < 1
  return near and all(map(math.isfinite, losses)) and losses[-1] < losses[0]


def _compared(size: Size, file: Path) -> dict[str, Any]:
  """A small float32 model's logits and loss beside those of transformers."""
  import jax
  import jax.numpy as jnp
  import numpy as np

  from experiments import state as states
  from experiments.benchmarks.olmoe_step import training

  jax.config.update("jax_default_matmul_precision", "highest")
  saved = np.load(file)
  model = training.config(size, "nothing")
  model = dataclasses.replace(model, dtype="float32")
  blueprint, like = states.blueprint(model)
  # A segment of one layer is a stack of one.
  params = {
    n: jnp.asarray(saved[f"params/{n}"].reshape(x.shape)) for n, x in like.items()
  }
  tokens_BS = jnp.asarray(saved["tokens"], jnp.int32)

  @jax.jit
  def run(params):
    decoder = blueprint.model(params, {})
    x_BSD, _ = decoder.hidden(tokens_BS)
    weight_BS = jnp.ones(tokens_BS.shape).at[:, -1].set(0.0)
    target_BS = jnp.roll(tokens_BS, -1, axis=1)
    loss, _ = decoder.cross_entropy(x_BSD, target_BS, weight_BS, chunk=48)
    return decoder.logits(x_BSD), loss / jnp.sum(weight_BS)

  logits, loss = jax.tree.map(np.asarray, run(params))
  gap = float(np.abs(logits - saved["logits"]).max() / np.abs(saved["logits"]).max())
  losses = [float(loss), float(saved["loss"])]
  return {
    "what": "logits beside transformers, float32",
    "gap": gap,
    "losses": losses,
    "right": gap < 1e-4 and abs(losses[0] - losses[1]) < 1e-4 * losses[1],
  }


if __name__ == "__main__":
  sys.exit(main())
