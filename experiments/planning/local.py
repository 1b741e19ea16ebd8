"""What a device has to do in a step: its tokens, and the rows of its experts."""
# SPDX-License-Identifier: Apache-2.0

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from experiments.config import Run
from experiments.planning import work
from experiments.planning.exchanges import Outcome
from experiments.planning.mesh import Mesh
from experiments.planning.topology import Topology
from jmoe.config import MoEConfig
from jmoe.dispatch.layout import block_size
from jmoe.kernels import devices


class Local(NamedTuple):
  """What a device has to do."""

  run: Run
  mesh: Mesh
  topology: Topology
  tokens: int
  outcome: Outcome | None

  @property
  def itemsize(self) -> int:
    return jnp.dtype(self.run.model.dtype).itemsize

  @property
  def gathered(self) -> int:
    """Bytes of a parameter at work: it comes in the narrower of its two dtypes."""
    return min(self.itemsize, jnp.dtype(self.run.param_dtype).itemsize)

  @property
  def rows(self) -> float:
    """Of the batch."""
    return self.tokens * self.mesh.context / self.run.data.seq


def buffer_rows(local: Local, ff: MoEConfig) -> tuple[float, float]:
  """(rows R of the expert buffer, experts of a device while they multiply)."""
  outcome = local.outcome
  own = ff.num_experts / (outcome.own if outcome else 1)
  share = 1.0
  if outcome is not None:
    share = outcome.rows if outcome.room is None else outcome.room
  choices = local.tokens * work.cost.experts_per_token(ff)
  if ff.capacity is not None:
    slots = capacity_slots(ff, local.tokens)
    return slots * ff.num_experts, own
  mean = choices / ff.num_experts
  block = max(block_size(mean), devices.row_alignment(local.run.model.dtype, mean))
  return choices * share + (block - 1) * min(own, choices), own


def group_sizes(local: Local, ff: MoEConfig) -> np.ndarray:
  """i64[e] rows of a device's experts, filled up: half a tile more on average."""
  own = local.outcome.own if local.outcome else 1
  mean = local.tokens * own * work.cost.experts_per_token(ff) / ff.num_experts
  block = max(block_size(mean), devices.row_alignment(local.run.model.dtype, mean))
  more = np.arange(ff.num_experts // own) % 2
  return (int(mean) // block + more).astype(np.int64) * block


def capacity_slots(ff: MoEConfig, tokens: int) -> int:
  """Slots of an expert for the tokens of a device, as the layer counts them."""
  size = ff.group_size if isinstance(ff.group_size, int) else tokens
  return work.slots(ff, size, 1.0) * max(1, -(-tokens // size))
