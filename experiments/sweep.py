"""Runs of several configs, settings and seeds, each in its own folder.

  python -m experiments.sweep --config tiny --seeds 0,1,2 --out runs/seeds
  python -m experiments.sweep --config small --config tiny --seeds 0,1 \\
    --grid optim.learning_rate=1e-3,3e-3 --set steps=500 --out runs/rates
  python -m experiments.sweep ... --slurm sweep.sbatch --sbatch --gres=gpu:1

One cell is a config, a value of each --grid, and a seed.  The same command goes on:
cells that are finished are skipped, those that were stopped resume, and those that
failed are tried again.  A failure does not stop the others; it is listed at the end.

With --slurm nothing is run: the file is an array job, one task a cell, that may be
submitted again and again until all cells are finished.

Exit codes: 0 all finished (or listed, or written), 1 some failed, 2 bad input,
130 stopped by Ctrl-C, 143 by SIGTERM.
"""
# SPDX-License-Identifier: Apache-2.0

import argparse
import pathlib
import sys

from experiments import configs, extras
from experiments.parser import Parser, run


def parser() -> argparse.ArgumentParser:
  """Of the command line."""
  made = Parser(
    prog="python -m experiments.sweep",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  add = made.add_argument
  add(
    "--config",
    action="append",
    required=True,
    metavar="NAME",
    help=f"once or more; of {', '.join(configs.names())}",
  )
  add("--seeds", default="0", metavar="N,N", help="of parameters; 0 if not given")
  add("--set", action="append", default=[], metavar="PATH=VALUE", help="in every cell")
  add(
    "--grid",
    action="append",
    default=[],
    metavar="PATH=VALUE,VALUE",
    help="each value with each of the other grids",
  )
  add("--out", required=True, metavar="DIR", help="of the cells' folders")
  add("--cache", metavar="DIR", help="of data sets; as of experiments.main")
  add("--jobs", type=int, metavar="N", help="cells at a time; 1 if not given")
  add("--dry-run", action="store_true", help="list the cells and how far they are")
  add("--slurm", metavar="FILE", help="write an array job instead of running")
  add(
    "--sbatch",
    action="append",
    default=[],
    metavar="OPTION",
    help="of the array job, e.g. --sbatch=--time=2:00:00",
  )
  add("--cell", type=int, metavar="N", help="run only this one of the list")
  return made


def main(argv: list[str] | None = None) -> int:
  """Runs a command line; returns its exit code."""
  made = parser()
  arguments = made.parse_args(argv)
  if arguments.jobs is not None and arguments.jobs < 1:
    made.error(f"--jobs {arguments.jobs}: give 1 or more")
  if arguments.sbatch and not arguments.slurm:
    made.error("--sbatch is for --slurm FILE; give both")
  if arguments.slurm and arguments.cell is not None:
    made.error("--slurm is of all cells; leave out --cell")
  try:
    extras.check("etils", "train", needed_by="experiments.sweep")
    # jax is behind these; a missing argument does not wait for it.
    from experiments.sweeping import cells, run as running, slurm

    found = cells.cells(
      arguments.config,
      seeds=arguments.seeds,
      settings=arguments.set,
      grids=arguments.grid,
      out=arguments.out,
    )
    if arguments.cell is not None:
      if not 0 <= arguments.cell < len(found):
        made.error(f"--cell {arguments.cell}: give 0 to {len(found) - 1}")
      found = [found[arguments.cell]]
    if arguments.dry_run:
      print(cells.listed(found))
      return 0
    if arguments.slurm:
      slurm.write(
        pathlib.Path(arguments.slurm),
        found,
        words=_words(arguments),
        options=arguments.sbatch,
        jobs=arguments.jobs,
      )
      print(f"{arguments.slurm}: an array of {len(found)} tasks; submit it by sbatch.")
      return 0
    return running.run(found, jobs=arguments.jobs or 1, cache=arguments.cache)
  except (ValueError, TypeError, OSError, extras.MissingExtra) as error:
    print(f"error: {error}", file=sys.stderr)
    return 2


def _words(arguments: argparse.Namespace) -> list[str]:
  """The arguments that say what the cells are."""
  words = ["--seeds", arguments.seeds, "--out", arguments.out]
  for name in ("config", "set", "grid"):
    for value in getattr(arguments, name):
      words += [f"--{name}", value]
  return words + (["--cache", arguments.cache] if arguments.cache else [])


if __name__ == "__main__":
  run(main)
