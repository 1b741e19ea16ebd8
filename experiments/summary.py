"""summary.json: what a run was, how far it came, and all one needs to cite it."""
# SPDX-License-Identifier: Apache-2.0

import importlib.metadata
import os
import platform
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from experiments import optim
from experiments.config import Run
from jmoe.analysis import cost

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


def summary(
  run: Run,
  *,
  step: int,
  seconds: float,
  speeds: Sequence[float],
  skipped: int,
  alarms: Mapping[str, int],
  data: Mapping[str, str],
  command: Sequence[str],
  bits: Mapping[str, float] | None = None,
  baselines: Mapping[str, Mapping[str, float]] | None = None,
  digests: Mapping[str, str] | None = None,
) -> dict[str, Any]:
  """What goes into summary.json.

  Args:
    run: what was trained.
    step: steps done.
    seconds: of training, compilation included, over all sittings that ended in order.
    speeds: tokens a second, of each step.
    skipped: steps that changed nothing.
    alarms: counts by name.
    data: corpus and digest.
    command: that was typed.
    bits: bits per byte by domain, at the end.
    baselines: of other means, by name.
    digests: sha256 of each parameter, at the end.
  """
  counted = cost.parameters(run.model)
  flops = 3 * cost.flops_per_token(run.model, seq=run.data.seq)
  return {
    "name": run.name,
    "finished": bits is not None,
    "steps": step,
    "seed": run.seed,
    "bits_per_byte": dict(bits or {}),
    "baselines": {name: dict(found) for name, found in (baselines or {}).items()},
    "parameters": {"total": counted.total, "active": counted.active},
    "flops": {
      "per_token": flops,
      "trained": flops * step * run.data.batch * run.data.seq,
    },
    "seconds": seconds,
    "tokens_per_second": float(np.median(speeds)) if len(speeds) else None,
    "skipped_steps": skipped,
    "alarms": dict(alarms),
    "policy": optim.policy(run),
    "digests": dict(digests or {}),
    "data": dict(data),
    "versions": versions(),
    "hardware": hardware(),
    "command": list(command),
  }


def versions() -> dict[str, str]:
  """Of Python and of the packages that numbers depend on."""
  found = {"python": platform.python_version()}
  for name in _PACKAGES:
    try:
      found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      continue
  return found


def hardware() -> dict[str, Any]:
  """What this process computes on."""
  device = jax.devices()[0]
  return {
    "backend": jax.default_backend(),
    "device": device.device_kind,
    "devices": jax.device_count(),
    "processes": jax.process_count(),
    "machine": platform.machine(),
    "cores": _cores(),
  }


def _cores() -> int | None:
  """That this process may use; of the machine where nobody can say."""
  if hasattr(os, "sched_getaffinity"):  # Linux has it, macOS does not
    return len(os.sched_getaffinity(0))
  return os.cpu_count()
