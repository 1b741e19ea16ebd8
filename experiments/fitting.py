"""The mesh of a command line, and whether a run fits it; nothing is compiled."""
# SPDX-License-Identifier: Apache-2.0

import functools
import math

import jax
import numpy as np

from experiments import batches
from experiments.config import Run, sparse_layers
from experiments.errors import BadConfig
from experiments.planning import mesh as planned
from experiments.program import program
from experiments.spread import Spread
from experiments.strategies import carrier
from jmoe.parallel import EXPERT_TENSOR, Rules, mesh as meshes


def of(run: Run, text: str | None, *, strategy: str | None = None) -> Spread | None:
  """As `make`; None without a text."""
  return None if text is None else make(run, text, strategy=strategy)


@functools.cache
def make(run: Run, text: str, *, strategy: str | None = None) -> Spread:
  """The mesh of a text over all devices of the job, checked against a run.

  Args:
    run: whose layers' own table is used, if they have one.
    text: as in "data=2,fsdp=2,expert=2".
    strategy: as for `strategies.carrier`.

  Raises:
    BadConfig: on one line, what does not fit; nothing was compiled.
  """
  if strategy is not None:
    carrier(strategy)
  try:
    table = _table(run)
    axes = dict.fromkeys((*meshes.AXES, *table.named))
    made = Spread(meshes.make(text, axes=tuple(axes)), table, strategy)
    if table == EXPERT_TENSOR:
      planned.check(run, planned.Mesh.of(made.sizes))
    _check(run, made)
  except BadConfig:
    raise
  except (ValueError, TypeError) as error:
    reason = str(error).splitlines()[0]
    where = "" if reason.startswith("--mesh") else f"--mesh {text}: "
    raise BadConfig(where + reason.removeprefix("mesh: ")) from error
  return made


def _table(run: Run) -> Rules:
  """The table of the sparse layers; the one of all axes if they have none."""
  tables = {ff.sharding for ff in sparse_layers(run.model)} | {run.model.sharding}
  tables -= {None}
  if len(tables) > 1:
    raise BadConfig(
      f"--mesh: the model's layers have {len(tables)} tables of sharding; give all of "
      "them one."
    )
  return next(iter(tables), None) or EXPERT_TENSOR


def _check(run: Run, spread: Spread) -> None:
  """Raises unless all that is split is divisible, and layers can be traced."""
  made = program(run, byte_lengths=np.zeros(0, np.int32), num_domains=1, spread=spread)
  like = jax.eval_shape(made.init)
  specs = spread.params(like.params)
  for name, param in like.params.items():
    for dim, axes in enumerate(specs[name]):
      names = () if axes is None else (axes,) if isinstance(axes, str) else axes
      parts = math.prod(spread.sizes[a] for a in names)
      if param.shape[dim] % parts:
        vocabulary = name.startswith(("embed.", "unembed."))
        is_vocabulary = vocabulary and param.shape[dim] == run.model.vocab_size
        field = "model.vocab_size" if is_vocabulary else f"{name} {param.shape}"
        near = -(-param.shape[dim] // parts) * parts
        remedy = f"--set model.vocab_size={near}" if is_vocabulary else "other sizes"
        raise BadConfig(
          f"--mesh: {'*'.join(names)}={parts} does not divide {param.shape[dim]} of "
          f"{field}; use {remedy}."
        )
  batch = batches.shapes(run.data.batch, run.data.seq)

  def forward(state, batch):
    model = made.blueprint.model(state.params, state.balance)
    key = jax.random.wrap_key_data(state.key)
    inputs = batch["inputs"], batch["segment"], batch["position"]
    return model.hidden(*inputs, key=key, train=True)

  with jax.set_mesh(spread.mesh):  # the rest of a step is divided as these are
    jax.eval_shape(forward, like, batch)
    jax.eval_shape(made.eval_step, like.params, like.balance, batch)
