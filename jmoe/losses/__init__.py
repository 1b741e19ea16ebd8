"""Auxiliary losses: `(plan, context, *, over, axes=None, ...) -> f32[]`, unweighted.

Between routing and the training step: the layer evaluates those that a configuration
names and returns them by name, with their scope in the name; `total_loss` weighs them.
"""
# SPDX-License-Identifier: Apache-2.0

from jmoe.losses.entropy import entropy_global, entropy_local
from jmoe.losses.importance import importance
from jmoe.losses.load import load
from jmoe.losses.load_balance import load_balance
from jmoe.losses.router_z import router_z
from jmoe.losses.total import loss_name, total_loss

__all__ = [
  "load_balance",
  "importance",
  "load",
  "router_z",
  "entropy_local",
  "entropy_global",
  "loss_name",
  "total_loss",
]
