"""Training steps of a whole model on all GPUs of a host, and what a checkpoint costs.

  python -m experiments.benchmarks.mesh_train --gpus 8 --out FILE.json
  python -m experiments.benchmarks.mesh_train --gpus 8 --model qwen3-30b-a3b
  python -m experiments.benchmarks.mesh_train --gpus 4 --dry

The step of a training job (`experiments.spread`): rows of 4096 random tokens, bfloat16
parameters with float32 copies and moments of AdamW, the state donated; experts, and
with `--mesh fsdp=2,expert=4` matrices too, split over the GPUs.  It takes turns with
8192^3 products on one GPU, the ceiling.  FLOPs are 6 for each token and active
parameter, without the embedding, and causal attention.  Tokens' cross-entropy must
begin near the logarithm of the vocabulary and fall on the one batch.  Memory of a GPU
stands beside the planner's (`experiments.plan`).

Then a model of `--checkpoint-layers` layers is saved from all GPUs as a job saves it,
and restored on half of them and on a quarter, over other meshes: its arrays must be the
same bits and its next loss as close as sums in another order are.

Exit codes: 0 done, 2 bad arguments, 3 a result was wrong, 4 time was short for the
checkpoint.
"""
# SPDX-License-Identifier: Apache-2.0

import argparse
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from experiments.benchmarks.command import command, saved
from experiments.benchmarks.turns import HELP, turn
from experiments.parser import Parser, run

_NAME = "experiments.benchmarks.mesh_train"


def parser() -> Parser:
  """Of the command line."""
  made = Parser(
    prog=f"python -m {_NAME}",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  add = made.add_argument
  add("--gpus", type=int, default=2)
  add("--model", default="olmoe-1b-7b", metavar="NAME")
  add("--mesh", metavar="AXES", help="as in training; expert alone if left out")
  add("--strategy", default="all_gather", metavar="NAME", help="of sparse layers")
  add(
    "--room", type=float, default=2.0, help="rows of a device's buffer, over the mean"
  )
  add("--rows", type=int, help="of a GPU; the model's own if left out")
  add("--seq", type=int, default=4096)
  add("--keep", help="nothing, attention, hidden, most, all")
  add(
    "--loop",
    action=argparse.BooleanOptionalAction,
    default=None,
    help="over layers, whose arrays are then copied out of stacks and into them",
  )
  add("--layers", type=int, help="of the model; its own if left out")
  add("--rounds", type=int, default=5, help="of ceiling and steps")
  add("--checkpoint-layers", type=int, default=1, help="0: no checkpoint")
  add("--folder", type=Path, help="for the checkpoint; a temporary one if left out")
  add("--limit", type=float, default=570, help="seconds that all of it may take")
  add("--turn", type=Path, metavar="FILE", help=HELP)
  add("--dry", action="store_true", help="host devices and a tiny model, no GPU")
  add("--out", type=Path, help="JSON file for the figures, written as they come")
  return made


def main(argv: list[str] | None = None) -> int:
  """Runs a command line; returns its exit code."""
  arguments = parser().parse_args(argv)
  words = sys.argv[1:] if argv is None else argv
  without = ("--turn", "--out", "--folder")
  arguments.command = command(_NAME, words, without=without)
  if arguments.dry:
    from experiments.benchmarks.mesh.__main__ import pretend

    pretend(arguments.gpus)
    arguments.model, arguments.seq = "tiny", 32
  # What is left is for ragged exchanges, whose arrays lie in memory of their own.
  os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.85")
  try:
    asked = _asked(arguments)
  except ValueError as error:
    parser().error(str(error))
  return _run(arguments, *asked)


def _asked(arguments: argparse.Namespace) -> Any:
  """(name of the model, mesh sizes); what cannot be is refused."""
  import jax

  from experiments.benchmarks.mesh_train import model as models
  from experiments.benchmarks.olmoe_step import training
  from jmoe.parallel import mesh as meshes

  if arguments.model not in models.MODELS:
    raise ValueError(f"--model {arguments.model}: use {', '.join(models.MODELS)}")
  if arguments.strategy not in models.STRATEGIES:
    known = ", ".join(models.STRATEGIES)
    raise ValueError(f"--strategy {arguments.strategy}: use one of {known}")
  if arguments.keep is not None and arguments.keep not in training.KEEPS:
    raise ValueError(f"--keep {arguments.keep}: use {', '.join(training.KEEPS)}")
  gpus, there = arguments.gpus, len(jax.devices())
  if not 1 <= gpus <= there:
    raise ValueError(f"--gpus {gpus}: {there} devices are here")
  sizes = meshes.parse(arguments.mesh or f"expert={gpus}")
  meshes.check_product(sizes, gpus)
  return (sizes,)


def _run(arguments: argparse.Namespace, sizes: dict[str, int]) -> int:
  import jax

  from experiments.benchmarks.mesh_train import measure

  found: dict[str, Any] = {
    "what": "a training step over the GPUs of a host",
    "command": arguments.command,
    "device": jax.devices()[0].device_kind,
    "jax": jax.__version__,
    "mesh": sizes,
  }
  begin = time.monotonic()

  def save(**more: Any) -> None:
    found.update(more)
    if out := arguments.out:
      saved(out, found)

  # What could fail last goes first: a step takes long, a checkpoint does not.
  right = whole = True
  until = begin + arguments.limit
  with ThreadPoolExecutor(8) as pool:
    made = measure.programs(arguments, sizes, pool)
    for program in filter(None, (made.step, made.saved, *made.restored)):
      # A compiler that tries kernels would slow what is timed.
      program.compiled.result()
      if program.begun is not None:
        program.begun.result()
    with turn(arguments.turn) as waited:
      begin += waited
      step = measure.step(arguments, sizes, made, until=until + waited)
      save(step=step)
      right &= step["right"]
      if made.saved is not None:
        if time.monotonic() > begin + 0.8 * arguments.limit:
          whole = False
          save(checkpoint={"why": "no time was left"})
        else:
          checkpoint = measure.checkpoint(arguments, sizes, made)
          save(checkpoint=checkpoint)
          right &= checkpoint["right"]
  print(f"took {time.monotonic() - begin:.0f} s", flush=True)
  return 3 if not right else 0 if whole else 4


if __name__ == "__main__":
  run(main)
