"""Rows of the table: layers over devices, compiled at once, compared and timed."""
# SPDX-License-Identifier: Apache-2.0

import concurrent.futures
import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax

from experiments.benchmarks.mesh import errors, layer, variants
from experiments.benchmarks.mesh.layer import Way
from experiments.benchmarks.peers import rows
from experiments.benchmarks.shapes import Shape

ALONE = "one GPU"
ALL = "one GPU, all tokens"
_NUMBER = ", number "  # of a GPU that is not the first
NO_TIME = "no time was left"
# What the compiler must be told to move rows behind products.
HIDING: dict[str, str | bool] = {"xla_gpu_enable_latency_hiding_scheduler": True}


@dataclasses.dataclass(frozen=True)
class Job:
  """A program to compile: a layer and its arrays.

  Args:
    name: of the row.
    shape: of the layer, with the tokens of one device.
    way: over devices; None: on one.
    given: its arrays.
    routings: with which it is timed.
  """

  name: str
  shape: Shape
  way: Way | None
  given: layer.Operands
  mesh: Any
  routings: tuple[str, ...]


def compiled(
  jobs: Sequence[Job], *, threads: int, until: float
) -> Iterator[tuple[Job, Any]]:
  """Each job with its program, the first first, or with what was wrong.

  Args:
    jobs: what is compiled.
    threads: programs at a time.
    until: of `time.monotonic`; what has not begun by then is not.
  """
  with concurrent.futures.ThreadPoolExecutor(threads) as pool:
    made = [pool.submit(_compile, job, until) for job in jobs]
    for job, future in zip(jobs, made, strict=True):
      try:
        yield job, future.result()
      except Exception as error:  # of a compiler: any
        yield job, rows.Missing(job.name, rows.reason(error))


def _compile(job: Job, until: float) -> Any:
  if time.monotonic() > until:
    return rows.Missing(job.name, f"{NO_TIME} to compile it")
  begin = time.perf_counter()
  if job.way is None:
    function = layer.alone(job.shape)
  else:
    function = layer.sharded(job.shape, job.way, job.mesh)
  options = None
  if job.way and jax.default_backend() == "gpu":
    options = HIDING | (variants.COPIES if job.way.by_copies else {})
  lowered = jax.jit(layer.step(function)).lower(*job.given.like)
  program = lowered.compile(compiler_options=options)
  memory: Any = program.memory_analysis()
  needed = (
    memory.argument_size_in_bytes
    + memory.output_size_in_bytes
    + memory.temp_size_in_bytes
  )
  figures = {"gb": needed / 1e9, "compile_s": time.perf_counter() - begin}
  results = jax.tree.map(
    lambda a, where: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=where),
    lowered.out_info,
    program.output_shardings,
  )
  return program, figures, errors.compiled(job.given, job.routings, results)


def row(job: Job, made: Any, routing: str, lead: float = 0.0) -> Any:
  """A row that ran once and was compared with float32, or why there is none.

  Args:
    job: what was compiled.
    made: its program, figures and check, from `compiled`.
    routing: one of the job's.
    lead: seconds that it runs in each turn before it is timed.
  """
  program, figures, check = made
  try:
    arguments = job.given.arguments(*job.given.routed(routing))
    if (why := _too_large(program)) is not None:
      return rows.Missing(job.name, why)
    results = program(*arguments)
    figures = figures | check(arguments, results, routing)
    del results
  except Exception as error:  # out of memory, or a backend that lacks a collective
    return rows.Missing(job.name, rows.reason(error))

  def timed(kind: str, budget: float) -> float:
    del kind
    begin = time.monotonic()
    while time.monotonic() < begin + lead:
      jax.block_until_ready([program(*arguments) for _ in range(2)])
    return rows.span(lambda: program(*arguments), jax.block_until_ready, budget)

  return rows.Row(job.name, timed, figures)


def at_once(made: Sequence[Any]) -> list[Any]:
  """Rows of each GPU alone as one row: all of them work, as over a mesh.

  GPUs differ by some percent, and what runs over all of them waits for the slowest; and
  one at its power limit is slower than one that rested while another was timed.  The
  row's milliseconds are the mean, its figures the worst.
  """
  others = [one for one in made if single_row(one.name) is None]
  merged = []
  for kind in (ALONE, ALL):
    members = [one for one in made if single_row(one.name) == kind]
    if missing := [one for one in members if isinstance(one, rows.Missing)]:
      merged.append(rows.Missing(kind, missing[0].why))
    elif members:
      merged.append(_at_once(kind, members))
  return [*merged, *others]


def _at_once(kind: str, members: Sequence[rows.Row]) -> rows.Row:
  each: list[list[float]] = []

  def timed(kind: str, budget: float) -> float:
    with concurrent.futures.ThreadPoolExecutor(len(members)) as pool:
      each.append(list(pool.map(lambda one: one.timed(kind, budget), members)))
    return statistics.mean(each[-1])

  figures = {
    key: max(one.figures[key] for one in members) for key in members[0].figures
  }
  return rows.Row(kind, timed, figures | {"each_gpus_ms": each})


def _too_large(program: Any) -> str | None:
  """Why a program whose arguments are there cannot run, if it cannot."""
  stats = jax.devices()[0].memory_stats() or {}
  free = stats.get("bytes_limit", float("inf")) - stats.get("bytes_in_use", 0)
  memory: Any = program.memory_analysis()
  beside = memory.output_size_in_bytes + memory.temp_size_in_bytes
  if beside <= free:
    return None
  return f"needs {beside / 1e9:.0f} GB beside its arguments of {free / 1e9:.0f}"


def ways(
  n: int, strategies: Sequence[str], overlaps: Sequence[int], *,
  factor: float, room: float | None, routings: Sequence[str], copies: bool = False,
) -> Iterator[tuple[Way, tuple[str, ...]]]:  # fmt: skip
  """Each way over n devices, with its routings; arguments are those of `jobs`."""
  for strategy in strategies:
    equal = copies and strategy in ("all_to_all", layer.BY_EXCHANGE)
    for by_copies in (False, True) if equal else (False,):
      if strategy not in layer.BUCKETS:
        # More than all rows of all devices never come.
        bound = None if strategy == "gather" or room is None or room >= n else room
        yield Way(strategy, room=bound, copies=by_copies), tuple(routings)
        continue
      for overlap in overlaps if strategy == "all_to_all" else (1,):
        for routing in routings:
          fill = 1.0 if routing == "balanced" else factor
          way = Way(strategy, overlap, fill, copies=by_copies)
          if not way.unfit(n):
            yield way, (routing,)


def single_row(name: str) -> str | None:
  """`ALONE` or `ALL`, if a row is of one GPU: each GPU has its own, until `at_once`."""
  first = name.partition(_NUMBER)[0]
  return first if first in (ALONE, ALL) else None


def singles(shape: Shape) -> Callable[[int, int], layer.Operands]:
  """`(tokens, device) -> operands`, all of a device with the same matrices."""

  @functools.cache
  def single(tokens: int, device: int = 0) -> layer.Operands:
    if tokens == shape.tokens:
      return layer.operands(shape, tokens, None, device=device)
    base = single(shape.tokens, device)
    return layer.operands(shape, tokens, None, others=base, device=device)

  return single


def jobs(
  shape: Shape, n: int, strategies: Sequence[str], overlaps: Sequence[int], *,
  single: Callable[[int, int], layer.Operands], factor: float, room: float | None,
  routings: Sequence[str], copies: bool = False, everything: bool = True,
) -> list[Job]:  # fmt: skip
  """What is timed over n devices, each of which is also timed alone.

  Args:
    shape: of the layer, with the tokens of one device.
    n: devices; 1: the layer alone.
    strategies: in the order in which they are compiled.
    overlaps: chunks of `all_to_all`.
    single: of `singles`.
    factor: of capacity where routing is skewed; balanced loads fill slots exactly.
    room: of dropless buffers; None: for all rows that could come.
    routings: some of `layer.ROUTINGS`.
    copies: exchanges of equal parts by the GPUs' copy engines, too.
    everything: one device with the tokens of all, too.
  """

  def alone(kind: str, of: Shape) -> Iterator[Job]:
    for device in range(n):
      name = f"{kind}{_NUMBER}{device}" if device else kind
      given = single(of.tokens, device)
      yield Job(name, of, None, given, None, tuple(routings))

  made = list(alone(ALONE, shape))
  if n == 1:
    return made
  mesh = layer.mesh_of(n)
  given = layer.operands(shape, n * shape.tokens, mesh)
  for way, timed in ways(
    n, strategies, overlaps, factor=factor, room=room, routings=routings, copies=copies
  ):
    made.append(Job(str(way), shape, way, given, mesh, timed))
  if not everything:
    return made
  whole = dataclasses.replace(shape, tokens=n * shape.tokens)
  return [*made, *alone(ALL, whole)]


def summed_up(
  found: rows.Row, shape: Shape, n: int, alone_ms: dict[str, float], bound: float
) -> dict[str, Any]:
  """A row of the result.

  Args:
    found: the row, timed.
    shape: with the tokens of one device.
    n: devices.
    alone_ms: of one GPU, by `ALONE` and `ALL`.
    bound: FLOP/s of the ceiling.
  """
  ms = statistics.median(found.ms["step"])
  kind = single_row(found.name)
  devices = 1 if kind else n
  tokens = shape.tokens * (n if kind == ALL else 1)
  flops = dataclasses.replace(shape, tokens=tokens).flops(backward=True)
  entry: dict[str, Any] = {"name": found.name, "devices": devices} | found.figures
  entry |= {
    "step_ms": found.ms["step"],
    "tflops_per_gpu": flops / ms / 1e9,
    "share_of_ceiling": flops / ms * 1e3 / bound,
  }
  if ALONE in alone_ms:
    entry["share_of_one"] = alone_ms[ALONE] / ms * tokens / shape.tokens
  if ALL in alone_ms:  # the same total work
    entry["share_of_one_with_all"] = alone_ms[ALL] / n / ms * tokens / shape.tokens
  return entry


def shown(entry: dict[str, Any]) -> str:
  """A row in one line."""
  times = entry["step_ms"]
  shares = [entry.get("share_of_one"), entry.get("share_of_one_with_all")]
  said = " ".join("     -" if s is None else f"{s:6.3f}" for s in shares)
  return (
    f"  {entry['name']:<38}{statistics.median(times):9.2f} ms ({min(times):.2f} to "
    f"{max(times):.2f}){entry['tflops_per_gpu']:6.0f} TFLOP/s, of one GPU {said}, of "
    f"the ceiling {entry['share_of_ceiling']:.3f}; {entry['gb']:.1f} GB, dropped "
    f"{entry['dropped']:.4f}, errors {entry['error']:.4f} "
    f"{entry['gradient_error']:.4f} {entry['matrix_error']:.4f}"
  )
