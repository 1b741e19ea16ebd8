"""A plan for a step that is at hand: what benchmarks put beside their own figures."""
# SPDX-License-Identifier: Apache-2.0

import math
from collections.abc import Mapping
from typing import Any

import jax

from experiments.config import Data, Optim, Run, sparse_layers
from experiments.planning import mesh as meshes, step, topology
from jmoe.config import ModelConfig
from jmoe.losses import loss_name


def planned(
  model: ModelConfig,
  *,
  rows: int,
  seq: int,
  sizes: Mapping[str, int],
  strategy: str,
  state: float | None = None,
  chips: str | None = None,
) -> dict[str, Any]:
  """GB of a device and milliseconds of a step.

  Args:
    model: with or without tables of axes.
    rows: of the batch.
    seq: tokens of a row.
    sizes: of the mesh.
    strategy: of sparse layers, where experts are divided.
    state: bytes of parameters and moments on a device, if they are others than those of
      AdamW with float32 copies.
    chips: a topology; None: as many GPUs as the mesh has, of the kind that is here, or
      of H200s if there is none.
  """
  devices, reported = math.prod(sizes.values()), set()
  for ff in sparse_layers(model):
    reported |= {loss_name(loss) for loss in ff.losses}
  if chips is None:
    kind = jax.devices()[0].device_kind
    name = next((n for n in ("H100", "A100", "B200") if n in kind), "H200")
    chips = f"gpu:{devices}x{name}"
  run = Run(
    name="planned",
    model=model,
    data=Data(max_bytes=1, seq=seq, batch=rows, eval_context=0),
    optim=Optim(learning_rate=1e-4, warmup_steps=1),
    loss_weights=tuple((name, 0.01) for name in sorted(reported)),
    steps=2,
    save_every=2,
    param_dtype="bfloat16",
  )
  question = step.Question(
    run, meshes.Mesh.of(sizes), topology.parse(chips), factor=1.25, skew=0.3
  )
  names = step.possible(question)
  plan = step.plan(question, strategy if strategy in names else names[0])
  peak = plan.memory.peak
  if state is not None:
    peak += state - plan.memory.parameters - plan.memory.optimizer
  return {"gb": peak / 1e9, "ms": 1e3 * plan.times.step, "strategy": plan.strategy}
