"""The optimizer of a run, through optax: what a parameter is for decides how it moves.

roles        what each parameter is for, and over which dims it is a stack
chains       AdamW, Adafactor and Muon; clip, schedule, decay, accumulation
per_matrix   one matrix of a stack at a time
freeze       parameters and experts that stay as they are
policy       all of it in words
"""
# SPDX-License-Identifier: Apache-2.0

from experiments.optim.chains import Optimizer, optimizer, schedule
from experiments.optim.policy import policy
from experiments.optim.roles import ROLES, role

__all__ = ["ROLES", "Optimizer", "optimizer", "policy", "role", "schedule"]
