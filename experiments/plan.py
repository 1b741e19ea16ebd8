"""What a run would need on many chips, before one is paid for: no hardware, no plugin.

  python -m experiments.plan --config mixtral:8x7b --topology v5p:4x4x4 \
    --mesh fsdp=8,expert=8

Prints memory of a device, FLOPs, bytes of every collective, drops under a stated skew,
the predicted time, the largest batch that fits, and the strategies ranked.  `--compile`
(extra `aot`) also compiles the real step for a TPU topology, on this CPU.

Exit codes: 0 done; 2 bad input; 3 nothing fits.
"""
# SPDX-License-Identifier: Apache-2.0

import argparse
import sys

from experiments.parser import Parser, run as ended


def main(argv: list[str] | None = None) -> int:
  """Runs a command line; returns its exit code."""
  parser = Parser(
    prog="python -m experiments.plan",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  add = parser.add_argument
  add(
    "--config", required=True, metavar="NAME",
    help="of experiments.configs, or a published model as olmoe:1b-7b",
  )  # fmt: skip
  add(
    "--mesh", required=True, metavar="AXES",
    help="data=..,fsdp=..,expert=..,tensor=..,context=..; each of size one if left out",
  )  # fmt: skip
  add(
    "--topology", required=True, metavar="CHIPS",
    help="v5e:16x16, v5p:4x4x4, ..., gpu:8xH200, or gpu:4x8xH200 for four hosts",
  )  # fmt: skip
  add("--strategy", metavar="NAME", help="of sparse layers; the fastest if left out")
  add(
    "--set", action="append", default=[], metavar="PATH=VALUE",
    help="as for experiments.main: data.batch=512, param_dtype=float32",
  )  # fmt: skip
  add(
    "--capacity-factor", type=float, default=1.25,
    help="of strategies with buckets, where the model has no capacity (1.25)",
  )  # fmt: skip
  add(
    "--skew", type=float, default=0.3,
    help="standard deviation of the log of experts' popularity (0.3)",
  )  # fmt: skip
  add(
    "--compile", action="store_true",
    help="also compile the step for the TPU topology; needs the extra aot",
  )  # fmt: skip
  arguments = parser.parse_args(argv)
  try:
    return _planned(arguments)
  except (ValueError, TypeError, ImportError) as error:
    print(f"error: {error}", file=sys.stderr)
    return 2


def _planned(arguments: argparse.Namespace) -> int:
  from experiments import extras

  extras.check("optax", "train", needed_by="experiments.plan")
  from experiments.planning import mesh as meshes, models, report, step, topology
  from experiments.settings import with_settings
  from jmoe.checks import finite_positive

  chips = topology.parse(arguments.topology)
  mesh = meshes.parse(arguments.mesh, chips)
  finite_positive("--capacity-factor", arguments.capacity_factor, "")
  if not 0 <= arguments.skew < 10:
    raise ValueError(f"--skew {arguments.skew}: give a number of 0 to 10.")
  run = with_settings(models.load(arguments.config, rows=mesh.rows), arguments.set)
  meshes.check(run, mesh)
  question = step.Question(run, mesh, chips, arguments.capacity_factor, arguments.skew)
  names = step.possible(question)
  if arguments.strategy is not None and arguments.strategy not in names:
    raise ValueError(step.refusal(question, arguments.strategy))
  ranked = step.ranked(question)
  here = [p for p in ranked if p.question.mesh == mesh]
  chosen = here[0]
  if arguments.strategy is not None:
    chosen = next(p for p in here if p.strategy == arguments.strategy)
  if arguments.compile:
    from experiments.planning import compiled

    compiled.check(question, chosen.strategy)
  batch = step.largest_batch(question, chosen.strategy)
  report.show(question, chosen, batch)
  report.show_ranking(question, ranked)
  if arguments.compile:
    from experiments.planning import compiled

    found = compiled.measured(question, chosen.strategy)
    compiled.show(question, chosen.strategy, found)
  return 0 if any(p.fits for p in ranked) or batch else 3


if __name__ == "__main__":
  ended(main)
