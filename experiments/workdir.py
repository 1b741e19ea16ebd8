"""The folder of a run: whose it is, and files in it that are never half written.

It holds config.json, metrics.jsonl, checkpoints/, at the end result.json, and dense/
with the same for the dense model that the run is compared with.
"""
# SPDX-License-Identifier: Apache-2.0

import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.config import Run, with_settings
from jmoe.analysis import cost
from jmoe.use import to_jsonable

_SHOWN = 6  # differing fields of a message


def prepared(
  run: Run, workdir: Path, *, settings: Sequence[str] = (), compare_dense: bool = False
) -> list[tuple[Run, Path]]:
  """Runs and their folders, all checked; nothing is written.

  Args:
    run: before its settings.
    workdir: of the run.
    settings: see `with_settings`.
    compare_dense: add the dense model of equal active FLOPs, on the same batches.

  Raises:
    ValueError, TypeError: a setting does not fit, or a folder is of another run.
  """
  run = with_settings(run, settings)
  runs = [(run, workdir)]
  if compare_dense:
    dense = dataclasses.replace(
      run,
      name=f"{run.name}-dense",
      model=cost.equal_active_flops(run.model),
      loss_weights=(),
    )
    runs.append((dense, workdir / "dense"))
  for each, folder in runs:
    _check(each, folder)
  return runs


def claim(run: Run, folder: Path) -> None:
  """Makes the folder and writes whose it is; it was checked by `prepared`."""
  folder.mkdir(parents=True, exist_ok=True)
  write_json(folder / "config.json", to_jsonable(run))


def write_json(path: Path, value: Any) -> None:
  """A whole file, or the old one."""
  write_text(path, json.dumps(value, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
  """A whole file, or the old one."""
  unfinished = path.with_name(path.name + ".unfinished")
  unfinished.write_text(text, encoding="utf-8")
  os.replace(unfinished, path)


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


def _check(run: Run, folder: Path) -> None:
  """Raises if a folder is not this run's, nor empty, nor missing."""
  if not folder.exists():
    return
  if not folder.is_dir():
    raise ValueError(f"--workdir {folder} is a file; give a folder.")
  written = folder / "config.json"
  if not written.exists():
    names = [p.name for p in folder.iterdir() if not p.name.endswith(".unfinished")]
    if names:
      raise ValueError(
        f"--workdir {folder} holds {min(names)!r} but no run; give an empty or a new "
        "folder."
      )
    return
  try:
    old = json.loads(written.read_text(encoding="utf-8"))
  except ValueError:
    raise ValueError(f"{written} is not JSON; give another --workdir.") from None
  if found := differences(old, to_jsonable(run)):
    raise ValueError(
      f"--workdir {folder} is of another config: {listed(found)}; give another "
      "--workdir, or the same config."
    )


def _short(value: Any) -> str:
  text = json.dumps(value)
  return text if len(text) <= 60 else text[:57] + "..."
