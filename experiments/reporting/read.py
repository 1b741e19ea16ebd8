"""A run as its folder tells it: whole or still going on, sparse or dense.

Only config.json has to be there.  The last line of a JSONL file may be half written;
anything else that is not as a run leaves it is refused by name.
"""
# SPDX-License-Identifier: Apache-2.0

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from experiments import workdir
from experiments.errors import BadData

_NUMBER = int | float


@dataclasses.dataclass(frozen=True)
class Layer:
  """One sparse layer over N watched steps."""

  name: str
  load: np.ndarray  # i64[N,E] choices of each expert, before capacity
  entropy: np.ndarray  # f64[N] nats
  dropped: Mapping[str, np.ndarray]  # cause -> f64[N] share of the choices


@dataclasses.dataclass(frozen=True)
class Routing:
  """What routing.jsonl holds."""

  step: np.ndarray  # i64[N]
  layers: tuple[Layer, ...]


@dataclasses.dataclass(frozen=True)
class Evaluation:
  """What evaluation.json holds."""

  bits_per_byte: Mapping[str, float]  # by domain, and "all"
  domains: tuple[str, ...]
  layers: tuple[tuple[str, np.ndarray], ...]  # name, i64[domains,E] choices


@dataclasses.dataclass(frozen=True)
class Recorded:
  """A run's folder; what is not written yet is empty or None."""

  path: epath.Path
  name: str
  seed: int
  config: Mapping[str, Any]
  metrics: Mapping[str, np.ndarray]  # f64[steps], nan where a line lacks the name
  routing: Routing | None
  evaluation: Evaluation | None
  summary: Mapping[str, Any]

  @property
  def finished(self) -> bool:
    """Whether it came to its end."""
    return bool(self.summary.get("finished"))

  @property
  def step(self) -> int:
    """The last step that is listed, 0 before the first."""
    listed = self.metrics.get("step", np.zeros(1))
    return int(listed[-1])

  @property
  def bits_per_byte(self) -> Mapping[str, float]:
    """On held-out text, by domain and "all"; empty before the evaluation."""
    if self.evaluation is not None:
      return self.evaluation.bits_per_byte
    return self.summary.get("bits_per_byte", {})


def read_all(folders: Sequence[str]) -> list[Recorded]:
  """Each run, followed by the dense one in it if there is one.

  Args:
    folders: workdirs, local or such as `gs://bucket/run`.

  Raises:
    BadData: a folder holds no run, or a file of it cannot be understood.
    MissingExtra: a package for such folders is not installed.
  """
  paths = []
  for folder in folders:
    path = _opened(folder)
    dense = path / "dense"
    for each in (path, dense) if (dense / "config.json").exists() else (path,):
      if each not in paths:
        paths.append(each)
  return [read(path) for path in paths]


def read(path: epath.Path) -> Recorded:
  """One run.

  Raises:
    BadData: see `read_all`.
  """
  if not path.exists():
    raise BadData(f"{path}: no such folder; give the --workdir of a run.")
  if not path.is_dir():
    raise BadData(f"{path} is a file; give the --workdir of a run.")
  if not (path / "config.json").exists():
    raise BadData(f"{path} holds no run: config.json is missing; give a --workdir.")
  config = _json(path / "config.json")
  name, seed = config.get("name"), config.get("seed")
  if not isinstance(name, str) or not isinstance(seed, int):
    raise BadData(f"{path / 'config.json'} has no name and seed; give a --workdir.")
  _fits(path / "config.json", config, {"data": dict})
  evaluation = path / "evaluation.json"
  summary = path / "summary.json"
  return Recorded(
    path=path,
    name=name,
    seed=seed,
    config=config,
    metrics=_columns(path / "metrics.jsonl"),
    routing=_routing(path / "routing.jsonl"),
    evaluation=_evaluation(evaluation) if evaluation.exists() else None,
    summary=_summary(summary) if summary.exists() else {},
  )


def _opened(folder: str) -> epath.Path:
  try:
    return workdir.opened(folder)
  except ValueError as error:
    raise BadData(str(error)) from None


def _columns(path: epath.Path) -> dict[str, np.ndarray]:
  lines = _lines(path)
  names = dict.fromkeys(name for line in lines for name in line)
  try:
    return {
      name: np.array([line.get(name, np.nan) for line in lines], np.float64)
      for name in names
    }
  except (TypeError, ValueError):
    raise BadData(f"{path} holds a value that is not a number.") from None


def _routing(path: epath.Path) -> Routing | None:
  lines = _lines(path)
  lines = [line for line in lines if line.get("layers")]
  if not lines:
    return None
  try:
    layers = tuple(
      _layer([line["layers"][n] for line in lines])
      for n in range(len(lines[0]["layers"]))
    )
  except (KeyError, TypeError, ValueError, IndexError):
    raise BadData(
      f"{path} has a line of other layers, or other experts, than its first line."
    ) from None
  return Routing(np.array([line["step"] for line in lines], np.int64), layers)


def _layer(entries: Sequence[Mapping[str, Any]]) -> Layer:
  causes = dict.fromkeys(cause for entry in entries for cause in entry["dropped"])
  return Layer(
    name=entries[0]["name"],
    load=np.array([entry["load"] for entry in entries], np.int64),
    entropy=np.array([entry["entropy"] for entry in entries], np.float64),
    dropped={
      cause: np.array([entry["dropped"].get(cause, 0.0) for entry in entries])
      for cause in causes
    },
  )


def _evaluation(path: epath.Path) -> Evaluation:
  found = _json(path)
  try:
    domains = tuple(found["domains"])
    layers = tuple(
      (layer["name"], np.array(layer["load"], np.int64).reshape(len(domains), -1))
      for layer in found["layers"]
    )
    return Evaluation(dict(found["bits_per_byte"]), domains, layers)
  except (KeyError, TypeError, ValueError):
    raise BadData(
      f"{path} is not an evaluation: it needs bits_per_byte, domains, and layers with "
      "a load of each domain."
    ) from None


def _summary(path: epath.Path) -> dict[str, Any]:
  found = _json(path)
  groups = ("bits_per_byte", "baselines", "parameters", "flops", "alarms", "policy")
  _fits(path, found, dict.fromkeys((*groups, "data", "versions", "hardware"), dict))
  _fits(path, found, dict.fromkeys(("steps", "seconds", "tokens_per_second"), _NUMBER))
  for name in ("bits_per_byte", "parameters", "flops", "alarms"):
    group = found.get(name, {})
    _fits(path, group, dict.fromkeys(group, _NUMBER))
  for name, bits in found.get("baselines", {}).items():
    _fits(path, {name: bits}, {name: dict})
    _fits(path, bits, dict.fromkeys(bits, _NUMBER))
  return found


def _fits(path: epath.Path, found: Mapping[str, Any], kinds: Mapping[str, Any]) -> None:
  """Raises if what is there, and not null, is of another kind."""
  for name, kind in kinds.items():
    if not isinstance(found.get(name), kind | None):
      raise BadData(
        f"{path}: {name!r} is a {type(found[name]).__name__}, which no run writes."
      )


def _json(path: epath.Path) -> dict[str, Any]:
  try:
    found = json.loads(path.read_bytes())
  except ValueError:
    raise BadData(f"{path} is not JSON.") from None
  if not isinstance(found, dict):
    raise BadData(f"{path} is not a JSON object.")
  return found


def _lines(path: epath.Path) -> list[dict[str, Any]]:
  """Whole lines; what follows the last line's end is being written."""
  if not path.exists():
    return []
  found = []
  for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], 1):
    try:
      values = json.loads(line)
    except ValueError:
      values = None
    if not isinstance(values, dict) or not isinstance(values.get("step"), int):
      raise BadData(f"{path}, line {number}, is not a JSON object with a step.")
    found.append(values)
  return found
