"""Layers over a mesh of devices.

`mesh` builds meshes; `rules` are tables of what is split over which axis; `spmd` runs
a layer whose `MoEConfig.sharding` is such a table.  How rows travel is a dispatch
strategy's affair (`jmoe.dispatch`).
"""
# SPDX-License-Identifier: Apache-2.0

from jmoe.parallel.rules import Rules as Rules
from jmoe.parallel.rules import TABLES as TABLES
