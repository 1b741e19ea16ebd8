"""The command that makes records again, from the records alone."""
# SPDX-License-Identifier: Apache-2.0

import json
import shlex
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from experiments.emoe.jobs import FILE
from experiments.emoe.table import Row
from experiments.errors import BadData
from experiments.parser import Parser


def commands(found: Sequence[Row]) -> list[list[Row]]:
  """The rows of each command: of one domain of text, under one plan."""
  by: dict[str, list[Row]] = {}
  for row in found:
    plan = {n: x for n, x in row.about["plan"].items() if n not in ("rates", "cut")}
    task = row.job.task if "source" in plan else None
    by.setdefault(json.dumps([task, plan], sort_keys=True), []).append(row)
  return list(by.values())


def command(found: Sequence[Row], makers: Mapping[str, Callable]) -> str:
  """A command that makes rows of one, wherever folders were; no option is a default.

  Args:
    found: see `commands`.
    makers: "run" and "lm" -> what adds its options to a parser.

  Raises:
    BadData: no single command has these arms.
  """
  source = found[0].about["plan"].get("source")
  words = ["run", "--pack", "data/minilm.npz", "--out", "runs/emoe"]
  if source is not None:
    words = ["lm", "--workdir", "runs/dense", "--corpus", source["corpus"]]
    words += ["--domain", found[0].job.task, "--out", "runs/emoe-lm"]
  parser = Parser()
  makers[words[0]](parser.add_argument)
  default = vars(parser.parse_args(words[1:]))
  for name, value in _options(found).items():
    if name == "few" and name not in default:
      words.append("--tiny")  # of `run`, which else tests on all texts
    elif name in default and value != default[name]:
      words += [f"--{name.replace('_', '-')}", _text(value)]
  return shlex.join(["python", "-m", "experiments.emoe", *words])


def _options(found: Sequence[Row]) -> dict[str, Any]:
  """Name -> value, as the command line parses it."""
  jobs = list(dict.fromkeys(row.job for row in found))
  sizes = {(job.groups, job.k) for job in jobs if job.groups and job.arm != "emoe"}
  cuts = [row.about["plan"].get("cut") for row in found]
  sizes |= {tuple(cut) for cut in cuts if cut}
  emoe = [(job.groups, job.k) for job in jobs if job.arm == "emoe"]
  usual = next(iter(sizes or emoe), None)  # jobs of the usual size come first
  grid = [job for job in jobs if job.groups and (job.groups, job.k) != usual]
  if len(sizes) > 1 or len({(job.task, job.tuning) for job in grid}) > 1:
    raise BadData(f"{FILE} has arms of several commands; give --run-command.")

  def names(field: str, some: Sequence[Any]) -> str:
    return ",".join(dict.fromkeys(getattr(job, field) for job in some))

  plan = found[0].about["plan"]
  rates = {row.job.tuning: tuple(row.about["plan"]["rates"]) for row in found}
  known = {
    # The grid is of the first task and tuning.
    "tasks": names("task", [*grid, *jobs]),
    "tunings": names("tuning", [*grid, *jobs]),
    "rates": rates.get("full"),
    "lora_rates": rates.get("lora"),
    "groups": usual and usual[0],
    "k": usual and usual[1],
    "grid": tuple(dict.fromkeys((job.groups, job.k) for job in grid)),
    "layers": tuple(plan["layers"]),
    "arms": names("arm", [job for job in jobs if job not in grid]),
    "seeds": tuple(plan["seeds"]),
    **{n: plan[n] for n in ("examples", "batch", "epochs", "few", "precision")},
  }
  return {name: value for name, value in known.items() if value is not None}


def _text(value: Any, between: str = ",") -> str:
  """A value as it is given to its option."""
  if isinstance(value, tuple):
    return between.join(_text(part, ":") for part in value)
  return str(value)
