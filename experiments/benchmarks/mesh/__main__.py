"""A sparse layer over the GPUs of one host, by every strategy, and what its links move.

  python -m experiments.benchmarks.mesh --gpus 2 --shape qwen3 --out FILE.json
  python -m experiments.benchmarks.mesh --gpus 8 --shape dsv3-256 --total --limit 280
  python -m experiments.benchmarks.mesh --gpus 8 --dry

jmoe's layer from given choices (as `benchmarks.peers` times it on one GPU), forward and
all gradients, experts over 1, 2, 4, ... GPUs.  Beside it, in turn with it: the same
layer on each GPU by itself, all at once, with as many tokens as each GPU has and with
those of all.  "Of one GPU" is a GPU's rate over the means of these two.  Tokens of a
GPU stay as many (`--total`: the shape's tokens are those of all GPUs together).

  routings    balanced: every expert has as many tokens, capacity 1 drops none;
              skewed: log-normal popularity, capacity `--factor`
  strategies  of jmoe.dispatch, `gather`: matrices come to the tokens, and ways of them:
              "all_gather by ragged", "all_to_all own first" ...
  parts       layer; links: GB/s of collectives and of other ways to the same results,
              `ppermute` at equal bytes the limit;
              liger: liger-cute-kernels' expert-parallel layer, from `--liger-site`

For four tokens the output and the gradients are compared with float32, and the gradient
of one expert's last matrix, a sum over all devices.  Figures are written as they come.

Exit codes: 0 done, 2 bad arguments, 3 a result was wrong, 4 time was short for some.
"""
# SPDX-License-Identifier: Apache-2.0

import argparse
import os
import sys
from pathlib import Path

from experiments.benchmarks.command import command
from experiments.benchmarks.turns import HELP
from experiments.parser import Parser, run

_NAME = "experiments.benchmarks.mesh"
_STRATEGIES = (
  "all_gather,all_to_all,ragged_all_to_all,hierarchical,deduplicated,gather,einsum"
)


def parser() -> Parser:
  """Of the command line."""
  made = Parser(
    prog=f"python -m {_NAME}",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  add = made.add_argument
  add("--gpus", type=int, default=2, help="of the host, a power of two")
  add("--only-all", action="store_true", help="all GPUs, not 1, 2, 4 of them as well")
  add("--shape", default="tiny", metavar="NAME")
  add("--tokens", type=int, help="of a GPU; the shape's own if left out")
  add("--total", action="store_true", help="the tokens are those of all GPUs together")
  add("--strategies", default=_STRATEGIES, metavar="A,B")
  add("--routings", default="balanced,skewed", metavar="A,B")
  add("--overlaps", default="1,2", metavar="N,M", help="chunks of all_to_all")
  add("--no-all", action="store_true", help="not all tokens on one GPU")
  add("--copies", action="store_true", help="all-to-alls by copy engines, too")
  add("--factor", type=float, default=1.25, help="of capacity, skewed routing")
  add("--room", type=float, default=2.0, help="rows of a dropless buffer over the mean")
  add("--parts", default="links,layer,liger", metavar="A,B")
  add("--rounds", type=int, default=10)
  add(
    "--lead",
    type=float,
    default=0.0,
    metavar="S",
    help="seconds that a row runs before it is timed: at the GPUs' power limit",
  )
  add("--threads", type=int, default=6, help="programs compiled at a time")
  add("--limit", type=float, default=280, help="seconds that all of it may take")
  add(
    "--measuring",
    type=float,
    metavar="S",
    help="seconds of it for figures; no round begins later",
  )
  add("--turn", type=Path, metavar="FILE", help=HELP)
  add("--liger-site", type=Path, metavar="DIR", help="an unpacked liger-cute-kernels")
  add("--dry", action="store_true", help="host devices and a tiny layer, no GPU")
  add("--out", type=Path, help="JSON file for the figures")
  return made


def main(argv: list[str] | None = None) -> int:
  """Runs a command line; returns its exit code."""
  arguments = parser().parse_args(argv)
  words = sys.argv[1:] if argv is None else argv
  arguments.command = command(_NAME, words, without=("--turn", "--out"))
  if arguments.dry:
    pretend(arguments.gpus)
  # Other processes may share the GPUs: nobody takes all memory at once.
  os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
  for name in ("NCCL_MIN_CTAS", "NCCL_MIN_NCHANNELS"):  # a tenth faster, by `links`
    os.environ.setdefault(name, "32")
  share = "0.80" if arguments.liger_site else "0.92"
  os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", share)
  from experiments.benchmarks.mesh.session import Session  # imports jax

  try:
    session = Session(arguments)
  except ValueError as error:
    parser().error(str(error))
  return session.run()


def pretend(gpus: int) -> None:
  """As many host devices; before jax makes a backend."""
  os.environ.setdefault("JAX_PLATFORMS", "cpu")
  import jax

  try:
    # There is a thread for each: calls that wait for one another need more.
    jax.config.update("jax_num_cpu_devices", max(8, 2 * gpus))
  except RuntimeError:  # there is one, as in a test: it must have enough
    pass


if __name__ == "__main__":
  run(main)
