"""The folder of a run: whose it is, and files in it that are never half written.

  config.json        the run
  manifest.json      of its data
  vocabulary/        if it is not bytes
  metrics.jsonl      a line a step: scalars
  routing.jsonl      a line each `watch_every` steps: load, entropy, drops by layer
  tensorboard/       the scalars again
  checkpoints/       the last whole ones; broken/ those that were found broken
  skipped/           batches whose loss was no number, the first hundred of them
  profile/           what `--profile` traced
  evaluation.json    bits per byte by domain, load by domain and expert
  summary.json       the end, or how far it came
  routes.json        whom tokens ask, if `experiments.routes` was asked to look
  extraction.jsonl   what a few experts are worth, if `experiments.emo` was
  pools.jsonl        bits where documents have pools, if `experiments.pools` was
  modularity.jsonl   what few groups of hidden units hold, if its module was
  dense/             all of this for the dense model it is compared with

Local, or `gs://...` and `s3://...`, which `experiments.remote` brings here and back.
"""
# SPDX-License-Identifier: Apache-2.0

import contextlib
import dataclasses
import fcntl
import json
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from etils import epath

from experiments import extras
from experiments.config import Run
from experiments.errors import BadConfig, Unreachable
from experiments.settings import with_settings
from jmoe.analysis import cost
from jmoe.use import to_jsonable

_SHOWN = 6  # differing fields of a message
_PACKAGES = {"gs": "gcsfs", "s3": "s3fs"}


def prepared(
  run: Run,
  workdir: epath.Path,
  *,
  settings: Sequence[str] = (),
  compare_dense: bool = False,
  profile: tuple[int, int] | None = None,
) -> list[tuple[Run, epath.Path]]:
  """Runs and their folders, all checked; nothing is written.

  Args:
    run: before its settings.
    workdir: of the run.
    settings: see `with_settings`.
    compare_dense: add the dense model of equal active FLOPs, on the same batches.
    profile: first and last step to trace.

  Raises:
    ValueError, TypeError: a setting does not fit, or a folder is of another run.
  """
  run = with_settings(run, settings)
  runs = [(run, workdir)]
  if profile is not None and profile[1] > run.steps:
    raise ValueError(
      f"--profile {profile[0]}:{profile[1]}: the run has {run.steps} steps; give "
      "steps of the run."
    )
  if compare_dense and run.start_from:
    raise ValueError(
      f"--compare-dense: a dense model cannot start from {run.start_from}; leave out "
      "one of the two."
    )
  if compare_dense:
    dense = dataclasses.replace(
      run,
      name=f"{run.name}-dense",
      model=cost.equal_active_flops(run.model),
      loss_weights=(),
    )
    runs.append((dense, workdir / "dense"))
  for each, folder in runs:
    check(each, folder)
  return runs


def claim(run: Run, folder: epath.Path) -> None:
  """Makes the folder and writes whose it is; it was checked by `prepared`."""
  folder.mkdir(parents=True, exist_ok=True)
  if not (folder / "config.json").exists():
    write_json(folder / "config.json", to_jsonable(run))


@contextlib.contextmanager
def held(folder: epath.Path) -> Iterator[None]:
  """Keeps other processes out of a claimed folder; the kernel lets go of one that died.

  What is in an object store is worked on in a copy, which keeps nobody out.

  Raises:
    BadConfig: another process trains in it; nothing was written.
  """
  with open(folder / "config.json", "r+") as file:  # NFS locks what can be written
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      raise BadConfig(
        f"--workdir {folder}: another process trains in it; wait for it or stop it, or "
        "give another folder."
      ) from None
    except OSError as error:
      print(
        f"note: the file system of {folder} has no locks ({error.strerror}); see that "
        "no other process trains in it.",
        file=sys.stderr,
      )
    yield


def write_json(path: epath.Path, value: Any) -> None:
  """A whole file, or the old one."""
  write_text(path, json.dumps(value, indent=2) + "\n")


def write_text(path: epath.Path, text: str) -> None:
  """A whole file, or the old one; local."""
  unfinished = path.parent / (path.name + ".unfinished")
  unfinished.write_text(text)
  os.replace(unfinished, path)


def is_local(path: epath.Path) -> bool:
  """Whether it is on this machine's file system."""
  return "://" not in str(path)


def opened(workdir: str, argument: str = "--workdir") -> epath.Path:
  """A folder by its name, which may begin with gs:// or s3://.

  Args:
    workdir: its name.
    argument: that gave it, for messages.

  Raises:
    BadConfig: another scheme.
    MissingExtra: a package that this one needs is not installed.
  """
  scheme, separator, _ = workdir.partition("://")
  if separator and scheme not in _PACKAGES:
    raise BadConfig(
      f"{argument} {workdir}: unknown scheme; give a local folder, gs:// or s3://."
    )
  if separator:
    extras.check(_PACKAGES[scheme], scheme, needed_by=f"{argument} {workdir}")
  return epath.Path(workdir)


@contextlib.contextmanager
def reaching(folder: epath.Path) -> Iterator[None]:
  """Whatever goes wrong with an object store is `Unreachable`, on one line."""
  try:
    yield
  except Exception as error:  # each file system has its own
    if is_local(folder):
      raise
    reason = f"{type(error).__name__}: {str(error).strip()}".splitlines()[0][:200]
    raise Unreachable(
      f"{folder} cannot be reached ({reason}); look at its name and your credentials."
    ) from error


def differences(old: Any, new: Any, path: str = "") -> list[str]:
  """'dotted.path: old there, new here' for each value in which two JSON trees differ.

  >>> differences({"a": {"b": 1}, "c": [2]}, {"a": {"b": 3}, "c": [2]})
  ['a.b: 1 there, 3 here']
  """
  if isinstance(old, dict) and isinstance(new, dict):
    names = dict.fromkeys([*old, *new])
    pairs = [(name, old.get(name), new.get(name)) for name in names]
  elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
    pairs = [(str(n), a, b) for n, (a, b) in enumerate(zip(old, new, strict=True))]
  else:
    return [] if old == new else [f"{path}: {_short(old)} there, {_short(new)} here"]
  return [
    found
    for name, a, b in pairs
    for found in differences(a, b, f"{path}.{name}" if path else name)
  ]


def listed(found: Sequence[str]) -> str:
  """Differences on one line, the first few in full."""
  more = f"; and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
  return "; ".join(found[:_SHOWN]) + more


def check(run: Run, folder: epath.Path, argument: str = "--workdir") -> None:
  """Raises if a folder is not this run's, nor empty, nor missing.

  Args:
    run: whose it should be.
    folder: of a run.
    argument: that gave it, for messages.
  """
  written = folder / "config.json"
  with reaching(folder):
    exists, is_folder = folder.exists(), folder.is_dir()
    text = written.read_text() if is_folder and written.exists() else None
    names = [p.name for p in folder.iterdir()] if is_folder and text is None else []
  if not exists:
    _check_place(folder, argument)
    return
  if not is_folder:
    raise ValueError(f"{argument} {folder} is a file; give a folder.")
  if text is None:
    if names := [name for name in names if not name.endswith(".unfinished")]:
      raise ValueError(
        f"{argument} {folder} holds {min(names)!r} but no run; give an empty or a new "
        "folder."
      )
    return
  try:
    old = json.loads(text)
  except ValueError:
    raise ValueError(f"{written} is not JSON; give another {argument}.") from None
  if found := differences(old, to_jsonable(run)):
    raise ValueError(
      f"{argument} {folder} is of another config: {listed(found)}; give another "
      f"{argument}, or the same config."
    )


def _check_place(folder: epath.Path, argument: str) -> None:
  """Raises if a local folder cannot be made."""
  if not is_local(folder):
    return
  above = next(p for p in epath.Path(os.path.abspath(folder)).parents if p.exists())
  if not above.is_dir() or not os.access(above, os.W_OK):
    what = "is not writable" if above.is_dir() else "is a file"
    raise ValueError(f"{argument} {folder}: {above} {what}; give another folder.")


def _short(value: Any) -> str:
  text = json.dumps(value)
  return text if len(text) <= 60 else text[:57] + "..."
