"""Arms beside each other, as numbers: what `experiments.compare` shows."""
# SPDX-License-Identifier: Apache-2.0

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from experiments import equal_loss, intervals
from experiments.reporting import grouping
from experiments.reporting.read import Recorded
from jmoe.analysis import cost
from jmoe.use import from_jsonable

Arm = Mapping[grouping.Seed, Recorded]


def compared(runs: Sequence[Recorded]) -> dict[str, Any]:
  """All that is to be said of runs, as JSON has it.

  `arms`: for each, `runs`, `seeds`, `finished`, and the intervals of its values;
  `against` the first arm, for each other one: `same_text`, without which the rest says
  little, `bits_per_byte` differences by domain,
  `pooled_deviations` of that of all domains, `compute_to_equal_loss`, and `config`
  differences.

  Raises:
    BadData: a run is given twice.
  """
  arms = grouping.arms(runs)
  first = next(iter(arms))
  return {
    "first": first,
    "arms": {name: _alone(arm) for name, arm in arms.items()},
    "against": {
      name: _against(arm, arms[first]) for name, arm in arms.items() if name != first
    },
  }


def curve(run: Recorded) -> equal_loss.Curve | None:
  """The training of a run against its FLOPs; None while there is nothing to compare."""
  bits = run.metrics.get("bits_per_byte")
  each = _flops_of_a_step(run)
  if bits is None or each is None:
    return None
  skipped = run.metrics.get("skipped", np.zeros(1)) > 0  # its loss changed nothing
  bits = np.where(skipped, np.nan, bits)
  if not np.isfinite(bits).any():
    return None
  return equal_loss.Curve(each * run.metrics["step"], bits)


def _alone(arm: Arm) -> dict[str, Any]:
  runs = list(arm.values())
  domains = dict.fromkeys(d for run in runs for d in run.bits_per_byte)
  return {
    "runs": [str(run.path) for run in runs],
    "seeds": [run.seed for run in runs],
    "same_text": grouping.same_text(runs),
    "finished": all(run.finished for run in runs),
    "steps": max(run.step for run in runs),
    "bits_per_byte": {
      domain: _mean(runs, lambda run, d=domain: run.bits_per_byte.get(d))
      for domain in domains
    },
    "parameters": runs[0].summary.get("parameters", {}).get("total"),
    "active_parameters": runs[0].summary.get("parameters", {}).get("active"),
    "flops_per_token": runs[0].summary.get("flops", {}).get("per_token"),
    "flops_trained": runs[0].summary.get("flops", {}).get("trained"),
    "tokens_per_second": _mean(runs, _tokens_per_second),
  }


def _against(arm: Arm, first: Arm) -> dict[str, Any]:
  domains = [d for d in _domains(arm) if d in _domains(first)]
  shared = [seed for seed in arm if seed in first]
  pairs = [(arm[seed], first[seed]) for seed in shared]
  if not pairs:  # still a difference, if not one of equal seeds
    pairs = [(next(iter(arm.values())), next(iter(first.values())))]
  factors = [_factor(*pair) for pair in pairs]
  factors = [factor for factor in factors if factor is not None]
  one, other = ([_bits(run, "all") for run in each.values()] for each in (arm, first))
  one, other = ([x for x in xs if x is not None] for xs in (one, other))
  return {
    "paired_seeds": [arm[seed].seed for seed in shared],
    "same_text": grouping.same_text([*arm.values(), *first.values()]),
    "bits_per_byte": {domain: _difference(pairs, domain) for domain in domains},
    "pooled_deviations": (
      intervals.pooled_deviations(one, other) if one and other else None
    ),
    "compute_to_equal_loss": (
      intervals.jsonable(intervals.geometric(factors)) if factors else None
    ),
    "config": grouping.config_differences(
      next(iter(first.values())), next(iter(arm.values()))
    ),
  }


def _difference(
  pairs: Sequence[tuple[Recorded, Recorded]], domain: str
) -> dict[str, Any] | None:
  found = [(_bits(run, domain), _bits(base, domain)) for run, base in pairs]
  values = [a - b for a, b in found if a is not None and b is not None]
  return intervals.jsonable(intervals.student(values)) if values else None


def _factor(run: Recorded, base: Recorded) -> float | None:
  one, other = curve(run), curve(base)
  return None if one is None or other is None else equal_loss.factor(one, other)


def _flops_of_a_step(run: Recorded) -> float | None:
  trained = run.summary.get("flops", {}).get("trained")
  if trained and (steps := run.summary.get("steps")):
    return trained / steps
  return _planned_flops_of_a_step(run)


def _planned_flops_of_a_step(run: Recorded) -> float | None:
  """From the config, for a run that has not summed up yet."""
  try:
    model = from_jsonable(run.config["model"])
    data = run.config["data"]
    tokens = data["batch"] * data["seq"]
    return 3 * cost.flops_per_token(model, seq=data["seq"]) * tokens
  except (KeyError, TypeError, ValueError):  # of another version, or a router without k
    return None


def _tokens_per_second(run: Recorded) -> float | None:
  if (speed := run.summary.get("tokens_per_second")) is not None:
    return speed
  listed = run.metrics.get("tokens_per_second", np.zeros(0))
  listed = listed[np.isfinite(listed)]
  return float(np.median(listed)) if len(listed) else None


def _mean(
  runs: Sequence[Recorded], value: Callable[[Recorded], float | None]
) -> dict[str, Any] | None:
  values = [found for run in runs if (found := value(run)) is not None]
  return intervals.jsonable(intervals.student(values)) if values else None


def _bits(run: Recorded, domain: str) -> float | None:
  return run.bits_per_byte.get(domain)


def _domains(arm: Arm) -> list[str]:
  return list(dict.fromkeys(d for run in arm.values() for d in run.bits_per_byte))
