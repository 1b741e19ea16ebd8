"""Whom tokens ask: what experts follow, which work together, and what of it stays.

  python -m experiments.routes runs/emo/*/seed-*
  python -m experiments.report runs/emo/sparse/seed-0 --out report.html

Pieces of held-out documents go through a run's newest checkpoint, and through earlier
ones that it still has, as in evaluation.  Counted are, for each layer: what a choice of
an expert tells about domain, document and token, and in Python text about the token's
class (bits, and how many of them chance gives); how alike documents use experts; which
experts the same tokens use; and how many tokens keep their experts between checkpoints.

All is kept in DIR/routes.json, from where `experiments.report` draws it.  A run that
has it for its newest checkpoint and these arguments is not read again, so the same
command goes on where it was stopped.

Exit codes: 0 done, 2 bad input, 130 stopped by Ctrl-C, 143 by SIGTERM.
"""
# SPDX-License-Identifier: Apache-2.0

import argparse
import os
from pathlib import Path
from typing import Any

from experiments import extras
from experiments.parser import Parser, ended, run, seed


def main(argv: list[str] | None = None) -> int:
  """Runs a command line; returns its exit code."""
  parser = Parser(
    prog="python -m experiments.routes",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  add = parser.add_argument
  add("workdirs", nargs="+", metavar="DIR", help="of runs; local")
  add("--documents", type=_count, default=20, metavar="N", help="of a domain; 20")
  add("--pieces", type=_count, default=4, metavar="N", help="of a document at most; 4")
  add("--draws", type=_count, default=20, metavar="N", help="of labels by chance; 20")
  add("--seed", default=0, type=seed, help="of documents and draws")
  add("--cache", type=Path, metavar="DIR", default=Path.home() / ".cache" / "jmoe")
  arguments = parser.parse_args(argv)
  return ended(lambda: _measured(arguments))


def _measured(arguments: argparse.Namespace) -> None:
  extras.check_training("experiments.routes")
  import jax

  from experiments import counting, workdir
  from experiments.signals import Stop

  if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    jax.config.update("jax_compilation_cache_dir", str(arguments.cache / "compiled"))
  how = {n: getattr(arguments, n) for n in ("documents", "pieces", "draws", "seed")}
  folders = [workdir.opened(name, "DIR") for name in arguments.workdirs]
  for folder in folders:
    if not workdir.is_local(folder):
      raise ValueError(f"{folder} is not local; bring it here first.")
  with Stop() as stop:
    for number, folder in enumerate(folders, 1):
      stop.check(0)
      found, is_new = counting.counted(folder, arguments.cache, **how)
      print(f"{number}/{len(folders)} {folder}: {_line(found)}", flush=True)
      if not is_new:
        print("  as it was", flush=True)


def _line(found: dict[str, Any]) -> str:
  """A run in a line: its last layer, where experts are most apart."""
  layer = found["layers"][-1]
  told = ", ".join(
    f"{row['labels']} of {row['text']} text {row['bits'] - row['by_chance']:.3f}"
    for row in layer["information"]
  )
  line = f"step {found['step']}, {layer['name']}, bits over chance: {told}"
  if found["stability"]:
    first = found["stability"][0]
    kept = first["layers"][-1]
    line += (
      f"; since step {first['step']} {100 * kept['equal']:.1f} % of tokens keep their "
      f"experts ({100 * kept['equal_by_chance']:.1f} % by chance)"
    )
  return line


def _count(text: str) -> int:
  if not text.isdecimal() or int(text) < 1:
    raise argparse.ArgumentTypeError(f"{text!r} is not a whole number >= 1")
  return int(text)


if __name__ == "__main__":
  run(main)
