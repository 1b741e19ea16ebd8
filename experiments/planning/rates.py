"""Which part of a chip's stated rate is reached: all that was measured, in one place.

The shares of GPUs are of one H200 and of two (experiments/benchmarks/RESULTS.md, 26
November 2026; exchanges of 0.13 and 0.54 GB under `jax.shard_map`).  No TPU was run:
theirs are the H200's for products, and assumed for links.  Who measures writes here.
"""
# SPDX-License-Identifier: Apache-2.0

import dataclasses
from typing import NamedTuple

import numpy as np

from experiments.planning.chips import Chip

# Forward and gradients of a dropless layer over the peak of 989 TFLOP/s, by the
# narrower of d_model and d_ff: Qwen3 513, OLMoE 533, DeepSeek-V3 589, Mixtral 635.
_NARROWER = (768, 1024, 2048, 4096)
_GROUPED = (0.519, 0.539, 0.596, 0.642)


class Link(NamedTuple):
  """What one collective reaches: a call takes `call + bytes / (share * link)`."""

  share: float  # of the links, by what bytes add
  call: float = 0.0  # seconds of a call beside its bytes: launch, first and last wave


@dataclasses.dataclass(frozen=True)
class Rates:
  """Shares of the stated rates."""

  product: float  # of dense matrix products
  attention: float  # of scores and values
  memory: float  # of HBM's bandwidth
  all_to_all: Link
  ragged_all_to_all: Link
  all_gather: Link
  reduce_scatter: Link
  message: float  # seconds that a message to each further device costs; assumed
  measured: str

  def of(self, collective: str) -> Link:
    """What a collective reaches."""
    if collective == "all_reduce":  # one after the other
      gather, scatter = self.all_gather, self.reduce_scatter
      share = 2 / (1 / gather.share + 1 / scatter.share)
      return Link(share, gather.call + scatter.call)
    return getattr(self, collective)


# Arrays [T,D] that a block reads or writes between its products, forward and backward:
# two norms, rotary positions, two sums.  Counted by hand, not measured.
PASSES = 48

# How often memory moves an exchange's rows in a step, beside what a layer on one device
# does: into the order of experts and back, out of slots, rows of nobody that are read
# on the way home.  Fitted to layers of Qwen3 and Mixtral on two H200s.  With OLMoE's
# and DeepSeek-V3's, shares of one GPU's rate agree to 0.03 in 15 of 22 cases, and to
# 0.09 in the others (tests/planning/exchanges_test.py names them).
COPIES = {
  "all_gather": 2.0,
  "all_to_all": 4.0,
  "ragged_all_to_all": 8.0,
  "hierarchical": 8.0,  # as two of all_to_all
  "deduplicated": 0.0,
}

# Lines through two sizes each.  At 0.54 GB they are 328, 199, 265 and 259 GB/s of 450
# that leave a GPU (512 updates a peer of the ragged one), `ppermute` 352.  A product of
# 8192^3 runs at 765 TFLOP/s, a copy moves 4.27 TB/s.  In OLMoE's step of rows without
# documents cuDNN's attention reached 0.70, counted as here, which is not causal; with
# documents it reads a bias, and the backward pass makes its output anew: assumed.
_H200 = Rates(
  0.77,
  0.45,
  0.89,
  Link(0.778, 98e-6),
  Link(0.447, 27e-6),
  Link(0.608, 67e-6),
  Link(0.595, 93e-6),
  5e-6,
  "on H200s, but attention",
)
_TPU = Rates(
  0.77,
  0.35,
  0.89,
  Link(0.80),
  Link(0.60),
  Link(0.80),
  Link(0.80),
  1e-6,
  "on no TPU: assumed",
)


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
