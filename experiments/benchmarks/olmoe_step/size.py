"""The model and its batch, in numbers that both sides are built from and counted by."""
# SPDX-License-Identifier: Apache-2.0

import dataclasses

STEPS = 4  # queued between two looks at the clock


@dataclasses.dataclass(frozen=True)
class Size:
  """OLMoE-1B-7B (Muennighoff et al. 2024, arXiv:2409.02060) on four rows of 4096."""

  layers: int = 16
  d_model: int = 2048
  d_ff: int = 1024
  heads: int = 16
  experts: int = 64
  k: int = 8
  vocab: int = 50304
  rows: int = 4
  seq: int = 4096

  @property
  def tokens(self) -> int:
    return self.rows * self.seq

  @property
  def layer_params(self) -> int:
    """Of one layer: attention with its four norms, router, experts."""
    d = self.d_model
    return 4 * d * d + 4 * d + d * self.experts + self.experts * self.expert_params

  @property
  def expert_params(self) -> int:
    return 3 * self.d_model * self.d_ff

  @property
  def params(self) -> int:
    return self.layers * self.layer_params + self.d_model * (2 * self.vocab + 1)

  @property
  def active(self) -> int:
    """Parameters that a token meets, without the embedding, which is no product."""
    idle = self.layers * (self.experts - self.k) * self.expert_params
    return self.params - idle - self.d_model * self.vocab

  @property
  def flops(self) -> float:
    """Of a step: 6 for each token and active parameter, and causal attention.

    A mask leaves half of the `12 rows seq^2 d_model` of attention to a layer.
    """
    attention = 6.0 * self.layers * self.rows * self.seq**2 * self.d_model
    return 6.0 * self.active * self.tokens + attention


TINY = Size(2, d_model=64, d_ff=32, heads=4, experts=8, k=2, vocab=500, rows=2, seq=32)
