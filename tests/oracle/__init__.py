"""The definition of correctness: mixture of experts as Python loops over tokens.

NumPy in float64, slow and obviously right, sharing no code with `jmoe`.  Everything
is written from the papers.  The flow is the same as the library's:

  scores -> router -> [Entry] -> assign -> slot, kept, load
                         |                          |
                         +------ renormalise -------+--> forward -> y

An implementation in float32 can tie where float64 does not: to compare the chosen
experts exactly, hand the oracle the implementation's own scores.
"""
# SPDX-License-Identifier: Apache-2.0

from tests.oracle.assign import (
  RENORMALISE,
  assign,
  bounded,
  by_choice_rank,
  by_confidence,
  by_weight,
  drop_overflow,
  dropped_fraction,
  renormalise,
)
from tests.oracle.capacity import CAPACITY_RULES, WORKED, WORKED_CAPACITY
from tests.oracle.experts import (
  constant,
  copy,
  forward,
  gelu,
  gelu_exact,
  glu,
  gpt_oss_glu,
  identity,
  mlp,
  silu,
  soft_forward,
  zero,
)
from tests.oracle.losses import (
  bias_update,
  entropy_global,
  entropy_local,
  finite_difference,
  importance,
  load_balance,
  load_vmoe,
  router_z,
)
from tests.oracle.routers import (
  Entry,
  as_matrix,
  every_expert,
  expert_choice,
  forced,
  hashed,
  ranks,
  soft,
  top_2,
  top_k,
)
from tests.oracle.scores import SCORES, relu, sigmoid, softmax, sqrt_softplus

__all__ = [
  "CAPACITY_RULES",
  "RENORMALISE",
  "SCORES",
  "WORKED",
  "WORKED_CAPACITY",
  "Entry",
  "as_matrix",
  "assign",
  "bias_update",
  "bounded",
  "by_choice_rank",
  "by_confidence",
  "by_weight",
  "constant",
  "copy",
  "drop_overflow",
  "dropped_fraction",
  "entropy_global",
  "entropy_local",
  "every_expert",
  "expert_choice",
  "finite_difference",
  "forced",
  "forward",
  "gelu",
  "gelu_exact",
  "glu",
  "gpt_oss_glu",
  "hashed",
  "identity",
  "importance",
  "load_balance",
  "load_vmoe",
  "mlp",
  "ranks",
  "relu",
  "renormalise",
  "router_z",
  "sigmoid",
  "silu",
  "soft",
  "soft_forward",
  "softmax",
  "sqrt_softplus",
  "top_2",
  "top_k",
  "zero",
]
