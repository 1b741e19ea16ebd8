"""A step timed and weighed, and a checkpoint from all GPUs to half of them."""
# SPDX-License-Identifier: Apache-2.0

import argparse
import math
import statistics
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks import shapes
from experiments.benchmarks.mesh_train import model as models
from experiments.benchmarks.olmoe_step import training
from jmoe.parallel import mesh as meshes

_STEPS = 4  # queued between two looks at the clock


def _made(
  arguments: argparse.Namespace, sizes: Mapping[str, int], layers: int | None
) -> Any:
  """(model, weights of its losses, rows of the batch)."""
  gpus = arguments.gpus
  model, weights, rows, keep = models.MODELS[arguments.model]
  keep = arguments.keep or keep
  experts = sizes.get("expert", 1)
  room = arguments.room / experts if arguments.room < experts else None
  model = models.configured(
    model, strategy=arguments.strategy, keep=keep, layers=layers, room=room
  )
  return model, weights, gpus * (arguments.rows or rows)


def step(
  arguments: argparse.Namespace, sizes: dict[str, int], *, until: float
) -> dict[str, Any]:
  """Times, tokens a second, shares of the ceiling, memory, losses.

  Args:
    arguments: of the command.
    sizes: of the mesh.
    until: of `time.monotonic`; no round begins later, but the first.
  """
  gpus = arguments.gpus
  model, weights, rows = _made(arguments, sizes, arguments.layers)
  count = models.counts(model, rows, arguments.seq)
  mesh = meshes.make(sizes, devices=jax.devices()[:gpus])
  print(
    f"{arguments.model} over {dict(sizes)} by {arguments.strategy}: "
    f"{count.params / 1e9:.2f}e9 parameters, {count.active / 1e9:.2f}e9 active, "
    f"{count.tokens} tokens",
    flush=True,
  )
  _, like = training.shapes(model)
  state = models.drawn(like, mesh)
  ids = models.batch(model, rows, arguments.seq, mesh)
  state_gb = models.gigabytes(state)
  plan = planned(arguments, model, sizes, rows, state_gb)
  print(f"  planned: {plan}", flush=True)
  begin = time.perf_counter()
  compiled = models.compiled(model, mesh, rows, arguments.seq, weights)
  compiling = time.perf_counter() - begin
  memory: Any = compiled.memory_analysis()
  said = []

  def run(times: int) -> None:
    nonlocal state
    for _ in range(times):
      state, metrics = compiled(state, ids)
      said.append(metrics["loss"])
    jax.block_until_ready(state)

  run(3)
  peaks = [
    (device.memory_stats() or {}).get("peak_bytes_in_use", 0) / 1e9
    for device in mesh.devices.flat
  ]
  size = 128 if arguments.dry else None
  times, ceilings = [], []
  for n in range(arguments.rounds):
    if n and time.monotonic() > until:
      break
    ceilings.append(shapes.ceiling(size, repeats=1))
    begin = time.perf_counter()
    run(_STEPS)
    times.append((time.perf_counter() - begin) / _STEPS)
  losses = [float(x) for x in jax.device_get(said)]
  seconds, bound = statistics.median(times), statistics.median(ceilings)
  rate = count.flops / seconds / gpus
  near = abs(losses[0] - math.log(model.vocab_size)) < 1
  found = {
    "model": arguments.model,
    "strategy": arguments.strategy,
    "rows": rows,
    "params": count.params,
    "active": count.active,
    "compile_s": compiling,
    "ms": [1e3 * t for t in times],
    "tokens_per_s": count.tokens / seconds,
    "tflops_per_gpu": rate / 1e12,
    "ceilings_tflops": [c / 1e12 for c in ceilings],
    "share_of_ceiling": rate / bound,
    "losses": losses,
    "right": bool(near and np.isfinite(losses).all() and losses[-1] < losses[0]),
    "gb": {
      "state": state_gb,
      "peak_of_each": peaks,
      "compiled": {
        "arguments": memory.argument_size_in_bytes / 1e9,
        "temporaries": memory.temp_size_in_bytes / 1e9,
        "results_of_their_own": (
          memory.output_size_in_bytes - memory.alias_size_in_bytes
        )
        / 1e9,
      },
    },
    "planned": plan,
  }
  _show(found)
  return found


def planned(
  arguments: argparse.Namespace,
  model: Any,
  sizes: dict[str, int],
  rows: int,
  state_gb: float,
) -> dict[str, Any]:
  """The planner's memory and time of a GPU for the same step, with the state given.

  Its own state has float32 copies of the parameters, which this step does not.
  """
  from experiments.planning import ask

  try:
    return ask.planned(
      model,
      rows=rows,
      seq=arguments.seq,
      sizes=sizes,
      strategy=arguments.strategy,
      state=state_gb * 1e9,
    )
  except ValueError as error:  # a chip that is not in its table
    return {"why": str(error)}


def checkpoint(arguments: argparse.Namespace, sizes: dict[str, int]) -> dict[str, Any]:
  """Saved on all GPUs, restored on half of them over other axes; compared."""
  import orbax.checkpoint as ocp

  gpus = arguments.gpus
  model, weights, rows = _made(arguments, sizes, arguments.checkpoint_layers)
  _, like = training.shapes(model)
  mesh = meshes.make(sizes, devices=jax.devices()[:gpus])
  half = {"fsdp": gpus // 2} if gpus > 2 else {"expert": 1}
  smaller = meshes.make(half, devices=jax.devices()[: gpus // 2])
  state = models.drawn(like, mesh)
  ids = models.batch(model, rows, arguments.seq, mesh)
  first = models.compiled(model, mesh, rows, arguments.seq, weights)
  state, _ = first(state, ids)
  with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
    path = Path(folder) / "state"
    begin = time.perf_counter()
    with ocp.StandardCheckpointer() as saver:
      saver.save(path, state)
      saver.wait_until_finished()
      saving = time.perf_counter() - begin
      wanted = jax.tree.map(
        lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at),
        state, models.shardings(like, smaller),
      )  # fmt: skip
      begin = time.perf_counter()
      restored = jax.block_until_ready(saver.restore(path, wanted))
      restoring = time.perf_counter() - begin
  same = all(
    np.array_equal(_bits(one), _bits(other))
    for one, other in zip(
      jax.tree.leaves(state), jax.tree.leaves(restored), strict=True
    )
  )
  gigabytes = sum(x.nbytes for x in jax.tree.leaves(state)) / 1e9
  fewer = models.batch(model, rows, arguments.seq, smaller)
  second = models.compiled(model, smaller, rows, arguments.seq, weights)
  losses = [
    float(first(state, ids)[1]["loss"]),
    float(second(restored, fewer)[1]["loss"]),
  ]
  close = abs(losses[0] - losses[1]) < 2e-3 * losses[0]
  found = {
    "layers": arguments.checkpoint_layers,
    "gb": gigabytes,
    "from": dict(sizes),
    "to": half,
    "save_s": saving,
    "restore_s": restoring,
    "same_bits": same,
    "next_losses": losses,
    "right": bool(same and close),
  }
  print(
    f"checkpoint of {gigabytes:.2f} GB from {dict(sizes)} to {half}: saved in "
    f"{saving:.1f} s, restored in {restoring:.1f} s; the same bits: {same}; next "
    f"losses {losses[0]:.5f} and {losses[1]:.5f}",
    flush=True,
  )
  return found


def _bits(x: Any) -> np.ndarray:
  array = np.asarray(jax.device_get(x))
  return array.view(np.uint16) if array.dtype == jnp.bfloat16 else array


def _show(found: dict[str, Any]) -> None:
  ms, gb, losses = found["ms"], found["gb"], found["losses"]
  print(
    f"  compiled in {found['compile_s']:.0f} s; {statistics.median(ms):.1f} ms "
    f"({min(ms):.1f} to {max(ms):.1f}), {found['tokens_per_s'] / 1e3:.2f}k tokens/s, "
    f"{found['tflops_per_gpu']:.0f} TFLOP/s a GPU, {found['share_of_ceiling']:.3f} of "
    f"the ceiling; loss {losses[0]:.3f} to {losses[-1]:.3f}"
    + ("" if found["right"] else "  WRONG"),
    flush=True,
  )
  plan, compiled = found["planned"], gb["compiled"]
  print(
    f"  GB of a GPU: state {gb['state']:.1f}, at most {max(gb['peak_of_each']):.1f}, "
    f"compiled {compiled['arguments'] + compiled['temporaries']:.1f}; planned "
    f"{plan.get('gb', float('nan')):.1f} in {plan.get('ms', float('nan')):.0f} ms",
    flush=True,
  )
