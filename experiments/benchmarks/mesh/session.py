"""One run of the benchmark: all its programs compiled, then measured in turn."""
# SPDX-License-Identifier: Apache-2.0

import argparse
import dataclasses
import os
import statistics
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax

from experiments.benchmarks import shapes
from experiments.benchmarks.command import saved
from experiments.benchmarks.mesh import build, layer, liger, links
from experiments.benchmarks.peers import rows
from experiments.benchmarks.turns import turn

PARTS = ("layer", "links", "liger")
_STEADY = 0.5  # seconds that a row is timed for behind a lead
_COMPILING = 0.6  # of the time; what has not begun by then is not compiled


@dataclasses.dataclass
class Size:
  """What is measured over n devices."""

  n: int
  shape: shapes.Shape  # with the tokens of one device
  jobs: list[build.Job]
  peer: liger.Peer | None


class Session:
  """One run: what was asked for, and what has come so far.

  Raises:
    ValueError: an argument that cannot be served, in one line.
  """

  def __init__(self, arguments: argparse.Namespace):
    self.begin, self.arguments = time.monotonic(), arguments
    self.late: list[str] = []  # for which no time was left
    known = (*layer.BUCKETS, *layer.DROPLESS)
    self.strategies = _listed("strategies", arguments.strategies, known)
    self.routings = _listed("routings", arguments.routings, layer.ROUTINGS)
    self.parts = _listed("parts", arguments.parts, PARTS)
    self.overlaps = tuple(int(n) for n in arguments.overlaps.split(","))
    gpus, there = arguments.gpus, len(jax.devices())
    if gpus < 1 or gpus & (gpus - 1):
      raise ValueError(f"--gpus {gpus}: give a power of two")
    if gpus > there:
      raise ValueError(f"--gpus {gpus}: {there} devices are here; give {there} at most")
    if arguments.shape not in layer.SHAPES:
      raise ValueError(f"--shape {arguments.shape}: use {', '.join(layer.SHAPES)}")
    shape = layer.SHAPES[arguments.shape]
    if arguments.dry:
      shape = dataclasses.replace(layer.SHAPES["tiny"], d_model=64, d_ff=32, tokens=64)
    if arguments.tokens:
      shape = dataclasses.replace(shape, tokens=arguments.tokens)
    if shape.num_experts % gpus:
      raise ValueError(f"--gpus {gpus} does not divide {shape.num_experts} experts")
    self.shape = shape
    self.sizes = [gpus]
    while self.sizes[-1] > 1 and not arguments.only_all:
      self.sizes.append(self.sizes[-1] // 2)
    self.found: dict[str, Any] = {
      "what": "a sparse layer over the GPUs of a host",
      "command": arguments.command,
      "shape": dataclasses.asdict(shape) | {"name": arguments.shape},
      "device": jax.devices()[0].device_kind,
      "jax": jax.__version__,
      "environment": {
        name: value
        for name, value in sorted(os.environ.items())
        if name.startswith("NCCL_") or name == "XLA_FLAGS"
      },
      "groups": [],
      "links": [],
    }

  def save(self) -> None:
    """What there is, so that a run that is cut off leaves it."""
    if out := self.arguments.out:
      saved(out, self.found)

  def run(self) -> int:
    """The exit code."""
    limit, right = self.arguments.limit, True
    sizes = self._sizes()
    programs = self._compiled(sizes, self.begin + _COMPILING * limit)
    with turn(self.arguments.turn) as waited:
      self.begin += waited
      self.end = self.begin + limit
      if self.arguments.measuring is not None:
        self.end = min(self.end, time.monotonic() + self.arguments.measuring)
      if "links" in self.parts:
        self._links()
      for i, size in enumerate(sizes):
        if i and time.monotonic() > self.begin + 0.95 * limit:
          self._left_out(f"EP {size.n}")
          continue
        left = max(0.0, self.end - time.monotonic())
        weight = sum(other.n + 1 for other in sizes[i:])
        until = time.monotonic() + left * (size.n + 1) / weight
        right &= self._layers(size, programs, until)
    for name, why in self._missing():
      if build.NO_TIME in why:
        self.late.append(name)
    self.found["late"] = self.late
    self.save()
    print(f"took {time.monotonic() - self.begin:.0f} s", flush=True)
    return 3 if not right else 4 if self.late else 0

  def _missing(self) -> Iterator[tuple[str, str]]:
    for group in self.found["groups"]:
      yield from group["missing"].items()
    for one in self.found["links"]:
      if "why" in one:
        yield one["collective"], one["why"]

  def _left_out(self, what: str) -> None:
    self.late.append(what)
    print(f"{what}: {build.NO_TIME}", flush=True)

  def _sizes(self) -> list[Size]:
    """Jobs over each number of devices; peers begin to load and compile."""
    arguments, sizes = self.arguments, []
    only_liger = "layer" not in self.parts
    if only_liger and "liger" not in self.parts:
      return []
    single = build.singles(self.shape)
    for n in self.sizes[:1] if only_liger else self.sizes:
      shape = self.shape
      if arguments.total:
        shape = dataclasses.replace(shape, tokens=shape.tokens // n)
      made = build.jobs(
        shape, n, () if only_liger else self.strategies, self.overlaps,
        single=single, factor=arguments.factor, room=arguments.room,
        routings=self.routings, copies=arguments.copies,
        everything=not arguments.no_all,
      )  # fmt: skip
      peer = None
      if n > 1 and "liger" in self.parts:
        peer = liger.Peer(shape, n, arguments.liger_site, dry=arguments.dry)
      sizes.append(Size(n, shape, made, peer))
    return sizes

  def _compiled(self, sizes: list[Size], until: float) -> dict[build.Job, Any]:
    """The programs of all jobs; jobs that sizes share are compiled once."""
    wanted = dict.fromkeys(job for size in sizes for job in size.jobs)
    print(f"{len(wanted)} programs", flush=True)
    programs = {}
    made = build.compiled(list(wanted), threads=self.arguments.threads, until=until)
    with ThreadPoolExecutor(1) as pool:
      pool.submit(self._ceiling)
      for given in dict.fromkeys(job.given for job in wanted):
        pool.submit(given.prepare, self.routings)
      for job, program in made:
        failed = getattr(program, "why", None)
        said = failed or f"compiled in {program[1]['compile_s']:.0f} s"
        devices = job.mesh.size if job.mesh else 1
        print(f"  {devices} GPUs, {job.name:<38}{said}", flush=True)
        programs[job] = program
    return programs

  def _ceiling(self) -> float:
    """FLOP/s of square products; the first call compiles them."""
    return shapes.ceiling(128 if self.arguments.dry else None, repeats=1)

  def _links(self) -> None:
    sizes = [n for n in self.sizes if n > 1]
    share = 1.0 if self.parts == ("links",) else 0.15
    left = share * (self.end - time.monotonic())
    rounds = min(5, self.arguments.rounds)
    for i, n in enumerate(sizes):
      found = links.measured(
        self.shape,
        n,
        rounds=rounds,
        until=time.monotonic() + left / len(sizes),
        threads=self.arguments.threads,
        tiny=self.arguments.dry,
      )
      for entry in found:
        print(links.shown(entry), flush=True)
      self.found["links"] += found
      self.save()
      if time.monotonic() > self.end and (left_out := sizes[i + 1 :]):
        self._left_out(f"links of {left_out} GPUs")
        break

  def _layers(self, size: Size, programs: dict[build.Job, Any], until: float) -> bool:
    """All rows over n devices; whether they were right."""
    right = True
    for i, routing in enumerate(self.routings):
      left = max(0.0, until - time.monotonic())
      stop = time.monotonic() + left / (len(self.routings) - i)
      right &= self._group(size, routing, programs, stop)
    for job in size.jobs:
      if job.mesh is not None:  # what is on one device serves the next size too
        job.given.forget()
    if size.peer is not None:
      size.peer.close()
    return right

  def _group(
    self, size: Size, routing: str, programs: dict[build.Job, Any], until: float
  ) -> bool:
    """Rows of one routing in turn."""
    n, shape = size.n, size.shape
    made: list[Any] = []
    for job in size.jobs:
      if routing not in job.routings:
        continue
      program = programs[job]
      failed = isinstance(program, rows.Missing)
      lead = self.arguments.lead
      made.append(program if failed else build.row(job, program, routing, lead))
    made = build.at_once(made)
    if size.peer is not None:
      made.append(size.peer.row(routing))
    group: dict[str, Any] = {"gpus": n, "routing": routing, "tokens": shape.tokens}
    self.found["groups"].append(group)
    ready = [row for row in made if isinstance(row, rows.Row)]
    ceilings: list[float] = []

    def ceiling() -> float:
      ceilings.append(self._ceiling())
      return ceilings[-1]

    def sum_up() -> None:
      bound = statistics.median(ceilings) if ceilings else float("nan")
      timed = [row for row in ready if row.ms.get("step") and not row.why]
      medians = {row.name: statistics.median(row.ms["step"]) for row in timed}
      alone = {kind: ms for kind, ms in medians.items() if build.single_row(kind)}
      group["rows"] = [build.summed_up(row, shape, n, alone, bound) for row in timed]
      group["ceilings_tflops"] = [rate / 1e12 for rate in ceilings]
      group["missing"] = {row.name: row.why for row in made if row.why}
      self.save()

    rows.in_turn(
      ready,
      ceiling,
      self.arguments.rounds,
      turn=_STEADY if self.arguments.lead else rows.TURN,
      kinds=("step",),
      until=until,
      after=sum_up,
    )
    sum_up()
    print(f"EP {n}, {routing} routing, {shape.tokens} tokens a GPU", flush=True)
    for entry in group["rows"]:
      print(build.shown(entry), flush=True)
    for name, why in group["missing"].items():
      print(f"  {name:<38}missing: {why}", flush=True)
    if ceilings:
      print(f"  ceiling {statistics.median(ceilings) / 1e12:.0f} TFLOP/s", flush=True)
    if bad := _wrong(group["rows"]):
      print(f"error: wrong result of {', '.join(bad)}", file=sys.stderr, flush=True)
    return not bad


def _listed(what: str, text: str, known: Any) -> tuple[str, ...]:
  names = tuple(filter(None, text.split(",")))
  for name in names:
    if name not in known:
      raise ValueError(f"--{what} {name}: use some of {', '.join(known)}")
  return names


def _wrong(found: list[dict[str, Any]]) -> list[str]:
  """Rows that dropped nothing and still differ from float32."""

  def bad(row: dict[str, Any]) -> bool:
    gaps = [row.get(k, 0.0) for k in ("error", "gradient_error", "matrix_error")]
    return row["dropped"] == 0 and not all(gap < rows.WRONG for gap in gaps)

  return [row["name"] for row in found if bad(row)]
