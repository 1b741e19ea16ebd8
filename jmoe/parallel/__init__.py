"""Layers over a mesh of devices.

`mesh` builds meshes; `rules` are tables of what is split over which axis; `spmd` runs
a layer whose `MoEConfig.sharding` is such a table.  How rows travel is a dispatch
strategy's affair (`jmoe.dispatch`).
"""
# SPDX-License-Identifier: Apache-2.0

from jmoe.parallel.rules import Rules as Rules
from jmoe.parallel.rules import TABLES as TABLES
from jmoe.parallel.rules import DATA as DATA
from jmoe.parallel.rules import EXPERT as EXPERT
from jmoe.parallel.rules import EXPERT_FSDP as EXPERT_FSDP
from jmoe.parallel.rules import EXPERT_TENSOR as EXPERT_TENSOR
from jmoe.parallel.rules import FSDP as FSDP
from jmoe.parallel.rules import param_specs as param_specs
from jmoe.parallel.rules import shard_params as shard_params
from jmoe.parallel.explaining import explain as explain
