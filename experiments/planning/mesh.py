"""Sizes of mesh axes from `data=4,fsdp=8`, checked against chips, model and batch."""
# SPDX-License-Identifier: Apache-2.0

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from experiments.config import Run, sparse_layers
from experiments.planning.topology import Topology
from jmoe.config import ModelConfig
from jmoe.parallel import mesh as meshes


@dataclasses.dataclass(frozen=True)
class Mesh:
  """Devices along each axis of `jmoe.parallel.mesh.AXES`."""

  data: int = 1
  fsdp: int = 1
  expert: int = 1
  tensor: int = 1
  context: int = 1
  order: tuple[str, ...] = meshes.AXES  # the slowest first

  @classmethod
  def of(cls, sizes: Mapping[str, int]) -> "Mesh":
    """Axes in this order; those left out are where they have a size in other meshes."""
    order = list(sizes)
    for before, axis in zip((None, *meshes.AXES), meshes.AXES, strict=False):
      if axis not in order:
        order.insert(0 if before is None else order.index(before) + 1, axis)
    given: dict[str, Any] = {**sizes}
    return cls(**given, order=tuple(order))

  @property
  def sizes(self) -> dict[str, int]:
    return {axis: getattr(self, axis) for axis in self.order}

  @property
  def devices(self) -> int:
    return math.prod(self.sizes.values())

  @property
  def rows(self) -> int:
    """Over how many devices the rows of a batch are divided."""
    return self.data * self.fsdp * self.expert

  def __str__(self) -> str:
    named = [f"{axis}={n}" for axis, n in self.sizes.items() if n > 1]
    return ",".join(named) or "data=1"


def parse(text: str, topology: Topology) -> Mesh:
  """The mesh of a text.

  Raises:
    ValueError: on one line, what is wrong with it and what would do; see
      `jmoe.parallel.mesh`.
  """
  try:
    sizes = meshes.parse(text)
    meshes.check_product(sizes, topology.devices)
  except ValueError as error:
    reason = str(error).removeprefix("mesh: ")
    raise ValueError(f"--mesh {text}: {reason}") from error
  return Mesh.of(sizes)


def check(run: Run, mesh: Mesh) -> None:
  """Raises unless model and batch can be divided so.

  Raises:
    ValueError: on one line, the axis, what it does not divide, and the nearest sizes.
  """
  for ff in sparse_layers(run.model):
    if ff.num_experts % mesh.expert:
      raise ValueError(
        f"--mesh expert={mesh.expert} does not divide num_experts={ff.num_experts}; "
        f"use {_near(ff.num_experts, mesh.expert)}."
      )
  if mesh.tensor > 1:
    for what, size in _divided_by_tensor(run.model):
      if size % mesh.tensor:
        padded = -(-size // mesh.tensor) * mesh.tensor
        more = f", or --set model.{what}={padded}" if what == "vocab_size" else ""
        raise ValueError(
          f"--mesh tensor={mesh.tensor} does not divide {what}={size}; use "
          f"{_near(size, mesh.tensor)}{more}."
        )
  if run.model.d_model % mesh.fsdp:
    raise ValueError(
      f"--mesh fsdp={mesh.fsdp} does not divide d_model={run.model.d_model}; use "
      f"{_near(run.model.d_model, mesh.fsdp)}."
    )
  if run.data.batch % mesh.rows:
    below = run.data.batch // mesh.rows * mesh.rows
    choices = " or ".join(str(n) for n in (below, below + mesh.rows) if n)
    raise ValueError(
      f"data.batch={run.data.batch} is not divisible by data*fsdp*expert="
      f"{mesh.rows}; use --set data.batch={choices}."
    )
  if run.data.seq % mesh.context:
    raise ValueError(
      f"--mesh context={mesh.context} does not divide data.seq={run.data.seq}; use "
      f"{_near(run.data.seq, mesh.context)}."
    )


def _divided_by_tensor(model: ModelConfig) -> list[tuple[str, int]]:
  found = [("vocab_size", model.vocab_size)]
  for blocks, _ in model.segments:
    for block in blocks:
      heads = block.attention.num_kv_heads or block.attention.num_heads
      found.append(("num_kv_heads", heads))
      d_ff = getattr(block.ff, "d_ff", None)
      if d_ff is None:
        from experiments.planning.work import expert_width

        d_ff = expert_width(block.ff)  # type: ignore[arg-type]
      found.append(("d_ff", d_ff))
  return list(dict.fromkeys(found))


def _near(size: int, wanted: int) -> str:
  """The two divisors of a size around a wanted one."""
  divisors = [n for n in range(1, size + 1) if size % n == 0]
  below = [n for n in divisors if n < wanted][-1:]
  above = [n for n in divisors if n > wanted][:1]
  return " or ".join(map(str, below + above))
