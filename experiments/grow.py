"""A model learns a new kind of text in new experts: what does it forget?

  python -m experiments.grow --config grow --domain ko --seeds 0,1,2 --out runs/grow

`base` is trained on all domains but one; `begun` is what `experiments.surgery grow`
makes of it, with --new experts a layer beside the old ones.  Then, by --arms:

  grown=S   the new experts and the gates are trained, and all else is frozen; a part S
            of the tokens is of the new domain, the rest of the old ones in equal parts
  held=S    the same, but the gates' columns of old experts are frozen too
  tuned     the base as it was, all of it trained, on the new domain alone

The seeds of a stage are one program.  Each run is a folder OUT/STAGE/seed-n, and what
was measured a line of OUT/bits.jsonl: the same command goes on where it was stopped,
one that would make other runs there is refused.

The table has bits per byte of held-out text by domain, means over seeds; `begun` is the
grown model before its first step.  Under it, of each arm: what became of the new
domain, and the change of the old domain that changed most.

Exit codes: 0 done, 1 a loss was no number too often, 2 bad input, 130 stopped by
Ctrl-C, 143 by SIGTERM.
"""
# SPDX-License-Identifier: Apache-2.0

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from typing import Any

from experiments import configs, staged
from experiments.parser import Parser, run

_ARMS = "grown=0.5,held=0.5,grown=1,tuned"
_EQUAL = 1e9  # a temperature at which all domains are drawn alike
_UNCHANGED = 0.01  # of an old domain's bits


def main(argv: list[str] | None = None) -> int:
  """Runs a command line; returns its exit code."""
  parser = Parser(
    prog="python -m experiments.grow",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  add = parser.add_argument
  add("--config", required=True, choices=configs.names(), metavar="NAME")
  add("--domain", required=True, metavar="NAME", help="that is new")
  add("--new", type=staged.count, default=4, metavar="N", help="experts a layer; 4")
  add("--margin", type=float, default=4.0, help="see surgery grow; 4 if not given")
  add(
    "--steps", type=staged.count, metavar="N", help="of an arm; a third of the base's"
  )
  add("--documents", type=staged.count, default=16, metavar="N",
      help="of each domain, for gate columns; old ones may have fewer; 16")  # fmt: skip
  add("--arms", default=_ARMS, help=f"separated by commas; {_ARMS}")
  staged.arguments(add, name="grow")
  arguments = parser.parse_args(argv)
  command = ["python", "-m", "experiments.grow", *(argv or sys.argv[1:])]
  return staged.ended(lambda: _run(arguments, command))


def _parts(arm: str) -> tuple[str, float]:
  """(kind of an arm, share of the new domain)."""
  kind, equals, text = arm.partition("=")
  try:
    share = float(text) if equals else 1.0
  except ValueError:
    share = 0.0
  if kind not in ("grown", "held", "tuned") or not 0 < share <= 1:
    raise ValueError(f"--arms {arm}: give grown=S, held=S with 0 < S <= 1, or tuned.")
  return kind, share


def _run(arguments: argparse.Namespace, command: Sequence[str]) -> None:
  from experiments import calibration
  from experiments.settings import with_settings

  arms = arguments.arms.split(",")
  for name in arms:
    _parts(name)
  new = arguments.domain
  base = with_settings(configs.load(arguments.config), arguments.set)
  data = dataclasses.replace(base.data, shares=((new, 0.0),))
  base = dataclasses.replace(base, name="base", data=data)
  seeds = staged.seeds(arguments.seeds)
  with staged.opened(base, arguments, command) as stages:
    calibration.number(stages.domains, new)  # or it is refused
    encoded = stages.reading.encoded
    calibration.check(encoded, encoded.domains.index(new), arguments.documents)
    first = {n: (run, stages.out / "base" / f"seed-{n}")
             for n, run in staged.seeded(base, seeds).items()}  # fmt: skip
    stages.train({("base", n): one for n, one in first.items()})
    begun = {n: _begun(n, stages, *first[n], arguments) for n in first}
    for name in arms:
      _train(name, stages, first if name == "tuned" else begun, arguments)
    lines = table(stages, new, arms)
    print("\n".join(lines))
    if arguments.results is not None:
      _claim(stages, new, arms, arguments)


def _begun(seed: int, stages: Any, run: Any, folder: Any, arguments: Any) -> Any:
  """The grown model of a seed and its folder, evaluated as it begins."""
  own: list[Any] = ["--workdir", folder, "--new", arguments.new, "--seed", seed]
  own += ["--domain", arguments.domain, "--documents", arguments.documents]
  # New experts take what the new text needs: balance would send others' tokens there.
  weights = tuple(p for p in run.loss_weights if not p[0].startswith("load_balance"))
  own += ["--margin", arguments.margin, "--set", f"loss_weights={weights!r}"]
  place = stages.out / "begun" / f"seed-{seed}"
  made = stages.operate("grow", place, *own)
  stages.evaluate("begun", seed, made, place)
  return made, place


def _train(name: str, stages: Any, begun: Any, arguments: Any) -> None:
  """Trains the runs of an arm from those that are given by seed."""
  kind, share = _parts(name)
  found = {}
  for n, (old, folder) in begun.items():
    steps = arguments.steps or max(1, old.steps // 3)
    warmup = min(old.optim.warmup_steps, steps // 10)
    freeze = old.optim.freeze
    if kind == "held":
      freeze = (*freeze, freeze[-1].replace("experts:", "columns:"))
    one = dataclasses.replace(
      old,
      name=name,
      data=dataclasses.replace(
        old.data, shares=((arguments.domain, share),), temperature=_EQUAL
      ),
      optim=dataclasses.replace(old.optim, warmup_steps=warmup, freeze=freeze),
      steps=steps,
      start_from=str(folder),
    )
    found[name, n] = one, stages.out / name.replace("=", "-") / f"seed-{n}"
  stages.train(found)


def table(stages: Any, new: str, arms: Sequence[str]) -> list[str]:
  """The lines of the table."""
  columns = [s for s in ("base", "begun", *arms) if stages.bits(s)]
  width = max(14, *(len(name) + 2 for name in stages.domains))
  wide = max(10, *(len(name) + 2 for name in columns))
  lines = [f"{'bits per byte':<{width}}" + "".join(f"{c:>{wide}}" for c in columns)]
  for domain in (new, *(d for d in stages.domains if d not in (new, "all"))):
    each = "".join(f"{stages.mean(c, domain):>{wide}.4f}" for c in columns)
    lines.append(f"{domain:<{width}}{each}{'  new' if domain == new else ''}")
  for arm in columns[1:]:
    gained = stages.mean(arm, new) / stages.mean("base", new) - 1
    old = changes(stages, arm, new)
    domain = max(old, key=lambda name: abs(old[name]))
    within = "within" if abs(old[domain]) <= _UNCHANGED else "beyond"
    lines.append(
      f"{arm}: new domain {100 * gained:+.2f} %; old domains "
      f"{100 * sum(old.values()) / len(old):+.2f} % on average, at most "
      f"{100 * old[domain]:+.2f} % ({domain}), {within} {100 * _UNCHANGED:g} %"
    )
  return lines


def changes(stages: Any, stage: str, new: str) -> dict[str, float]:
  """Of each old domain, its bits over those of the base less one; means over seeds."""
  old = [d for d in stages.domains if d not in (new, "all")]
  return {d: stages.mean(stage, d) / stages.mean("base", d) - 1 for d in old}


def _claim(stages: Any, new: str, arms: Sequence[str], arguments: Any) -> None:
  """Appends to FOLDER/NAME-DOMAIN-{new,old}.json."""
  old = [d for d in stages.domains if d not in (new, "all")]
  for stage in ("base", *arms):
    folder = stages.out / stage.replace("=", "-")
    # The base is there whatever the arms.
    own = {"arms": None if stage == "base" else stage}
    command = staged.command("grow", arguments, own)
    for n, bits in stages.bits(stage).items():
      for what, claim, value in (
        ("new", f"held-out text of a new domain, {new}", bits[new]),
        ("old", "held-out text of the other domains, mean over them",
         sum(bits[d] for d in old) / len(old)),
      ):  # fmt: skip
        staged.claim(
          arguments.results / f"{arguments.name}-{new}-{what}.json",
          folder / f"seed-{n}",
          claim=claim,
          arm=stage,
          seed=n,
          value=value,
          against="base",
          command=command,
        )


if __name__ == "__main__":
  run(main)
