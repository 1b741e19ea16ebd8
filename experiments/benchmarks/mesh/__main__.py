"""A sparse layer over the GPUs of one host, by every strategy, and what its links move.

  python -m experiments.benchmarks.mesh --gpus 2 --shape qwen3 --out FILE.json
  python -m experiments.benchmarks.mesh --gpus 8 --shape dsv3-256 --total --limit 280
  python -m experiments.benchmarks.mesh --gpus 8 --dry

jmoe's layer from given choices (as `benchmarks.peers` times it on one GPU), forward and
all gradients, experts over 1, 2, 4, ... GPUs.  Beside it, in turn with it: the same
layer on one of the GPUs, with as many tokens as each GPU has and with those of all.
"Of one GPU" is a GPU's rate over these two.  Tokens of a GPU stay as many (`--total`:
the shape's tokens are those of all GPUs together).

  routings    balanced: every expert has as many tokens, capacity 1 drops none;
              skewed: log-normal popularity, capacity `--factor`
  strategies  of jmoe.dispatch, and `gather`: matrices come to the tokens
  parts       layer; links: GB/s of collectives and of other ways to the same results,
              `ppermute` at equal bytes the limit;
              liger: liger-cute-kernels' expert-parallel layer, from `--liger-site`

For four tokens the output and the gradients are compared with float32, and the gradient
of one expert's last matrix, a sum over all devices.  Figures are written as they come.

Exit codes: 0 done, 2 bad arguments, 3 a result was wrong.
"""
# SPDX-License-Identifier: Apache-2.0

import argparse
import dataclasses
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from experiments.benchmarks.command import command
from experiments.benchmarks.turns import HELP, turn
from experiments.parser import Parser, run

_NAME = "experiments.benchmarks.mesh"
PARTS = ("layer", "links", "liger")
_STRATEGIES = "all_gather,all_to_all,ragged_all_to_all,hierarchical,deduplicated,gather"


def main(argv: list[str] | None = None) -> int:
  """Runs a command line; returns its exit code."""
  parser = Parser(
    prog=f"python -m {_NAME}",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  add = parser.add_argument
  add("--gpus", type=int, default=2, help="of the host, a power of two")
  add("--only-all", action="store_true", help="all GPUs, not 1, 2, 4 of them as well")
  add("--shape", default="tiny", metavar="NAME")
  add("--tokens", type=int, help="of a GPU; the shape's own if left out")
  add("--total", action="store_true", help="the tokens are those of all GPUs together")
  add("--strategies", default=_STRATEGIES, metavar="A,B")
  add("--routings", default="balanced,skewed", metavar="A,B")
  add("--overlaps", default="1,2", metavar="N,M", help="chunks of all_to_all")
  add("--copies", action="store_true", help="all-to-alls by copy engines, too")
  add("--factor", type=float, default=1.25, help="of capacity, skewed routing")
  add("--room", type=float, default=2.0, help="rows of a dropless buffer over the mean")
  add("--parts", default="links,layer,liger", metavar="A,B")
  add("--rounds", type=int, default=10)
  add("--threads", type=int, default=6, help="programs compiled at a time")
  add("--limit", type=float, default=280, help="seconds that all of it may take")
  add("--turn", type=Path, metavar="FILE", help=HELP)
  add("--liger-site", type=Path, metavar="DIR", help="an unpacked liger-cute-kernels")
  add("--dry", action="store_true", help="host devices and a tiny layer, no GPU")
  add("--out", type=Path, help="JSON file for the figures")
  arguments = parser.parse_args(argv)
  words = sys.argv[1:] if argv is None else argv
  arguments.command = command(_NAME, words, without=("--turn", "--out"))
  if arguments.dry:
    pretend(arguments.gpus)
  # Other processes may share the GPUs: nobody takes all memory at once.
  os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
  share = "0.80" if arguments.liger_site else "0.92"
  os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", share)
  try:
    session = Session(arguments)
  except ValueError as error:
    parser.error(str(error))
  return session.run()


def pretend(gpus: int) -> None:
  """As many host devices; before jax makes a backend."""
  os.environ.setdefault("JAX_PLATFORMS", "cpu")
  import jax

  try:
    jax.config.update("jax_num_cpu_devices", max(8, gpus))
  except RuntimeError:  # there is one, as in a test: it must have enough
    pass


def _listed(what: str, text: str, known: Any) -> tuple[str, ...]:
  names = tuple(filter(None, text.split(",")))
  for name in names:
    if name not in known:
      raise ValueError(f"--{what} {name}: use some of {', '.join(known)}")
  return names


class Session:
  """One run: what was asked for, and what has come so far."""

  def __init__(self, arguments: argparse.Namespace):
    import jax

    from experiments.benchmarks.mesh import layer

    self.begin, self.arguments = time.monotonic(), arguments
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

  @property
  def end(self) -> float:
    return self.begin + self.arguments.limit

  def save(self) -> None:
    """What there is, so that a run that is cut off leaves it."""
    if out := self.arguments.out:
      out.parent.mkdir(parents=True, exist_ok=True)
      out.write_text(json.dumps(self.found, indent=1) + "\n")

  def run(self) -> int:
    if "links" in self.parts and self.arguments.gpus > 1:
      self._links()
    right = True
    if "layer" in self.parts:
      for i, n in enumerate(self.sizes):
        left = self.end - time.monotonic()
        if left < 0.05 * self.arguments.limit:
          print(f"EP {n}: no time was left", flush=True)
          continue
        weight = sum(self.sizes[i:]) + len(self.sizes[i:])
        right &= self._layers(n, time.monotonic() + left * (n + 1) / weight)
    elif "liger" in self.parts:
      self._layers(self.sizes[0], self.end, only_liger=True)
    self.save()
    print(f"took {time.monotonic() - self.begin:.0f} s", flush=True)
    return 0 if right else 3

  def _links(self) -> None:
    from experiments.benchmarks.mesh import links

    n, share = self.arguments.gpus, 1.0 if self.parts == ("links",) else 0.15
    until = time.monotonic() + share * self.arguments.limit
    print(f"links of {n} GPUs", flush=True)
    rounds = min(5, self.arguments.rounds)
    with turn(self.arguments.turn) as waited:
      self.found["links"] = links.measured(
        self.shape, n, rounds=rounds, until=until + waited, tiny=self.arguments.dry
      )
    self.begin += waited
    for entry in self.found["links"]:
      print(links.shown(entry), flush=True)
    self.save()

  def _layers(self, n: int, until: float, *, only_liger: bool = False) -> bool:
    """All rows over n devices; whether they were right."""
    from experiments.benchmarks.mesh import build, liger

    arguments, shape = self.arguments, self.shape
    if arguments.total:
      shape = dataclasses.replace(shape, tokens=shape.tokens // n)
    compiling = time.monotonic() + 0.6 * (until - time.monotonic())
    peer = None
    if n > 1 and "liger" in self.parts:
      peer = liger.Peer(shape, n, arguments.liger_site, dry=arguments.dry)
    made = build.jobs(
      shape, n, () if only_liger else self.strategies, self.overlaps,
      factor=arguments.factor, room=arguments.room, routings=self.routings,
      copies=arguments.copies,
    )  # fmt: skip
    print(f"EP {n}, {shape.tokens} tokens a GPU: {len(made)} programs", flush=True)
    programs = []
    for job, program in build.compiled(
      made, threads=arguments.threads, until=compiling
    ):
      failed = getattr(program, "why", None)
      said = failed or f"compiled in {program[1]['compile_s']:.0f} s"
      print(f"  {job.name:<38}{said}", flush=True)
      programs.append((job, program))
    right = True
    with turn(arguments.turn) as waited:
      until += waited
      self.begin += waited
      for i, routing in enumerate(self.routings):
        left = max(0.0, until - time.monotonic())
        stop = time.monotonic() + left / (len(self.routings) - i)
        right &= self._group(n, shape, routing, programs, peer, stop)
    if peer is not None:
      peer.close()
    return right

  def _group(
    self, n: int, shape: Any, routing: str, programs: Any, peer: Any, until: float
  ) -> bool:
    """Rows of one routing in turn."""
    from experiments.benchmarks import shapes
    from experiments.benchmarks.mesh import build
    from experiments.benchmarks.peers import rows

    made: list[Any] = []
    for job, program in programs:
      if routing not in job.routings:
        continue
      failed = isinstance(program, rows.Missing)
      made.append(program if failed else build.row(job, program, routing))
    if peer is not None:
      made.append(peer.row(routing))
    group: dict[str, Any] = {"gpus": n, "routing": routing, "tokens": shape.tokens}
    self.found["groups"].append(group)
    ready = [row for row in made if isinstance(row, rows.Row)]
    ceilings: list[float] = []

    def ceiling() -> float:
      ceilings.append(shapes.ceiling(128 if self.arguments.dry else None, repeats=1))
      return ceilings[-1]

    def sum_up() -> None:
      bound = statistics.median(ceilings)
      timed = [row for row in ready if row.ms.get("step") and not row.why]
      alone = {
        row.name: statistics.median(row.ms["step"])
        for row in timed
        if row.name in (build.ALONE, build.ALL)
      }
      group["rows"] = [build.summed_up(row, shape, n, alone, bound) for row in timed]
      group["ceilings_tflops"] = [rate / 1e12 for rate in ceilings]
      group["missing"] = {row.name: row.why for row in made if row.why}
      self.save()

    rows.in_turn(
      ready, ceiling, self.arguments.rounds, kinds=("step",), until=until, after=sum_up
    )
    sum_up()
    print(f"EP {n}, {routing} routing, {shape.tokens} tokens a GPU", flush=True)
    for entry in group["rows"]:
      print(build.shown(entry), flush=True)
    for name, why in group["missing"].items():
      print(f"  {name:<38}missing: {why}", flush=True)
    print(f"  ceiling {statistics.median(ceilings) / 1e12:.0f} TFLOP/s", flush=True)
    if bad := _wrong(group["rows"]):
      print(f"error: wrong result of {', '.join(bad)}", file=sys.stderr, flush=True)
    return not bad


def _wrong(found: list[dict[str, Any]]) -> list[str]:
  """Rows that dropped nothing and still differ from float32."""
  from experiments.benchmarks.peers.rows import WRONG

  def bad(row: dict[str, Any]) -> bool:
    gaps = [row.get(k, 0.0) for k in ("error", "gradient_error", "matrix_error")]
    return row["dropped"] == 0 and not all(gap < WRONG for gap in gaps)

  return [row["name"] for row in found if bad(row)]


if __name__ == "__main__":
  run(main)
