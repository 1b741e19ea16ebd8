"""Bytes of a device, term by term; the peak is the largest of three moments.

State and gradients are counted from shapes, exactly.  What blocks keep is read off what
a backward pass asks for, traced on shapes; a block that keeps its input alone keeps
`[T,D]`.  What is at work at one time is counted by `experiments.planning.at_work`.
"""
# SPDX-License-Identifier: Apache-2.0

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from experiments import program, state as states
from experiments.config import Run
from experiments.planning import at_work, sharding, work
from experiments.planning.exchanges import Outcome
from experiments.planning.local import Local, buffer_rows
from experiments.planning.mesh import Mesh
from experiments.planning.topology import Topology
from jmoe.config import BlockConfig, ModelConfig, MoEConfig
from jmoe.kernels import devices
from jmoe.models import Decoder


class Memory(NamedTuple):
  """Bytes of a device."""

  parameters: float
  turned: float  # copies of parameters, the dim first along which they are gathered
  optimizer: float
  batch: float
  gradients: float
  kept: float  # by blocks for the backward pass
  block: float  # at work in the backward pass of the largest block
  loss: float  # at work in the loss
  exchange: float  # buffers of a strategy
  looped: float  # part of the layers that are in loops

  @property
  def state(self) -> float:
    return self.parameters + self.optimizer + self.batch

  @property
  def peak(self) -> float:
    """Gradients of blocks do not exist while the loss is made.

    Without a loop what a block kept goes as its gradients come; a stack stays whole.
    """
    less, more = sorted((self.gradients, self.kept))
    at_block = more + self.looped * less + self.block + self.exchange
    return self.state + self.turned + max(at_block, self.kept + self.loss)


def of(
  run: Run, mesh: Mesh, topology: Topology, state: Any, outcome: Outcome | None
) -> Memory:
  """Memory of a step.

  Args:
    run: with its batch.
    mesh: of the topology.
    topology: whose kernels and layout count.
    state: shapes of `program.init`.
    outcome: of the strategy of sparse layers; None: of a dense model.
  """
  sizes, params = mesh.sizes, state.params
  model = run.model
  parameters = gradients = turned = 0.0
  for name, x in params.items():
    spec = sharding.spec(name, x.shape, sizes)
    own = _size(x) * sharding.share(spec, sizes)
    parameters += own
    gradients += own
    # XLA gathers along the first dim of a layer, and takes the transposes that this
    # needs out of a loop: of whole stacks, for the whole step (by H200s' compiler).
    if topology.chip.kind == "gpu" and name.startswith("segments.") and x.shape[0] > 1:
      turned += own if "fsdp" in spec[2:] else 0.0
  optimizer = 0.0
  rest = (state.optimizer, state.balance, state.step, state.skipped, state.key)
  for path, x in jax.tree_util.tree_leaves_with_path(rest):
    name = ".".join(map(states.path_part, path))
    param = sharding.like(name, x.shape, params)
    part = 1.0
    if param is not None:
      part = sharding.share(sharding.spec(param, x.shape, sizes), sizes)
    optimizer += _size(x) * part
  tokens = run.data.batch * run.data.seq // (mesh.rows * mesh.context)
  with devices.as_if(topology.chip.kernels):
    local = Local(run, mesh, topology, tokens, outcome)
    return Memory(
      parameters,
      turned,
      optimizer,
      batch=6 * 4.0 * tokens,
      gradients=gradients,
      kept=sum(n * kept_by(local, block) for block, n in work.blocks(model)),
      block=max(at_work.block(local, block) for block, _ in work.blocks(model)),
      loss=at_work.loss(local),
      exchange=outcome.buffer if outcome else 0.0,
      looped=work.looped(model),
    )


def state_of(run: Run) -> Any:
  """Shapes of a run's state; nothing is computed."""
  made = program.program(run, byte_lengths=np.ones(1, np.int32), num_domains=1)
  return jax.eval_shape(made.init)


def kept_by(local: Local, block: BlockConfig) -> float:
  """Bytes that one block keeps until its backward pass."""
  model, remat = local.run.model, local.run.model.remat
  one = local.tokens * model.d_model * local.itemsize
  if remat is True:
    return one
  ff, more = block.ff, 0.0
  if isinstance(ff, MoEConfig) and local.outcome is not None:
    # One device's own rows are traced; a strategy's buffer may have room for more.
    ff = dataclasses.replace(ff, max_rows=None)
    alone = local._replace(outcome=None)
    if remat is False or "hidden" in remat:
      more = buffer_rows(local, ff)[0] - buffer_rows(alone, ff)[0]
      more *= work.num_up(ff) * work.expert_width(ff) * local.itemsize
  asked = _asked_for(model, dataclasses.replace(block, ff=ff), local) + more
  return asked / local.mesh.tensor


def _asked_for(model: ModelConfig, block: BlockConfig, local: Local) -> float:
  """Of two blocks what one does not ask for; more than a compiler keeps in the end."""
  # Few traces serve a search; from some tokens on what fills up tiles is little.
  most = max(8.0, 2**15 / local.run.data.seq)
  rows = 2 ** int(math.log2(min(max(1.0, local.rows), most)))
  # The same wherever it is traced: with a mask, which a job's rows of documents have,
  # cuDNN keeps what XLA's attention keeps, but for scores.
  attention = dataclasses.replace(block.attention, implementation="xla")
  block = dataclasses.replace(block, attention=attention)
  one, two = (
    _traced(
      dataclasses.replace(model, segments=(((block,), 1),) * n, vocab_size=8),
      (rows, local.run.data.seq),
      devices.current_device(),
    )
    for n in (1, 2)
  )
  unwritten = model.remat or at_work.fused(local)
  scores = 0.0 if unwritten else 4 * at_work.scores(local, block)
  return (two - one) * local.rows / rows + scores


@functools.lru_cache(maxsize=64)
def _traced(model: ModelConfig, shape: tuple[int, int], kind: str) -> float:
  """Bytes that the backward pass of a model asks for, without parameters.

  Nor scores of attention, of which a trace names several and a compiler keeps one.
  """
  made, params, balance = states.take_apart(
    nnx.eval_shape(lambda: Decoder(model, rngs=nnx.Rngs(0)))
  )

  def backward(params, balance, tokens_BS):
    def loss(params):
      key = jax.random.key(0)
      return made.model(params, balance).hidden(tokens_BS, key=key, train=True)

    return jax.vjp(loss, params, has_aux=True)[1]

  tokens_BS = jax.ShapeDtypeStruct(shape, jnp.int32)
  with devices.as_if(kind):
    asked = jax.eval_shape(backward, params, balance, tokens_BS)
  # Parameters, as they are or in another dtype, are the step's and not kept by blocks.
  theirs = {x.shape for x in params.values()} | {x.shape[1:] for x in params.values()}
  kept = [x for x in jax.tree.leaves(asked) if x.shape not in theirs]
  return _bytes([x for x in kept if x.shape[-2:] != (shape[1],) * 2])


def _size(x: Any) -> float:
  return float(math.prod(x.shape)) * jnp.dtype(x.dtype).itemsize


def _bytes(tree: Any) -> float:
  return sum(_size(x) for x in jax.tree.leaves(tree) if hasattr(x, "dtype"))
