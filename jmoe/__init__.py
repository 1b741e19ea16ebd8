"""jmoe: sparse-model layers for jax.

In the order in which a token meets them:

  types      Context, Routing, Plan, Rows, Info, State; the legend of shape letters
  use        a call as data; what configurations are made of
  config     MoEConfig, one field per stage; BlockConfig, ModelConfig
  gates      x -> logits, the only learned part of routing
  noise      on the gate's input, the logits, or the selection
  score      logits -> scores
  restrict   which experts a token may use
  routers    which it chooses -> Routing
  assign     queues, priorities, capacity, renormalisation -> Plan
  dispatch   rows to the experts and home again, on one device or over a mesh
  experts    rows -> rows; kernels holds their matmuls, and ragged_dot for other layers
  combine    the linear ways home; aggregate what replaces them
  join       how a shared expert joins
  losses     balance losses by name; balance the update without a loss
  layer      moe: all of the above on one screen
  parallel   the same over a mesh: meshes, tables of what is split, their cost
  nnx, linen the two Flax modules over it
  models, presets, analysis
  surgery    operations on trained models; convert published checkpoints
"""
# SPDX-License-Identifier: Apache-2.0

import importlib
from typing import TYPE_CHECKING, Any

from jmoe import aggregate as aggregate
from jmoe import assign as assign
from jmoe import balance as balance
from jmoe import combine as combine
from jmoe import dispatch as dispatch
from jmoe import experts as experts
from jmoe import gates as gates
from jmoe import initializers as initializers
from jmoe import join as join
from jmoe import losses as losses
from jmoe import noise as noise
from jmoe import parallel as parallel
from jmoe.parallel import adaptive as _adaptive  # noqa: F401  (after what it reads)
from jmoe import restrict as restrict
from jmoe import routers as routers
from jmoe import score as score
from jmoe.assign import capacity as capacity
from jmoe.assign import priority as priority
from jmoe.assign import renormalise as renormalise
from jmoe.config import BlockConfig as BlockConfig
from jmoe.config import ModelConfig as ModelConfig
from jmoe.config import MoEConfig as MoEConfig
from jmoe.config import simple as simple
from jmoe.kernels.ragged_dot import ragged_dot as ragged_dot
from jmoe.layer import init_state as init_state
from jmoe.layer import moe as moe
from jmoe.layer import moe_init as moe_init
from jmoe.losses import total_loss as total_loss
from jmoe.types import Context as Context
from jmoe.types import Info as Info
from jmoe.types import Plan as Plan
from jmoe.types import Routing as Routing
from jmoe.types import State as State
from jmoe.use import nearest as _nearest
from jmoe.use import use as use

if TYPE_CHECKING:
  from jmoe import analysis as analysis
  from jmoe import convert as convert
  from jmoe import linen as linen
  from jmoe import models as models
  from jmoe import nnx as nnx
  from jmoe import presets as presets
  from jmoe import surgery as surgery

# Imported when first asked for: Flax takes most of a second, and the functions above
# need jax alone.
_LAZY = (
  "analysis", "convert", "explain", "linen", "models", "nnx", "presets", "surgery"
)  # fmt: skip

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
  if name == "explain":
    return importlib.import_module("jmoe.explaining").explain
  if name in _LAZY:
    return importlib.import_module(f"jmoe.{name}")
  known = (each for each in __dir__() if not each.startswith("_"))
  raise AttributeError(f"module 'jmoe' has no {name!r}; {_nearest(name, known)}")


def __dir__() -> list[str]:
  return sorted([*globals(), *_LAZY])
