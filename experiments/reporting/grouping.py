"""Which runs are one arm, differing by their seeds alone, and what they are called."""
# SPDX-License-Identifier: Apache-2.0

import json
from collections.abc import Mapping, Sequence
from typing import Any

from experiments.errors import BadData
from experiments.reporting.read import Recorded
from experiments.workdir import differences, listed

Seed = tuple[int, int]  # of the parameters, and of the order of the data


def seed_of(run: Recorded) -> Seed:
  """By which runs of two arms are paired."""
  return run.seed, int(run.config.get("data", {}).get("seed", 0))


def same_text(runs: Sequence[Recorded]) -> bool:
  """Whether bits per byte compare: False if runs are known to have other texts.

  A configuration does not tell: the files that it names may have changed since.
  """
  digests = {run.summary.get("data", {}).get("digest") for run in runs}
  return len(digests - {None}) < 2


def arms(runs: Sequence[Recorded]) -> dict[str, dict[Seed, Recorded]]:
  """Runs by arm and seed, in order; an arm is named after its runs.

  Arms of one name are told apart by what differs in their configs.

  Raises:
    BadData: two runs are the same one.
  """
  found: dict[str, dict[Seed, Recorded]] = {}
  for run in runs:
    arm = found.setdefault(arm_key(run), {})
    if (same := arm.get(seed_of(run))) is not None:
      raise BadData(
        f"{same.path} and {run.path} are the same config and seed; give one of them."
      )
    arm[seed_of(run)] = run
  first = [next(iter(arm.values())) for arm in found.values()]
  return dict(zip(_arm_names(first), found.values(), strict=True))


def arm_key(run: Recorded) -> str:
  """Equal for runs that differ by their seeds alone."""
  return json.dumps(_without_seeds(run.config), sort_keys=True)


def labels(runs: Sequence[Recorded]) -> list[str]:
  """A short name for each run, all different."""
  schemes = (
    [run.name for run in runs],
    [f"{run.name}, seed {run.seed}" for run in runs],
    [run.path.name for run in runs],
    [f"{run.name}, {run.path.name}" for run in runs],
  )
  for names in schemes:
    if len(set(names)) == len(runs):
      return names
  return [str(run.path) for run in runs]


def config_differences(one: Recorded, other: Recorded) -> list[str]:
  """'dotted.path: value of one there, of the other here', seeds and names left out."""
  a, b = (_without_seeds(run.config) | {"name": None} for run in (one, other))
  return differences(a, b)


def _arm_names(first: Sequence[Recorded]) -> list[str]:
  names = [run.name for run in first]
  found = []
  for run in first:
    same = [other for other in first if other.name == run.name]
    if len(same) == 1:
      found.append(run.name)
      continue
    paths = dict.fromkeys(
      text.split(": ")[0] for other in same for text in config_differences(run, other)
    )
    values = [f"{path.split('.')[-1]}={_at(run.config, path)}" for path in paths]
    found.append(f"{run.name} {listed(values)}")
  return (
    found
    if len(set(found)) == len(found)
    else [f"{name} ({run.path.name})" for name, run in zip(names, first, strict=True)]
  )


def _without_seeds(config: Mapping[str, Any]) -> dict[str, Any]:
  kept = {k: v for k, v in config.items() if k != "seed"}
  data = kept.get("data")
  if isinstance(data, Mapping):
    kept["data"] = {k: v for k, v in data.items() if k != "seed"}
  return kept


def _at(tree: Any, path: str) -> Any:
  for name in path.split("."):
    if isinstance(tree, list):
      tree = tree[int(name)]
    else:
      tree = tree.get(name) if isinstance(tree, Mapping) else None
  return tree
