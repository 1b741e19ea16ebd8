"""All that is measured over the GPUs of one host, in one call that can be repeated.

  python -m experiments.benchmarks.mesh_all --gpus 8 --out DIR
  python -m experiments.benchmarks.mesh_all --gpus 8 --out DIR --dry
  python -m experiments.benchmarks.mesh_all --gpus 8 --list

The commands of `--list`: links; layers of five shapes by every strategy, with as many
tokens on each GPU at EP=1, 2, 4, ... and with as many in all; training steps of
OLMoE-1B-7B and Qwen3-30B-A3B; a checkpoint from all GPUs to half of them and to a
quarter; liger-cute-kernels' layer, from `--liger-site`.  They compile side by side,
into a cache in DIR, and are then measured one after another, the most wanted first.
Each writes DIR/PART.json and DIR/PART.log; how it ended is appended to DIR/ended.jsonl.
What is not done by `--limit` is stopped, and the same command goes on with it.
`mesh_all.planned` writes what the planner expects, `mesh_all.compare` prints it beside
the figures.

Exit codes: 0 done, 2 bad arguments, 3 a result was wrong, 4 not all is done.
"""
# SPDX-License-Identifier: Apache-2.0

import argparse
import contextlib
import json
import shlex
import signal
import sys
import time
from pathlib import Path

from experiments.benchmarks.mesh_all import compare, together
from experiments.benchmarks.mesh_all.parts import parts
from experiments.benchmarks.mesh_all.together import Ended, Part
from experiments.parser import Parser, run

_WRONG = 3


def main(argv: list[str] | None = None) -> int:
  """Runs a command line; returns its exit code."""
  parser = Parser(
    prog="python -m experiments.benchmarks.mesh_all",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  add = parser.add_argument
  add("--gpus", type=int, default=8, help="of the host, a power of two")
  add("--out", type=Path, metavar="DIR", help="for figures and logs")
  add("--parts", metavar="A,B", help="some of the list, whole names or beginnings")
  add("--liger-site", type=Path, metavar="DIR", help="an unpacked liger-cute-kernels")
  add("--limit", type=float, default=590, help="seconds that all of it may take")
  add("--patience", type=float, default=200, help="seconds in which nobody measures")
  add("--at-once", type=int, help="processes; ten, or two on host devices")
  add("--kept", type=int, default=4, help="of these, how many wait with their memory")
  add("--dry", action="store_true", help="host devices and tiny sizes, no GPU")
  add("--list", action="store_true", help="print the commands, and run none")
  arguments = parser.parse_args(argv)
  gpus, folder = arguments.gpus, arguments.out or Path("DIR")
  if gpus < 2 or gpus & (gpus - 1):
    parser.error(f"--gpus {gpus}: give a power of two, 2 at least")
  for option, number in (("at-once", arguments.at_once), ("kept", arguments.kept)):
    if number is not None and number < 1:
      parser.error(f"--{option} {number}: give 1 at least")
  found = parts(gpus, folder, dry=arguments.dry, liger_site=arguments.liger_site)
  if arguments.parts:
    wanted = tuple(arguments.parts.split(","))
    if unknown := [w for w in wanted if not any(p.name.startswith(w) for p in found)]:
      known = ", ".join(p.name for p in found)
      parser.error(f"--parts {unknown[0]}: use some of {known}")
    found = [p for p in found if p.name.startswith(wanted)]
  if arguments.list:
    for part in found:
      words = shlex.join(["python", "-m", *part.words])
      print(f"{part.name:<14}{part.seconds:4.0f} s  {words}")
    print(f"figures: {sum(part.seconds for part in found):.0f} s")
    return 0
  if arguments.out is None:
    parser.error("--out DIR is missing, a folder for the figures")
  return _run(arguments, found)


def _run(arguments: argparse.Namespace, found: list[Part]) -> int:
  begin, folder = time.monotonic(), arguments.out
  folder.mkdir(parents=True, exist_ok=True)
  codes = finished(folder, found)
  if codes:
    print(f"done before: {', '.join(codes)}", flush=True)
  if not arguments.liger_site:
    print("liger-cute-kernels is left out: --liger-site is not given", flush=True)
  left = [part for part in found if part.name not in codes]
  for number in (signal.SIGTERM, signal.SIGHUP):  # an end that takes its children along
    signal.signal(number, lambda n, _: sys.exit(128 + n))
  all_ended = together.together(
    left,
    folder,
    at_once=arguments.at_once or (2 if arguments.dry else 10),
    kept=arguments.kept,
    patience=arguments.limit if arguments.dry else arguments.patience,
    until=begin + arguments.limit,
  )
  with contextlib.closing(all_ended):
    for ended in all_ended:
      name = ended.part.name
      _append(folder, ended)
      if ended.code in (0, _WRONG):
        codes[name] = ended.code
      print(
        f"{time.monotonic() - begin:5.0f} s  {name:<14} {_said(ended)}; "
        f"{len(codes)} of {len(found)} done",
        flush=True,
      )
  if missing := [part.name for part in found if part.name not in codes]:
    print(f"not done, the same command goes on: {', '.join(missing)}", flush=True)
    return 4
  return _WRONG if _WRONG in codes.values() else 0


def _said(ended: Ended) -> str:
  if ended.code == 0:
    beside = f", while {ended.beside} others compiled" if ended.beside else ""
    return f"measured in {ended.seconds:.0f} s{beside}"
  if ended.code == _WRONG:
    return f"a result was WRONG, see {ended.part.name}.log"
  if ended.code == 4:
    return f"had too little time, {ended.seconds:.0f} s, for some of it"
  return f"ended with {ended.code} after {ended.seconds:.0f} s, see its log"


def _append(folder: Path, ended: Ended) -> None:
  line = {"part": ended.part.name, "code": ended.code, "seconds": ended.seconds}
  line |= {"beside": ended.beside, "command": ended.part.command}
  with (folder / compare.FILE).open("a") as file:
    file.write(json.dumps(line) + "\n")


def finished(folder: Path, found: list[Part]) -> dict[str, int]:
  """Exit codes of parts that these same commands did, and whose figures are here."""
  commands = {part.name: part.command for part in found}
  return {
    line["part"]: line["code"]
    for line in compare.endings(folder)
    if line["code"] in (0, _WRONG)
    and commands.get(line["part"]) == line["command"]
    and (folder / f"{line['part']}.json").exists()
  }


if __name__ == "__main__":
  run(main)
