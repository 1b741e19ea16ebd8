"""Runs beside each other: bits per byte, cost, speed, and compute to equal loss.

  python -m experiments.compare runs/small runs/small-dense
  python -m experiments.compare runs/sweep/* --json

Runs whose configs differ by their seeds alone are one arm.  The first arm is what the
others are compared with, over the seeds that both have: each difference is the other
arm minus the first one, with Student's 95 % interval of the mean of the differences of
equal seeds.

Compute to equal loss is how many times fewer training FLOPs the other arm needs to
reach the first one's final smoothed training loss, or the first one the other's, then
as a number under 1; `experiments.equal_loss` states the formula.  Over seeds it is the
geometric mean, with Student's interval of the logarithms.

A run with a dense one in it (`--compare-dense`) is both.  Runs that still go on are
shown with what they have.

Exit codes: 0 done, 2 bad input, 130 stopped by Ctrl-C.
"""
# SPDX-License-Identifier: Apache-2.0

import argparse
import json
import sys

from experiments import extras
from experiments.errors import BadData
from experiments.parser import Parser, run


def main(argv: list[str] | None = None) -> int:
  """Runs a command line; returns its exit code."""
  parser = Parser(
    prog="python -m experiments.compare",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument("workdirs", nargs="+", metavar="DIR", help="of runs")
  parser.add_argument("--json", action="store_true", help="print JSON, not a table")
  arguments = parser.parse_args(argv)
  try:
    extras.check("etils", "train", needed_by="experiments.compare")
    from experiments.reporting import comparison, read, table

    found = comparison.compared(read.read_all(arguments.workdirs))
  except (BadData, extras.MissingExtra, OSError) as error:
    print(f"error: {error}", file=sys.stderr)
    return 2
  print(json.dumps(found, indent=2) if arguments.json else table.table(found))
  return 0


if __name__ == "__main__":
  run(main)
