"""What commands of several stages share: arguments, seeds, how they end, claims."""
# SPDX-License-Identifier: Apache-2.0

import argparse
import contextlib
import dataclasses
import json
import os
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments import extras, parser


def arguments(add: Any, *, name: str) -> None:
  """Those that all have, by an `ArgumentParser`'s `add_argument`."""
  add("--seeds", default="0,1,2", help="separated by commas")
  add("--out", required=True, help="folder of all runs; local")
  add("--set", action="append", default=[], metavar="PATH=VALUE", help="of the config")
  add("--results", type=Path, help="folder of claims; none are written if not given")
  add("--name", default=name, help=f"of the claims; {name} if not given")
  add("--cache", type=Path, metavar="DIR", default=Path.home() / ".cache" / "jmoe")


def count(text: str) -> int:
  """A whole number of at least 1, for `type=`."""
  if not text.isdecimal() or int(text) < 1:
    raise argparse.ArgumentTypeError(f"{text!r} is not a whole number >= 1")
  return int(text)


def seeds(text: str) -> list[int]:
  """Numbers separated by commas.

  Raises:
    ValueError: what is no number, or is there twice.
  """
  parts = text.split(",")
  if not all(part.isdecimal() for part in parts) or len(set(parts)) < len(parts):
    raise ValueError(f"--seeds {text}: give different whole numbers, as in 0,1,2.")
  return [int(part) for part in parts]


def seeded(run: Any, numbers: Sequence[int]) -> dict[int, Any]:
  """The run with each seed, which also orders its data."""
  return {
    n: dataclasses.replace(run, seed=n, data=dataclasses.replace(run.data, seed=n))
    for n in numbers
  }


@contextlib.contextmanager
def opened(
  first: Any, given: argparse.Namespace, command: Sequence[str]
) -> Iterator[Any]:
  """The `Stages` of a command line, while signals are wishes to stop."""
  import jax

  from experiments import workdir
  from experiments.signals import Stop
  from experiments.stages import Stages

  out = workdir.opened(given.out, "--out")
  if not workdir.is_local(out):
    raise ValueError(f"--out {out} is not local; give a local folder.")
  if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    jax.config.update("jax_compilation_cache_dir", str(given.cache / "compiled"))
  with Stop() as stop:
    yield Stages(first, out, given.cache, command=command, stop=stop)


def ended(work: Callable[[], None]) -> int:
  """The exit code of a command; see `experiments.parser.ended`."""

  def checked() -> None:
    extras.check_training("this experiment")
    work()

  return parser.ended(checked, bad=(ValueError, TypeError, OSError))


def command(
  name: str, arguments: argparse.Namespace, instead: Mapping[str, str | None]
) -> str:
  """The command that measures an arm, whatever the seeds and wherever folders are.

  Args:
    name: of the experiment's module.
    arguments: that were given.
    instead: in place of theirs, by name; None is left out.
  """
  words = ["python", "-m", f"experiments.{name}"]
  given = vars(arguments) | {"out": f"runs/{arguments.name}"} | dict(instead)
  for argument, value in given.items():
    if argument in ("seeds", "cache", "results") or value is None:
      continue
    for each in value if isinstance(value, list) else [value]:
      words += [f"--{argument.replace('_', '-')}", str(each)]
  return shlex.join(words)


def claim(
  path: Path,
  folder: Any,
  *,
  claim: str,
  arm: str,
  seed: int,
  value: float,
  against: str,
  command: str,
) -> None:
  """Appends bits per byte of a run to a claim, as `experiments.results` keeps them."""
  from experiments import results

  summary = json.loads((folder / "summary.json").read_text())
  config = json.loads((folder / "config.json").read_text())
  del config["seed"], config["data"]["seed"], config["start_from"]
  config["data"]["digest"] = summary["data"]["digest"]
  results.append(
    path,
    claim=claim,
    unit="bits per byte",
    against=against,
    arm=arm,
    seed=seed,
    value=value,
    command=command,
    config=config,
    versions=summary["versions"],
    hardware=summary["hardware"],
  )
