"""Trains a run, or goes on with it: `python -m experiments.main --config tiny ...`.

The same command resumes.  Bad input ends with one line and exit code 2, before
anything is compiled or written; what is slow to import waits until the cheap questions
are answered.
"""
# SPDX-License-Identifier: Apache-2.0

import argparse
import difflib
import sys
from pathlib import Path
from typing import NoReturn

from experiments import configs, extras

_NEEDED = {
  "optax": "train",
  "orbax.checkpoint": "train",
  "tqdm": "train",
  "grain": "data",
  "tensorflow_datasets": "data",
  "array_record": "data",
}


class _Parser(argparse.ArgumentParser):
  def error(self, message: str) -> NoReturn:
    print(f"error: {message}; see --help.", file=sys.stderr)
    raise SystemExit(2)


def main(argv: list[str] | None = None) -> int:
  """Runs a command line; returns its exit code: 2 for bad input, 1 if it diverged."""
  parser = _Parser(prog="python -m experiments.main", description=__doc__)
  add = parser.add_argument
  add("--config", required=True, metavar="NAME", help=", ".join(configs.names()))
  add("--workdir", required=True, type=Path, help="of this run alone; made if missing")
  add(
    "--set",
    action="append",
    default=[],
    metavar="PATH=VALUE",
    help="e.g. steps=100, or optim.clip=2",
  )
  add(
    "--compare-dense",
    action="store_true",
    help="also train the dense model of equal active FLOPs, on the same batches",
  )
  add(
    "--cache", type=Path, default=Path.home() / ".cache" / "jmoe", help="of data sets"
  )
  arguments = parser.parse_args(argv)
  if arguments.config not in (known := configs.names()):
    close = difflib.get_close_matches(arguments.config, known, n=1) or known
    parser.error(f"unknown config {arguments.config!r}; did you mean {close[0]!r}?")
  try:
    for module, extra in _NEEDED.items():
      extras.check(module, extra, needed_by="experiments.main")
  except extras.MissingExtra as error:
    return _refused(error)

  from experiments import errors, workdir

  try:
    runs = workdir.prepared(
      configs.load(arguments.config),
      arguments.workdir,
      settings=arguments.set,
      compare_dense=arguments.compare_dense,
    )
  except (ValueError, TypeError, OSError) as error:
    return _refused(error)
  from experiments import job

  try:
    job.execute(runs, arguments.cache)
  except (errors.BadCheckpoint, errors.BadData) as error:
    return _refused(error)
  except errors.Diverged as error:
    print(f"error: {error}", file=sys.stderr)
    return 1
  except KeyboardInterrupt:
    print("\nstopped; the same command goes on from the last checkpoint.")
    return 130
  return 0


def _refused(error: Exception) -> int:
  print(f"error: {error}", file=sys.stderr)
  return 2


if __name__ == "__main__":
  sys.exit(main())
