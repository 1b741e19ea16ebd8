"""Which part of a chip's stated rate is reached: all that was measured, in one place.

The shares of GPUs are of one H200, of two and of four of one host (26 November 2026,
experiments/benchmarks/RESULTS.md; exchanges of 0.13 to 0.81 GB under `jax.shard_map`).
No TPU was run: theirs are the H200's for products, and assumed for links.  Who measures
writes here.
"""
# SPDX-License-Identifier: Apache-2.0

import dataclasses
from typing import NamedTuple

import numpy as np

from experiments.planning.chips import CHIPS, Chip

TILE = 128  # rows of a tile of Hopper's kernels

# Rows of an expert that would be multiplied while its matrices are waited for, besides
# its own: DeepSeek-V3's layer, loads balanced, takes 28.3 ms with 2048 rows an expert
# and 33.4 ms with 256.  As if 0.38 of the time in which an H200's memory reads what its
# products take at 600 TFLOP/s were not hidden; other chips by their own two rates.
_WAITED = 53

# Forward and gradients of a dropless layer over the peak of 989 TFLOP/s, by the
# narrower of d_model and d_ff: Qwen3 513, OLMoE 533, DeepSeek-V3 589, Mixtral 635.  At
# as many rows an expert as `_ROWS`, skewed, so that half of a last tile is empty.
_NARROWER = (768, 1024, 2048, 4096)
_GROUPED = (0.519, 0.539, 0.596, 0.642)
_ROWS = (2048, 4096, 2048, 4096)


class Link(NamedTuple):
  """What one collective reaches.

  A call over n devices takes `call + (n - 1) * further`, and of the bytes that leave
  `bytes / (share * link)`.  Where a device's own part is copied as well, as many bytes
  as go to each of the others, that takes `own * bytes / (n - 1) / link` more.
  """

  share: float  # of the links, by what bytes add
  call: float = 0.0  # seconds of a call beside its bytes: launch, first and last wave
  further: float = 0.0  # seconds that each of the other devices adds to a call
  own: float = 0.0  # time of a byte of a device's own part, over that of the links


@dataclasses.dataclass(frozen=True)
class Rates:
  """Shares of the stated rates."""

  product: float  # of dense matrix products
  attention: float  # of scores and values
  memory: float  # of HBM's bandwidth
  all_to_all: Link
  permute: Link
  ragged_all_to_all: Link
  all_gather: Link
  reduce_scatter: Link
  hidden: float  # of exchanges of parameters, behind products: of layers apart
  in_loops: float  # and of layers in a loop
  measured: str

  def of(self, collective: str) -> Link:
    """What a collective reaches."""
    if collective == "all_reduce":  # one after the other
      gather, scatter = self.all_gather, self.reduce_scatter
      return Link(
        2 / (1 / gather.share + 1 / scatter.share),
        gather.call + scatter.call,
        gather.further + scatter.further,
        (gather.own + scatter.own) / 2,
      )
    return getattr(self, collective)


# Arrays [T,D] that a block reads or writes between its products, forward and backward:
# two norms, rotary positions, two sums.  Counted by hand, not measured.
PASSES = 48

# How often memory moves an exchange's rows in a step, beside what a layer on one device
# does: into the order of experts and back, out of slots, rows of nobody that are read
# on the way home.  Fitted to the times of five shapes over two and four H200s, 29 of
# each strategy and 15 of hierarchical: deviations are then 2 to 5% of a time, and 6% of
# deduplicated's, which has none.  `all_gather`'s are zeros for rows of nobody, which
# GPUs' kernels write no more: without them 26 later times deviate by 4%.
COPIES = {
  "all_gather": 3.0,
  "all_to_all": 6.0,
  "ragged_all_to_all": 4.0,
  "hierarchical": 22.0,
  "deduplicated": 0.0,
}

# Exchanges: lines through two sizes, over two GPUs and over four (GB/s of 450 that
# leave a GPU, microseconds of a call): all_to_all 350, 98 and 353, 167; ragged (512
# updates a peer) 201, 27 and 230, 18; all_gather 274, 67 and 332, 88; reduce_scatter
# 268, 93 and 327, 84; `ppermute` 352.  What differs by n is taken for a device's own
# part and, of a call, for what each further one adds; beyond four that is a guess.  A
# product of 8192^3 runs at 765 TFLOP/s, a copy moves 4.27 TB/s.
#
# In OLMoE's step of rows without documents cuDNN's attention reached 0.70, counted as
# here, which is not causal.  With documents it reads a bias: 0.34 is what brings six
# training steps over two and four H200s (OLMoE's and Qwen3's) nearest to their plans, 4
# to 6% at most; it was not timed alone, so it holds what else those plans lack.  XLA's
# latency hiding scheduler was off in them, and is on now.
#
# What is exchanged beside products slows them: three steps of Qwen3's layers apart over
# fsdp=2 and fsdp=4 took 0.22, 0.29 and 0.49 of their parameters' exchanges longer than
# without any, and one in a loop 0.57 (8 rows a GPU; 0.43 hidden).
_H200 = Rates(
  0.77,
  0.34,
  0.89,
  Link(0.781, 64e-6, 34e-6),
  Link(0.782),
  Link(0.551, 27e-6, own=0.42),
  Link(0.824, 57e-6, 10e-6, own=0.43),
  Link(0.816, 90e-6, own=0.45),
  0.7,
  0.4,
  "on H200s",
)
_TPU = Rates(
  0.77,
  0.35,
  0.89,
  Link(0.80, further=1e-6),
  Link(0.80, further=1e-6),
  Link(0.60, further=1e-6),
  Link(0.80, further=1e-6),
  Link(0.80, further=1e-6),
  1.0,
  1.0,
  "on no TPU: assumed",
)


def rates(chip: Chip) -> Rates:
  """The shares for a chip."""
  if chip.kind == "tpu":
    return _TPU
  where = _H200.measured if chip.name == "H200" else "on H200s, not on this GPU"
  return dataclasses.replace(_H200, measured=where)


def waited(chip: Chip) -> float:
  """Rows of an expert for whose time its matrices are waited for."""
  of_h200 = CHIPS["H200"].flops / CHIPS["H200"].hbm_bandwidth
  return _WAITED * chip.flops / chip.hbm_bandwidth / of_h200


def grouped(d_model: int, d_ff: int) -> float:
  """Share of the peak that a sparse layer's products reach, movement of rows included.

  With as many rows an expert as one likes; of few `Layer.filled` tells the rest.

  Args:
    d_model: width of the rows.
    d_ff: width of an expert, on a device.
  """
  narrower = np.log2(max(1, min(d_model, d_ff)))
  known = np.log2(_NARROWER)
  shares = np.array(_GROUPED) * (1 + (TILE / 2 + _WAITED) / np.array(_ROWS))
  if narrower < known[0]:  # half the width, half the rate
    return float(shares[0] * 2.0 ** (narrower - known[0]))
  return float(np.interp(narrower, known, shares))
