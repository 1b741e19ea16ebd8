"""What the planner expects of `mesh_all`'s commands: predicted, not measured.

  python -m experiments.benchmarks.mesh_all.planned --gpus 8 --out FILE.json

Written before a run, so that the run can judge the planner (`mesh_all.compare`).  Of
layers: milliseconds forward and backward, and a GPU's rate over that of the same layer
on one GPU; loads are those that the benchmark draws, and only own first's exchanges are
hidden behind products.  Of links: GB/s.  Of training steps: milliseconds, tokens a
second, GB of a GPU.  `planning.rates` holds what it knows, all of it from one, two and
four H200s.
"""
# SPDX-License-Identifier: Apache-2.0

import argparse
import dataclasses
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from experiments.benchmarks.command import command
from experiments.benchmarks.mesh import (
  __main__ as mesh,
  build,
  layer as layers,
  links,
  planned,
)
from experiments.benchmarks.mesh_all.parts import LAYER, parts
from experiments.benchmarks.mesh_train import __main__ as train, measure, model
from experiments.benchmarks.shapes import Shape
from experiments.parser import Parser, run
from experiments.planning import alone, ask, exchanges, rates, topology as topologies
from experiments.planning.topology import Topology
from jmoe.parallel import mesh as meshes

_NAME = "experiments.benchmarks.mesh_all.planned"
# The benchmark's names of collectives -> the planner's.
_COLLECTIVES = {
  "all_to_all": "all_to_all",
  "ragged_all_to_all": "ragged_all_to_all",
  "all_gather": "all_gather",
  "psum_scatter": "reduce_scatter",
}


def main(argv: list[str] | None = None) -> int:
  """Runs a command line; returns its exit code."""
  parser = Parser(
    prog=f"python -m {_NAME}",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument("--gpus", type=int, default=8, help="of the host")
  parser.add_argument("--chip", default="H200", help="of the planner's table")
  parser.add_argument("--out", type=Path, required=True, help="JSON file")
  arguments = parser.parse_args(argv)
  words = sys.argv[1:] if argv is None else argv
  try:
    chips = topologies.parse(f"gpu:{arguments.gpus}x{arguments.chip}")
  except ValueError as error:
    parser.error(str(error))
  lines = {
    "what": "PREDICTED by the planner for commands of mesh_all, from rates of up to "
    "four H200s; no figure of this file was measured",
    "command": command(_NAME, words, without=("--out",)),
    "chips": chips.name,
    "parts": {},
  }
  folder = Path("DIR")
  for part in parts(arguments.gpus, folder, liger_site=folder):
    found = of_part(part.words, chips)
    if found:
      lines["parts"][part.name] = found
      print(f"{part.name}: {sum(len(x) for x in found.values())} figures", flush=True)
  arguments.out.parent.mkdir(parents=True, exist_ok=True)
  arguments.out.write_text(_text(lines))
  return 0


def of_part(words: tuple[str, ...], chips: Topology) -> dict[str, Any]:
  """Figures of one command; none of what the planner does not know."""
  module, *given = words
  if module == LAYER:
    asked = mesh.parser().parse_args(given)
    shape = layers.SHAPES[asked.shape]
    if asked.tokens:
      shape = dataclasses.replace(shape, tokens=asked.tokens)
    if asked.parts == "links":
      return {"links": list(_links(shape, asked.gpus, chips))}
    return {"layers": list(_layers(asked, shape, chips))}
  asked = train.parser().parse_args(given)
  # One layer whose checkpoint is wanted is no model.
  return {} if asked.checkpoint_layers else {"training": [_training(asked, chips)]}


def _layers(asked: Any, shape: Shape, chips: Topology) -> Iterator[dict[str, Any]]:
  sizes = [asked.gpus >> i for i in range(asked.gpus.bit_length() - 1)]
  routings = asked.routings.split(",")
  for n in sizes[:1] if asked.only_all else sizes:
    own = dataclasses.replace(shape, tokens=shape.tokens // (n if asked.total else 1))
    flops = own.flops(backward=True)
    for way, timed in build.ways(
      n, asked.strategies.split(","), (1,),
      factor=asked.factor, room=asked.room, routings=routings,
    ):  # fmt: skip
      if planned.strategy_of(str(way)) not in exchanges.STRATEGIES:
        continue  # the planner does not know it
      for routing in timed:
        balanced = routing == "balanced"
        one = planned.layer_of(own, n, balanced=balanced, factor=way.factor or 1.0)
        before, after = alone.seconds(one, planned.strategy_of(str(way)), chips)
        yield {
          "gpus": n,
          "routing": routing,
          "tokens": own.tokens,
          "name": str(way),
          "ms": _short(1e3 * after),
          "tflops_per_gpu": _short(flops / after / 1e12),
          "share_of_one": _short(before / after),
        }


def _links(shape: Shape, gpus: int, chips: Topology) -> Iterator[dict[str, Any]]:
  for n in (gpus >> i for i in range(gpus.bit_length() - 1)):
    extent = topologies.extents(chips, {"expert": n})["expert"]
    for what, size in links.sizes(shape, n).items():
      for name, collective in _COLLECTIVES.items():
        took = topologies.seconds(chips, extent, collective, size)
        entry = {"gpus": n, "collective": name, "size": what, "gb": _short(size / 1e9)}
        yield entry | {"gb_s": _short(size / took / 1e9)}


def _training(asked: Any, chips: Topology) -> dict[str, Any]:
  sizes = meshes.parse(asked.mesh or f"expert={asked.gpus}")
  made = measure.run_of(asked, sizes, asked.layers)
  rows = made.data.batch
  plan = ask.planned(
    made.model, rows=rows, seq=asked.seq, sizes=sizes, strategy=asked.strategy,
    chips=chips.name,
  )  # fmt: skip
  count, seconds = model.counts(made.model, rows, asked.seq), plan["ms"] / 1e3
  rate = count.flops / seconds / asked.gpus
  ceiling = chips.flops * rates.rates(chips.chip).product
  return {
    "model": asked.model,
    "mesh": sizes,
    "strategy": plan["strategy"],
    "rows": rows,
    "ms": _short(plan["ms"]),
    "tokens_per_s": _short(count.tokens / seconds),
    "tflops_per_gpu": _short(rate / 1e12),
    "share_of_ceiling": _short(rate / ceiling),
    "gb": _short(plan["gb"]),
  }


def _short(x: float) -> float:
  return float(f"{x:.4g}")


def _text(found: dict[str, Any]) -> str:
  """JSON with a figure in a line."""
  text = json.dumps(found | {"parts": None}, indent=1)
  inside = []
  for name, kinds in found["parts"].items():
    for kind, rows in kinds.items():
      listed = ",\n   ".join(map(json.dumps, rows))
      inside.append(f'  "{name}": {{"{kind}": [\n   {listed}\n  ]}}')
  return (
    text.replace('"parts": null', '"parts": {\n' + ",\n".join(inside) + "\n }") + "\n"
  )


if __name__ == "__main__":
  run(main)
