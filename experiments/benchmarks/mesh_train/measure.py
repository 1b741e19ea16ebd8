"""A step timed and weighed, and a checkpoint from all GPUs to a half and a quarter."""
# SPDX-License-Identifier: Apache-2.0

import argparse
import math
import statistics
import tempfile
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from experiments import checkpoint as checkpoints
from experiments.benchmarks import shapes
from experiments.benchmarks.mesh_train import model as models
from experiments.config import Run

_STEPS = 4  # queued between two looks at the clock


def run_of(
  arguments: argparse.Namespace, sizes: Mapping[str, int], layers: int | None
) -> Run:
  """The run that a command asks for."""
  gpus = arguments.gpus
  model, weights, rows, keep, loop = models.MODELS[arguments.model]
  keep = arguments.keep or keep
  loop = loop if arguments.loop is None else arguments.loop
  experts = sizes.get("expert", 1)
  room = arguments.room / experts if arguments.room < experts else None
  model = models.configured(model, keep=keep, loop=loop, layers=layers, room=room)
  return models.run_of(model, gpus * (arguments.rows or rows), arguments.seq, weights)


class Made(NamedTuple):
  """A job, its step and what makes its state; with each seconds of compilation."""

  job: models.Job
  compiled: Future[tuple[Any, float]]
  begun: Future[tuple[Any, float]] | None  # of one that is not restored

  def state(self) -> Any:
    """Before the first step."""
    assert self.begun is not None
    return self.begun.result()[0]()


class Programs(NamedTuple):
  """The jobs of a command."""

  step: Made
  saved: Made | None  # the smaller model on all GPUs
  restored: list[Made]  # on half of them, and on a quarter


def programs(
  arguments: argparse.Namespace, sizes: dict[str, int], pool: ThreadPoolExecutor
) -> Programs:
  """All steps of a command, in compilation at once."""

  def made(layers: int | None, over: Mapping[str, int], begins: bool = True) -> Made:
    job = models.job(run_of(arguments, sizes, layers), over, arguments.strategy)
    step = pool.submit(_compiled, job.lowered())
    return Made(job, step, pool.submit(_compiled, job.begun()) if begins else None)

  gpus, layers = arguments.gpus, arguments.checkpoint_layers
  whole = made(arguments.layers, sizes)
  if not layers or gpus == 1:
    return Programs(whole, None, [])
  saved = whole if layers == arguments.layers else made(layers, sizes)
  fewer = [n for n in (gpus // 2, gpus // 4) if n]
  over = [{"fsdp": n} if n > 1 else {"expert": 1} for n in fewer]
  return Programs(whole, saved, [made(layers, mesh, begins=False) for mesh in over])


def _compiled(lowered: Any) -> tuple[Any, float]:
  begin = time.perf_counter()
  return lowered.compile(), time.perf_counter() - begin


def step(
  arguments: argparse.Namespace,
  sizes: dict[str, int],
  made: Programs,
  *,
  until: float,
) -> dict[str, Any]:
  """Times, tokens a second, shares of the ceiling, memory, losses.

  Args:
    arguments: of the command.
    sizes: of the mesh.
    made: of `programs`, compiled.
    until: of `time.monotonic`; no round begins later, but the first.
  """
  gpus, job = arguments.gpus, made.step.job
  model, rows = job.run.model, job.run.data.batch
  count = models.counts(model, rows, arguments.seq)
  print(
    f"{arguments.model} over {dict(sizes)} by {arguments.strategy}: "
    f"{count.params / 1e9:.2f}e9 parameters, {count.active / 1e9:.2f}e9 active, "
    f"{count.tokens} tokens",
    flush=True,
  )
  state_gb = models.gigabytes(job.like)
  plan = planned(arguments, model, sizes, rows)
  print(f"  planned: {plan}", flush=True)
  compiled, compiling = made.step.compiled.result()
  print(f"  compiled in {compiling:.0f} s", flush=True)
  memory: Any = compiled.memory_analysis()
  said, state = [], made.step.state()

  def run(times: int) -> None:
    nonlocal state
    for _ in range(times):
      state, metrics, _ = compiled(state, job.put())
      # Of the tokens alone: what layers add to the loss is no part of the logarithm.
      said.append(metrics["bits_per_byte"] * math.log(2))
    jax.block_until_ready(state)

  run(3)
  peaks = [
    (device.memory_stats() or {}).get("peak_bytes_in_use", 0) / 1e9
    for device in job.spread.mesh.devices.flat
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
  arguments: argparse.Namespace, model: Any, sizes: dict[str, int], rows: int
) -> dict[str, Any]:
  """The planner's memory and time of a GPU for the same step."""
  from experiments.planning import ask

  try:
    return ask.planned(
      model, rows=rows, seq=arguments.seq, sizes=sizes, strategy=arguments.strategy
    )
  except ValueError as error:  # a chip that is not in its table
    return {"why": str(error)}


class _Position:
  """Where in the data a run is, as a checkpoint keeps it: here a number."""

  def __init__(self, at: int):
    self.at = at

  def get_state(self) -> dict[str, int]:
    return {"at": self.at}

  def set_state(self, state: dict[str, int]) -> None:
    self.at = state["at"]

  def start_prefetch(self) -> None:
    pass


def checkpoint(
  arguments: argparse.Namespace, sizes: dict[str, int], made: Programs
) -> dict[str, Any]:
  """Saved on all GPUs, restored on fewer of them over other axes; compared."""
  assert made.saved is not None
  job, first = made.saved.job, made.saved.compiled.result()[0]
  state, _, _ = first(made.saved.state(), job.put())
  with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
    path = epath.Path(folder) / "checkpoints"
    begin = time.perf_counter()
    saver = checkpoints.Checkpoints(path, {"model": arguments.model})
    saver.save(state, cast(Any, _Position(17)))
    saver.close()
    found: dict[str, Any] = {
      "layers": arguments.checkpoint_layers,
      "gb": sum(x.nbytes for x in jax.tree.leaves(state)) / 1e9,
      "from": dict(sizes),
      "save_s": time.perf_counter() - begin,
      "restored": [],
    }
    print(
      f"checkpoint of {found['gb']:.2f} GB from {found['from']}: saved in "
      f"{found['save_s']:.1f} s",
      flush=True,
    )
    kept = jax.device_get(state)
    loss = float(first(state, job.put())[1]["loss"])
    for fewer in made.restored:
      found["restored"].append(_restored(arguments, path, fewer, kept, loss))
  found["right"] = all(one["right"] for one in found["restored"])
  return found


def _restored(
  arguments: argparse.Namespace, path: Any, made: Made, kept: Any, loss: float
) -> dict[str, Any]:
  """Of one mesh: whether the arrays are those that were saved, and the next loss."""
  begin = time.perf_counter()
  reader = checkpoints.Checkpoints(path, {"model": arguments.model})
  at = _Position(0)
  state = jax.block_until_ready(reader.restore(made.job.like, cast(Any, at)))
  reader.close()
  seconds = time.perf_counter() - begin
  same = at.at == 17 and all(
    np.array_equal(_bits(one), _bits(other))
    for one, other in zip(jax.tree.leaves(kept), jax.tree.leaves(state), strict=True)
  )
  step = made.compiled.result()[0]
  again = float(step(state, made.job.put())[1]["loss"])
  found = {
    "to": dict(made.job.spread.sizes),
    "restore_s": seconds,
    "same_bits": same,
    "next_losses": [loss, again],
    "right": bool(same and abs(loss - again) < 2e-3 * loss),
  }
  print(
    f"  restored to {found['to']} in {seconds:.1f} s; the same bits: {same}; next "
    f"losses {loss:.5f} and {again:.5f}",
    flush=True,
  )
  return found


def _bits(x: Any) -> np.ndarray:
  array = np.asarray(jax.device_get(x))
  return array.view(np.uint16) if array.dtype == jnp.bfloat16 else array


def _show(found: dict[str, Any]) -> None:
  ms, gb, losses = found["ms"], found["gb"], found["losses"]
  print(
    f"  {statistics.median(ms):.1f} ms "
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
