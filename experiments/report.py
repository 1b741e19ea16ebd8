"""One page about runs: a file that needs no network, to be kept or sent to somebody.

  python -m experiments.report runs/tiny --out report.html
  python -m experiments.report runs/small runs/other --out both.html

Curves, load of every expert in every layer, drops by cause, entropy, dead experts,
which text each expert takes, alarms, costs; several runs beside each other.  A run may
still go on, or be dense; a dense one inside a run (`--compare-dense`) is shown too.

Exit codes: 0 done, 2 bad input, 130 stopped by Ctrl-C.
"""
# SPDX-License-Identifier: Apache-2.0

import argparse
import sys

from experiments import extras
from experiments.errors import BadConfig, BadData, Unreachable
from experiments.parser import Parser, run


def main(argv: list[str] | None = None) -> int:
  """Runs a command line; returns its exit code."""
  parser = Parser(
    prog="python -m experiments.report",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument("workdirs", nargs="+", metavar="DIR", help="of runs")
  parser.add_argument("--out", required=True, metavar="FILE", help="the page; replaced")
  arguments = parser.parse_args(argv)
  try:
    for module in ("matplotlib", "jinja2"):
      extras.check(module, "viz", needed_by="experiments.report")
    extras.check("etils", "train", needed_by="experiments.report")

    from experiments import workdir
    from experiments.reporting import page, read

    out = workdir.opened(arguments.out, "--out")
    runs = read.read_all(arguments.workdirs)
    if workdir.is_local(out) and not out.parent.exists():
      raise BadData(f"--out {out}: there is no folder {out.parent}; make it first.")
    if workdir.is_local(out) and out.is_dir():
      raise BadData(f"--out {out} is a folder; give a file.")
    with workdir.reaching(out):
      out.write_text(page.page(runs), encoding="utf-8")
  except (BadConfig, BadData, Unreachable, extras.MissingExtra, OSError) as error:
    print(f"error: {error}", file=sys.stderr)
    return 2
  print(f"{arguments.out}: {len(runs)} run{'s' if len(runs) > 1 else ''}")
  return 0


if __name__ == "__main__":
  run(main)
