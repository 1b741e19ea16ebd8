"""Which part of a chip's stated rate is reached: all that was measured, in one place.

The shares of GPUs are of one H200 and of two (experiments/benchmarks/RESULTS.md, 26
November 2026; exchanges of a quarter to one GB under `jax.shard_map`).  No TPU was run:
theirs are the H200's for products, and assumed for links.  Who measures writes here.
"""
# SPDX-License-Identifier: Apache-2.0

import dataclasses

import numpy as np

from experiments.planning.chips import Chip

# Forward and gradients of a dropless layer over the peak of 989 TFLOP/s, by the
# narrower of d_model and d_ff: Qwen3 513, OLMoE 533, DeepSeek-V3 589, Mixtral 635.
_NARROWER = (768, 1024, 2048, 4096)
_GROUPED = (0.519, 0.539, 0.596, 0.642)


@dataclasses.dataclass(frozen=True)
class Rates:
  """Shares of the stated rates."""

  product: float  # of dense matrix products
  attention: float  # of scores and values
  memory: float  # of HBM's bandwidth
  all_to_all: float  # of links, by collective
  ragged_all_to_all: float
  all_gather: float
  reduce_scatter: float
  message: float  # seconds that one message costs beside its bytes; assumed
  measured: str

  def of(self, collective: str) -> float:
    """Share of the links that a collective reaches."""
    if collective == "all_reduce":  # one after the other
      return 2 / (1 / self.all_gather + 1 / self.reduce_scatter)
    return getattr(self, collective)


# Arrays [T,D] that a block reads or writes between its products, forward and backward:
# two norms, rotary positions, two sums.  Counted by hand, not measured.
PASSES = 48

# GB/s that leave a GPU of 450: all_to_all 267, ragged 135 (512 updates a peer), gather
# 259, reduce-scatter 229.  A product of 8192^3 runs at 765 TFLOP/s, a copy moves 4.27
# TB/s.  Attention was never measured by itself.
_H200 = Rates(
  0.77, 0.45, 0.89, 0.59, 0.30, 0.575, 0.51, 5e-6, "on H200s, but attention"
)
_TPU = Rates(0.77, 0.35, 0.89, 0.80, 0.60, 0.80, 0.80, 1e-6, "on no TPU: assumed")


def rates(chip: Chip) -> Rates:
  """The shares for a chip."""
  if chip.kind == "tpu":
    return _TPU
  where = _H200.measured if chip.name == "H200" else "on H200s, not on this GPU"
  return dataclasses.replace(_H200, measured=where)


def grouped(d_model: int, d_ff: int) -> float:
  """Share of the peak that a sparse layer's products reach, movement of rows included.

  Args:
    d_model: width of the rows.
    d_ff: width of an expert, on a device.
  """
  narrower = np.log2(max(1, min(d_model, d_ff)))
  known = np.log2(_NARROWER)
  if narrower < known[0]:  # half the width, half the rate
    return _GROUPED[0] * 2.0 ** (narrower - known[0])
  return float(np.interp(narrower, known, _GROUPED))
