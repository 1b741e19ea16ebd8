"""EMoE on a pretrained encoder (arXiv 2310.10908), from its weights to its table.

  python -m experiments.emoe pack --out data/minilm.npz          with a network
  python -m experiments.emoe held --pack data/minilm.npz         minutes on a CPU
  python -m experiments.emoe run --pack data/minilm.npz --out runs/emoe
  python -m experiments.emoe table runs/emoe

`run` does jobs until --seconds are over and goes on with the rest when it is called
again.  Tasks: film snippets by their sentiment; and two that conflict, where Amazon
sentences have inverted labels.  `run --tiny` is a try of seconds, on a CPU.

Exit codes: 0 done, 2 bad input, 3 jobs are left: the same command goes on, 130 stopped
by Ctrl-C.
"""
# SPDX-License-Identifier: Apache-2.0

import argparse
import json
import os
import shlex
import sys
from pathlib import Path

from experiments import extras
from experiments.parser import Parser, ended, run


def main(argv: list[str] | None = None) -> int:
  """Runs a command line; returns its exit code."""
  parser = Parser(
    prog="python -m experiments.emoe",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  commands = parser.add_subparsers(dest="command", required=True)
  _pack(commands.add_parser("pack", help="weights and texts in one file").add_argument)
  _held(commands.add_parser("held", help="what few groups hold").add_argument)
  _run(commands.add_parser("run", help="fine-tunes what is left to do").add_argument)
  _table(commands.add_parser("table", help="what was found").add_argument)
  arguments = parser.parse_args(argv)
  return ended(lambda: _COMMANDS[arguments.command](arguments, argv or sys.argv[1:]))


def _pack(add) -> None:
  add("--out", required=True, type=Path, metavar="FILE")
  add("--archives", type=Path, default=Path.home() / ".cache" / "jmoe" / "archives")
  add("--longest", type=int, default=64, help="tokens of a text; 64 if not given")


def _packed(arguments: argparse.Namespace, argv: list[str]) -> int:
  del argv
  from experiments.emoe import pack

  found = pack.write(arguments.archives, arguments.out, longest=arguments.longest)
  print(json.dumps(found))
  return 0


def _held(add) -> None:
  add("--pack", required=True, type=Path, metavar="FILE")
  add("--texts", type=int, default=200, help="drawn from all domains")
  add("--groups", type=_numbers, default=(16, 32, 64), metavar="N,N,...")
  add("--shares", type=_shares, default=(0.125, 0.25, 0.5), help="of the groups")
  add("--untrained", action="store_true", help="of weights before any training")
  add("--results", type=Path, metavar="DIR", help="of claims; none if not given")
  add("--name", default="emoe", help="of the claims")
  add("--json", action="store_true")


def _measured(arguments: argparse.Namespace, argv: list[str]) -> int:
  from experiments.emoe import held

  found = held.pretrained(
    arguments.pack,
    num_texts=arguments.texts,
    groups=arguments.groups,
    shares=arguments.shares,
    untrained=arguments.untrained,
  )
  if arguments.results is not None:
    command = shlex.join(["python", "-m", "experiments.emoe", *argv])
    held.claim(
      found,
      arguments.results,
      arguments.name,
      command,
      untrained=arguments.untrained,
    )
  print(json.dumps(found, indent=2) if arguments.json else "\n".join(held.lines(found)))
  return 0


def _run(add) -> None:
  add("--pack", required=True, type=Path, metavar="FILE")
  add("--out", required=True, type=Path, metavar="DIR")
  add("--tasks", default="film,conflict")
  add("--tunings", default="full,lora")
  add("--arms", default="dense,emoe,random,bottom,not-top,frozen,learned")
  add("--seeds", type=_numbers, default=(0, 1, 2, 3, 4))
  add("--rates", type=_floats, default=(2e-5, 5e-5, 1e-4), help="of full tuning")
  add("--lora-rates", type=_floats, default=(2e-4, 5e-4, 1e-3))
  add("--groups", type=int, default=64)
  add("--k", type=int, default=16)
  add("--grid", type=_pairs, default=_pairs("16:4,16:8,32:8,32:16,64:32"))
  add("--layers", type=_numbers, default=(4,), help="from 0, cut into groups")
  add("--examples", type=int, default=2500)
  add("--batch", type=int, default=32)
  add("--epochs", type=int, default=4)
  add("--precision", default="tensorfloat32", help="of products of float32")
  add("--seconds", type=float, default=540, help="no job begins that would end later")
  add("--ahead", type=int, default=1, metavar="N", help="programs compiled at a time")
  add("--tiny", action="store_true", help="two seeds, one rate, four steps")
  add("--cache", type=Path, default=Path.home() / ".cache" / "jmoe")


def _ran(arguments: argparse.Namespace, argv: list[str]) -> int:
  del argv
  for module, extra in {"optax": "train"}.items():
    extras.check(module, extra, needed_by="experiments.emoe run")
  import jax

  from experiments.emoe import jobs, run, texts

  if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    jax.config.update("jax_compilation_cache_dir", str(arguments.cache / "compiled"))
  plan = jobs.Plan(
    seeds=arguments.seeds,
    rates={"full": arguments.rates, "lora": arguments.lora_rates},
    groups=arguments.groups,
    k=arguments.k,
    layers=arguments.layers,
    examples=arguments.examples,
    batch=arguments.batch,
    epochs=arguments.epochs,
    precision=arguments.precision,
  )
  if arguments.tiny:
    one = {"full": plan.rates["full"][:1], "lora": plan.rates["lora"][:1]}
    plan = plan._replace(
      seeds=plan.seeds[:2], rates=one, examples=16, batch=8, epochs=2, few=16
    )
  tasks, tunings = arguments.tasks.split(","), arguments.tunings.split(",")
  for given, known, name in (
    (tasks, texts.TASKS, "--tasks"),
    (tunings, ("full", "lora"), "--tunings"),
  ):
    if wrong := [x for x in given if x not in known]:
      raise ValueError(f"{name} {wrong[0]}; give some of {','.join(known)}.")
  names = arguments.arms.split(",")
  wanted = list(jobs.jobs(plan, tasks, tunings, names, arguments.grid))
  left = run.run(
    arguments.pack,
    arguments.out,
    plan,
    wanted,
    seconds=arguments.seconds,
    ahead=arguments.ahead,
  )
  return 3 if left else 0


def _table(add) -> None:
  add("dir", type=Path, metavar="DIR", help="of `run`")
  add("--results", type=Path, metavar="DIR", help="of claims; none if not given")
  add("--name", default="emoe", help="of the claims")
  add("--run-command", help="that made the records, for the claims")


def _shown(arguments: argparse.Namespace, argv: list[str]) -> int:
  del argv
  from experiments.emoe import jobs, table

  found = table.rows(jobs.records(arguments.dir / jobs.FILE))
  print("\n".join(table.lines(found)))
  if arguments.results is not None:
    words = ["python", "-m", "experiments.emoe", "run", "--pack", "data/minilm.npz"]
    command = arguments.run_command or shlex.join([*words, "--out", "runs/emoe"])
    table.claim(found, arguments.results, arguments.name, command)
  return 0


_COMMANDS = {"pack": _packed, "held": _measured, "run": _ran, "table": _shown}


def _numbers(text: str) -> tuple[int, ...]:
  return tuple(int(part) for part in text.split(","))


def _floats(text: str) -> tuple[float, ...]:
  return tuple(float(part) for part in text.split(","))


def _shares(text: str) -> tuple[float, ...]:
  found = _floats(text)
  if not all(0 < share <= 1 for share in found):
    raise argparse.ArgumentTypeError(f"{text!r} are not shares over 0, up to 1")
  return found


def _pairs(text: str) -> tuple[tuple[int, int], ...]:
  pairs = [part.split(":") for part in text.split(",") if part]
  return tuple((int(groups), int(k)) for groups, k in pairs)


if __name__ == "__main__":
  run(main)
