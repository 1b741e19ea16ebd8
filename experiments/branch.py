"""Experts trained apart, each on text of its own, and joined under a gate.

  python -m experiments.branch --config grow --seeds 0,1 --out runs/branch \
      --groups de,en,es,fr:ja,ko,ru,zh:python-code,python-docs:kernel-docs,man-pages

Branch-Train-MiX (Sukhbaatar et al. 2024, arXiv 2403.07816):

  parent       the dense model of the config's active FLOPs, on all domains
  branch-N     the parent trained on, on the domains of the Nth group alone
  longer       the parent trained on for as many steps, on all domains
  average      the mean of the branches
  mixed        `experiments.surgery merge --how mix`: their feed-forwards as experts, a
               new gate, the mean of all else; not trained
  joined=gate  that, with the gate alone trained, on all domains
  joined=all   that, all of it trained

Branches of all seeds are one program.  Each run is a folder OUT/STAGE/seed-n, and what
was measured a line of OUT/bits.jsonl: the same command goes on where it was stopped,
one that would make other runs there is refused.

The table has bits per byte of held-out text by domain, means over seeds; `own` is the
branch that was trained on the domain.

Exit codes: 0 done, 1 a loss was no number too often, 2 bad input, 130 stopped by
Ctrl-C, 143 by SIGTERM.
"""
# SPDX-License-Identifier: Apache-2.0

import argparse
import dataclasses
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from experiments import configs, staged
from experiments.parser import Parser, run

_JOINED = ("joined=gate", "joined=all")
_ALL_BUT_GATE = ("embedding", "matrix", "norm", "expert")
Group = tuple[str, ...]


def main(argv: list[str] | None = None) -> int:
  """Runs a command line; returns its exit code."""
  parser = Parser(
    prog="python -m experiments.branch",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  add = parser.add_argument
  add("--config", required=True, choices=configs.names(), metavar="NAME")
  add("--groups", required=True, metavar="A,B:C,D", help="domains of each branch")
  add("--steps", type=staged.count, metavar="N", help="of a branch; half the parent's")
  add("--joined-steps", type=staged.count, metavar="N", help="two thirds of a branch's")
  add("--k", type=staged.count, default=2, help="experts of a token; 2 if not given")
  add("--joined", default=",".join(_JOINED), help="what is trained at last")
  staged.arguments(add, name="branch")
  arguments = parser.parse_args(argv)
  command = ["python", "-m", "experiments.branch", *(argv or sys.argv[1:])]
  return staged.ended(lambda: _run(arguments, command))


def _run(arguments: argparse.Namespace, command: Sequence[str]) -> None:
  from experiments import arms
  from experiments.config import sparse_layers
  from experiments.settings import with_settings

  joined = arguments.joined.split(",")
  if unknown := [name for name in joined if name not in _JOINED]:
    raise ValueError(f"--joined {unknown[0]}: give some of {', '.join(_JOINED)}.")
  base = with_settings(configs.load(arguments.config), arguments.set)
  if sparse_layers(base.model):
    base = arms.arm(base, "dense")
  base = dataclasses.replace(base, name="parent")
  seeds = staged.seeds(arguments.seeds)
  with staged.opened(base, arguments, command) as stages:
    groups = _groups(arguments.groups, stages.domains)
    parents = {("parent", n): (one, stages.out / "parent" / f"seed-{n}")
               for n, one in staged.seeded(base, seeds).items()}  # fmt: skip
    stages.train(parents)
    branches = _branches(stages, parents, groups, arguments)
    stages.train(branches)
    mixed = {}
    for n in seeds:
      parts = [str(branches[f"branch-{g}", n][1]) for g in range(len(groups))]
      mixed[n] = _merged("mix", "mixed", n, stages, parts, arguments)
      _merged("average", "average", n, stages, parts, arguments)
    for name in joined:
      stages.train(_joined(name, stages, mixed, arguments))
    print("\n".join(table(stages, groups, joined)))
    if arguments.results is not None:
      _claim(stages, joined, arguments)


def _groups(text: str, domains: Sequence[str]) -> list[Group]:
  """Domains of each branch.

  Raises:
    BadData: a domain that the corpus has not.
    ValueError: less than two groups, or a domain in two of them.
  """
  from experiments import calibration

  groups = [tuple(part.split(",")) for part in text.split(":")]
  every = [name for group in groups for name in group]
  for name in every:
    calibration.number(tuple(domains), name, "--groups")
  if len(groups) < 2 or len(set(every)) < len(every):
    raise ValueError(f"--groups {text}: give two or more, with each domain in one.")
  return groups


def _branches(stages: Any, parents: Any, groups: Sequence[Group], arguments: Any):
  """Runs that start from the parents: a branch for each group, and `longer`."""
  found = {}
  for (_, n), (old, folder) in parents.items():
    steps = arguments.steps or max(1, old.steps // 2)
    warmup = min(old.optim.warmup_steps, steps // 10)
    later = dataclasses.replace(
      old,
      steps=steps,
      start_from=str(folder),
      optim=dataclasses.replace(old.optim, warmup_steps=warmup),
    )
    for g, group in enumerate(groups):
      shares = tuple((d, 0.0) for d in stages.reading.texts.domains if d not in group)
      data = dataclasses.replace(old.data, shares=shares)
      name = f"branch-{g}"
      one = dataclasses.replace(later, name=name, data=data)
      found[name, n] = one, stages.out / name / f"seed-{n}"
    one = dataclasses.replace(later, name="longer")
    found["longer", n] = one, stages.out / "longer" / f"seed-{n}"
  return found


def _merged(how: str, stage: str, n: int, stages: Any, parts: Any, arguments: Any):
  """A merged model of a seed and its folder, evaluated."""
  first, *others = parts
  own = ["--workdir", first, "--how", how, "--seed", n, "--set", "data.shares=None"]
  own += [word for other in others for word in ("--with", other)]
  own += ["--k", arguments.k] if how == "mix" else []
  place = stages.out / stage / f"seed-{n}"
  made = stages.operate("merge", place, *own)
  stages.evaluate(stage, n, made, place)
  return made, place


def _joined(name: str, stages: Any, mixed: Mapping[int, Any], arguments: Any):
  """Runs that train the mixed models."""
  found = {}
  for n, (old, folder) in mixed.items():
    steps = arguments.joined_steps or max(1, old.steps * 2 // 3)
    warmup = min(old.optim.warmup_steps, steps // 10)
    freeze = _ALL_BUT_GATE if name == "joined=gate" else ()
    found[name, n] = (
      dataclasses.replace(
        old,
        name=name,
        steps=steps,
        start_from=str(folder),
        optim=dataclasses.replace(old.optim, warmup_steps=warmup, freeze=freeze),
      ),
      stages.out / name.replace("=", "-") / f"seed-{n}",
    )
  return found


def table(stages: Any, groups: Sequence[Group], joined: Sequence[str]) -> list[str]:
  """The lines of the table."""
  columns = ("parent", "longer", "own", "average", "mixed", *joined)
  of = {d: f"branch-{g}" for g, group in enumerate(groups) for d in group}
  width = max(14, *(len(name) + 2 for name in stages.domains))
  lines = [f"{'bits per byte':<{width}}" + "".join(f"{c:>13}" for c in columns)]
  for domain in stages.domains:
    shown = ""
    for column in columns:
      stage = of.get(domain, "") if column == "own" else column
      shown += f"{stages.mean(stage, domain):>13.4f}" if stage else f"{'':>13}"
    lines.append(f"{domain:<{width}}{shown}")
  return lines


def _claim(stages: Any, joined: Sequence[str], arguments: Any) -> None:
  """Appends to FOLDER/NAME-all.json."""
  for stage in ("parent", "longer", *joined):
    folder = stages.out / stage.replace("=", "-")
    # Parents are there whatever is joined.
    own = {"joined": stage if stage in joined else None}
    command = staged.command("branch", arguments, own)
    for n, bits in stages.bits(stage).items():
      staged.claim(
        arguments.results / f"{arguments.name}-all.json",
        folder / f"seed-{n}",
        claim="held-out text, all domains, of models trained apart and joined",
        arm=stage,
        seed=n,
        value=bits["all"],
        against="longer",
        command=command,
      )


if __name__ == "__main__":
  run(main)
