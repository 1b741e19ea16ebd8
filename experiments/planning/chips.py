"""What each chip can do, as its maker states it: one table.

A mesh axis has devices, which jax counts: a chip is one of them, but tpu7x is two, with
half of its memory, FLOPs and links each.
"""
# SPDX-License-Identifier: Apache-2.0

import dataclasses

from jmoe.use import nearest


@dataclasses.dataclass(frozen=True)
class Chip:
  """A chip; bandwidths in bytes a second, those of links in one direction."""

  name: str
  kind: str  # "tpu" or "gpu"
  flops: float  # bfloat16, dense, a second
  hbm: int  # bytes
  hbm_bandwidth: float
  link: float  # of one link to a neighbour; of a GPU: of all its links together
  links: int  # of a TPU: two for each dimension of its torus
  network: float  # between hosts of GPUs, for each; TPUs have their torus alone
  wraps_at: int  # chips of a torus dimension from which its ends are connected
  devices: int  # that jax sees in a chip
  source: str
  kernels: str  # of `jmoe.kernels.devices.DEVICES`: whose layout of rows it has

  @property
  def dims(self) -> int:
    """Of the torus."""
    return self.links // 2 if self.kind == "tpu" else 1


_GIB = 2**30
_CLOUD = "docs.cloud.google.com/tpu/docs/"

# TPUs' pages state ICI per chip and for both directions: divided by two and by links.
CHIPS = {
  chip.name: chip
  for chip in (
    Chip(
      "v4", "tpu", 275e12, 32 * _GIB, 1.2e12, 50e9, 6, 0, 4, 1,
      "Jouppi et al. 2023 (arXiv:2304.01433), table 4", "tpu",
    ),
    Chip(
      "v5e", "tpu", 197e12, 16 * _GIB, 819e9, 50e9, 4, 0, 16, 1,
      _CLOUD + "v5e", "tpu",
    ),
    Chip(
      "v5p", "tpu", 459e12, 95 * _GIB, 2765e9, 100e9, 6, 0, 4, 1,
      _CLOUD + "v5p", "tpu",
    ),
    Chip(
      "v6e", "tpu", 918e12, 32 * _GIB, 1638e9, 100e9, 4, 0, 16, 1,
      _CLOUD + "v6e", "tpu",
    ),
    Chip(
      "tpu7x", "tpu", 2307e12, 192 * _GIB, 7380e9, 100e9, 6, 0, 4, 2,
      _CLOUD + "tpu7x", "tpu",
    ),
    Chip(
      "A100", "gpu", 312e12, 80 * 10**9, 2039e9, 300e9, 1, 25e9, 0, 1,
      "NVIDIA A100 80GB SXM data sheet; 200 Gbit/s network a GPU assumed", "ampere",
    ),
    Chip(
      "H100", "gpu", 989e12, 80 * 10**9, 3350e9, 450e9, 1, 50e9, 0, 1,
      "NVIDIA H100 SXM data sheet; 400 Gbit/s network a GPU assumed", "hopper",
    ),
    Chip(
      "H200", "gpu", 989e12, 141 * 10**9, 4800e9, 450e9, 1, 50e9, 0, 1,
      "NVIDIA H200 SXM data sheet; 400 Gbit/s network a GPU assumed", "hopper",
    ),
    Chip(
      "B200", "gpu", 2250e12, 180 * 10**9, 7700e9, 900e9, 1, 50e9, 0, 1,
      "NVIDIA HGX B200 data sheet; 400 Gbit/s network a GPU assumed", "ampere",
    ),
  )
}  # fmt: skip


def chip(name: str) -> Chip:
  """The chip of a name, capital letters or not.

  Raises:
    ValueError: no such chip, with the nearest.
  """
  for known, found in CHIPS.items():
    if known.lower() == name.lower():
      return found
  raise ValueError(f"chip {name!r} is not known; {nearest(name, CHIPS)}")
