"""EMoE on pretrained models (arXiv 2310.10908), from their weights to a table.

  python -m experiments.emoe pack --out data/minilm.npz          with a network
  python -m experiments.emoe held --pack data/minilm.npz         minutes on a CPU
  python -m experiments.emoe run --pack data/minilm.npz --out runs/emoe
  python -m experiments.emoe table runs/emoe

`run` tunes an encoder.  Tasks: film snippets by their sentiment; and two that conflict,
where Amazon sentences have inverted labels.

  python -m experiments.emoe lm --workdir runs/small/dense/seed-0 \
      --corpus packed:runs/essays.jsonl.xz --out runs/emoe-lm
  python -m experiments.emoe table runs/emoe-lm

`lm` tunes a dense language model of ours on text of one domain, new (--corpus) or one
of those it knows (--domain), and tests on it and on all others.  What its groups hold:
`python -m experiments.modularity`.

Both do jobs until --seconds are over and go on with the rest when they are called
again.  With --tiny they are a try of seconds, on a CPU.

Exit codes: 0 done, 2 bad input, 3 jobs are left: the same command goes on, 130 stopped
by Ctrl-C.
"""
# SPDX-License-Identifier: Apache-2.0

import argparse
import json
import os
import shlex
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from experiments import extras, staged
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
  _lm(commands.add_parser("lm", help="the same of a language model").add_argument)
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
  add("--tasks", default="film,conflict")
  add("--tunings", default="full,lora")
  add("--rates", type=_floats, default=(2e-5, 5e-5, 1e-4), help="of full tuning")
  add("--lora-rates", type=_floats, default=(2e-4, 5e-4, 1e-3))
  add("--groups", type=int, default=64)
  add("--k", type=int, default=16)
  add("--grid", type=_pairs, default=_pairs("16:4,16:8,32:8,32:16,64:32"))
  add("--layers", type=_numbers, default=(4,), help="from 0, cut into groups")
  add("--examples", type=int, default=2500)
  add("--batch", type=int, default=32)
  add("--epochs", type=int, default=4)
  _common(add)


def _lm(add) -> None:
  add("--workdir", required=True, metavar="DIR", help="of a dense run; local")
  add("--corpus", help="of the text to learn; the run's own if not given")
  add("--domain", metavar="NAME", help="of that corpus; its one domain if not given")
  add("--tunings", default="full")
  add("--rates", type=_floats, default=(1e-4, 2e-4, 4e-4), help="of full tuning")
  add("--lora-rates", type=_floats, default=(5e-4, 1e-3, 2e-3))
  add("--groups", type=int, default=49, help="a divisor of d_ff; 1029 of small's dense")
  add("--k", type=int, default=12)
  add("--grid", type=_pairs, default=(), metavar="N:K,N:K,...")
  add("--layers", type=_numbers, help="from 0, cut into groups; the last even one")
  add("--examples", type=int, default=1600, metavar="N", help="rows of text")
  add("--batch", type=int, default=16, metavar="N", help="rows of a step")
  add("--epochs", type=int, default=2)
  add("--few", type=staged.count, default=96, help="windows tested, by domain; 96")
  _common(add, arms="dense,emoe,random,bottom,not-top,learned")


def _common(add, arms: str = "dense,emoe,random,bottom,not-top,frozen,learned") -> None:
  add("--out", required=True, type=Path, metavar="DIR")
  add("--arms", default=arms)
  add("--seeds", type=_numbers, default=(0, 1, 2, 3, 4))
  add("--precision", default="tensorfloat32", help="of products of float32")
  add("--seconds", type=float, default=540, help="no job begins that would end later")
  add("--ahead", type=int, default=1, metavar="N", help="programs compiled at a time")
  add("--tiny", action="store_true", help="two seeds, one rate, four steps")
  add("--cache", type=Path, default=Path.home() / ".cache" / "jmoe")


def _plan(arguments: argparse.Namespace, **more: Any) -> Any:
  """The common settings of a command line."""
  import jax

  from experiments.emoe import jobs

  if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    jax.config.update("jax_compilation_cache_dir", str(arguments.cache / "compiled"))
  plan = jobs.Plan(
    seeds=arguments.seeds,
    rates={"full": arguments.rates, "lora": arguments.lora_rates},
    groups=arguments.groups,
    k=arguments.k,
    examples=arguments.examples,
    batch=arguments.batch,
    epochs=arguments.epochs,
    precision=arguments.precision,
    **more,
  )
  if not arguments.tiny:
    return plan
  one = {tuning: rates[:1] for tuning, rates in plan.rates.items()}
  return plan._replace(
    seeds=plan.seeds[:2], rates=one, examples=16, batch=8, epochs=2, few=16
  )


def _jobs(
  arguments: argparse.Namespace,
  plan: Any,
  tasks: Sequence[str],
  material: Any,
  begin: float,
) -> int:
  """Does the jobs of a command line that began then."""
  from experiments.emoe import jobs, run

  tunings = arguments.tunings.split(",")
  _known(tunings, ("full", "lora"), "--tunings")
  names = arguments.arms.split(",")
  wanted = list(jobs.jobs(plan, tasks, tunings, names, arguments.grid))
  left = run.run(
    material,
    arguments.out,
    plan,
    wanted,
    begin=begin,
    seconds=arguments.seconds,
    ahead=arguments.ahead,
  )
  return 3 if left else 0


def _known(given: Sequence[str], known: Iterable[str], name: str) -> None:
  if wrong := [x for x in given if x not in known]:
    raise ValueError(f"{name} {wrong[0]}; give some of {','.join(known)}.")


def _ran(arguments: argparse.Namespace, argv: list[str]) -> int:
  del argv
  begin = time.perf_counter()
  extras.check("optax", "train", needed_by="experiments.emoe run")
  from experiments.emoe import jobs, pack, texts

  tasks = arguments.tasks.split(",")
  _known(tasks, jobs.TASKS, "--tasks")
  plan = _plan(arguments, layers=arguments.layers)
  return _jobs(
    arguments, plan, tasks, lambda: texts.material(pack.read(arguments.pack)), begin
  )


def _tuned(arguments: argparse.Namespace, argv: list[str]) -> int:
  del argv
  begin = time.perf_counter()  # reading model and text takes its time too
  needed = {"orbax.checkpoint": "train", "optax": "train", "grain": "data"}
  for module, extra in needed.items():
    extras.check(module, extra, needed_by="experiments.emoe lm")
  from experiments import workdir
  from experiments.emoe import lm

  folder = workdir.opened(arguments.workdir)
  # More would not fit beside fifteen models.
  plan = _plan(arguments, layers=(), few=arguments.few, eval_batch=arguments.batch)
  of = dict(corpus=arguments.corpus, domain=arguments.domain, few=plan.few)
  found = lm.given(folder, arguments.cache, **of)
  layers = arguments.layers or lm.layers(found.material)
  plan = plan._replace(layers=layers, source=found.source)
  return _jobs(arguments, plan, [found.domain], lambda: found.material, begin)


def _table(add) -> None:
  add("dir", type=Path, metavar="DIR", help="of `run`")
  add("--results", type=Path, metavar="DIR", help="of claims; none if not given")
  add("--name", default="emoe", help="of the claims")
  add("--run-command", help="that made the records, for the claims")


def _shown(arguments: argparse.Namespace, argv: list[str]) -> int:
  del argv
  from experiments.emoe import again, jobs, table

  found = table.rows(jobs.records(arguments.dir / jobs.FILE))
  print("\n".join(table.lines(found)))
  if arguments.results is not None:
    makers = {"run": _run, "lm": _lm}
    for some in again.commands(found):
      words = arguments.run_command or again.command(some, makers)
      table.claim(some, arguments.results, arguments.name, words)
  return 0


_COMMANDS = {
  "pack": _packed,
  "held": _measured,
  "run": _ran,
  "lm": _tuned,
  "table": _shown,
}


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
