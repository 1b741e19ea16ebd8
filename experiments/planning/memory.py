"""Bytes of a device, term by term; the peak is the largest of three moments.

State and gradients are counted from shapes, exactly.  What blocks keep is read off what
a backward pass asks for, traced on shapes; a block that keeps its input alone keeps
`[T,D]`.  What is at work at one time is a count of the arrays that a compiler cannot
fold into others: `_sparse`, `_waiting`, `_attention` and `_loss` say which.
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
from experiments.planning import sharding, work
from experiments.planning.exchanges import Outcome
from experiments.planning.mesh import Mesh
from experiments.planning.topology import Topology
from experiments.planning.work import head_dim
from jmoe.config import BlockConfig, Dense, ModelConfig, MoEConfig
from jmoe.dispatch.layout import block_size
from jmoe.kernels import devices
from jmoe.models import Decoder
from jmoe.models.cross_entropy import default_chunk


class Memory(NamedTuple):
  """Bytes of a device."""

  parameters: float
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
    return self.state + max(at_block, self.kept + self.loss)


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
  parameters = gradients = 0.0
  for name, x in params.items():
    own = _size(x) * sharding.share(sharding.spec(name, x.shape, sizes), sizes)
    parameters += own
    gradients += own
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
      optimizer,
      batch=6 * 4.0 * tokens,
      gradients=gradients,
      kept=sum(n * kept_by(local, block) for block, n in work.blocks(model)),
      block=max(at_work(local, block) for block, _ in work.blocks(model)),
      loss=_loss(local),
      exchange=outcome.buffer if outcome else 0.0,
      looped=work.looped(model),
    )


class Local(NamedTuple):
  """What a device has to do."""

  run: Run
  mesh: Mesh
  topology: Topology
  tokens: int
  outcome: Outcome | None

  @property
  def itemsize(self) -> int:
    return jnp.dtype(self.run.model.dtype).itemsize

  @property
  def gathered(self) -> int:
    """Bytes of a parameter at work: it comes in the narrower of its two dtypes."""
    return min(self.itemsize, jnp.dtype(self.run.param_dtype).itemsize)

  @property
  def rows(self) -> float:
    """Of the batch."""
    return self.tokens * self.mesh.context / self.run.data.seq


def state_of(run: Run) -> Any:
  """Shapes of a run's state; nothing is computed."""
  made = program.program(run, byte_lengths=np.ones(1, np.int32), num_domains=1)
  return jax.eval_shape(made.init)


def buffer_rows(local: Local, ff: MoEConfig) -> tuple[float, float]:
  """(rows R of the expert buffer, experts of a device while they multiply)."""
  outcome = local.outcome
  own = ff.num_experts / (outcome.own if outcome else 1)
  share = 1.0
  if outcome is not None:
    share = outcome.rows if outcome.room is None else outcome.room
  choices = local.tokens * work.cost.experts_per_token(ff)
  if ff.capacity is not None:
    slots = capacity_slots(ff, local.tokens)
    return slots * ff.num_experts, own
  mean = choices / ff.num_experts
  block = max(block_size(mean), devices.row_alignment(local.run.model.dtype, mean))
  return choices * share + (block - 1) * min(own, choices), own


def group_sizes(local: Local, ff: MoEConfig) -> np.ndarray:
  """i64[e] rows of a device's experts, filled up: half a tile more on average."""
  own = local.outcome.own if local.outcome else 1
  mean = local.tokens * own * work.cost.experts_per_token(ff) / ff.num_experts
  block = max(block_size(mean), devices.row_alignment(local.run.model.dtype, mean))
  more = np.arange(ff.num_experts // own) % 2
  return (int(mean) // block + more).astype(np.int64) * block


def capacity_slots(ff: MoEConfig, tokens: int) -> int:
  """Slots of an expert for the tokens of a device, as the layer counts them."""
  size = ff.group_size if isinstance(ff.group_size, int) else tokens
  return work.slots(ff, size, 1.0) * max(1, -(-tokens // size))


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
      more *= _num_up(ff) * work.expert_width(ff) * local.itemsize
  asked = _asked_for(model, dataclasses.replace(block, ff=ff), local) + more
  return asked / local.mesh.tensor


def _asked_for(model: ModelConfig, block: BlockConfig, local: Local) -> float:
  """Of two blocks what one does not ask for; more than a compiler keeps in the end."""
  # Few traces serve a search; from some tokens on what fills up tiles is little.
  most = max(8.0, 2**15 / local.run.data.seq)
  rows = 2 ** int(math.log2(min(max(1.0, local.rows), most)))
  one, two = (
    _traced(
      dataclasses.replace(model, segments=(((block,), 1),) * n, vocab_size=8),
      (rows, local.run.data.seq),
      devices.current_device(),
    )
    for n in (1, 2)
  )
  scores = 0.0 if model.remat or _fused(local) else 4 * _scores(local, block)
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


def at_work(local: Local, block: BlockConfig) -> float:
  """Bytes of a block at work: in its feed-forward's backward pass, or in attention.

  The forward pass was made again before the backward pass, so what attention will need
  for its own waits meanwhile.
  """
  if isinstance(block.ff, MoEConfig):
    matrices, arrays = _sparse(local, block.ff)
  else:
    matrices, arrays = _dense(local, block)
  # Gradients of the last matrix are made when another's are gone; in the forward pass
  # matrices come while attention is still at work.
  up = _num_up(block.ff)
  in_backward = matrices * (1 + up / (up + 1)) + arrays + _waiting(local, block)
  return max(in_backward, matrices + _attention(local, block))


def _num_up(ff: Dense | MoEConfig) -> int:
  """Matrices into the hidden layer."""
  if isinstance(ff, MoEConfig):
    return work.num_up(ff)
  return 2 if ff.gated else 1


def _sparse(local: Local, ff: MoEConfig) -> tuple[float, float]:
  """(matrices, arrays of rows) of a sparse layer, in bytes.

  Of rows [R,D] three: what went in, the gradient of what came out, and that of what
  went in.  Of hidden arrays [R,F] what the activation takes, what it gives, and the
  gradients of what it takes.  Hopper's kernels make rows anew and write gradients over
  what they have read: one, and the hidden arrays of a forward pass.
  """
  tensor = local.mesh.tensor
  R, own = buffer_rows(local, ff)
  matrices = work.expert_params(ff) * own / ff.num_experts / tensor * local.gathered
  hidden = R * work.expert_width(ff) / tensor
  if local.topology.chip.kernels == "hopper" and local.itemsize == 2:
    arrays = R * ff.d_model + (_num_up(ff) + 1) * hidden
  else:
    arrays = 3 * R * ff.d_model + (2 * _num_up(ff) + 1) * hidden
  shared = (2 * _num_up(ff) + 1) * local.tokens * work.dense_width(ff) / tensor
  return matrices, (arrays + shared) * local.itemsize


def _dense(local: Local, block: BlockConfig) -> tuple[float, float]:
  """The same of a dense feed-forward, whose rows are the tokens."""
  model, tensor = local.run.model, local.mesh.tensor
  assert isinstance(block.ff, Dense)
  width = block.ff.d_ff / tensor
  up = _num_up(block.ff)
  matrices = (up + 1) * width * model.d_model * local.gathered
  arrays = 3 * model.d_model + (2 * up + 1) * width
  return matrices, local.tokens * arrays * local.itemsize


def _fused(local: Local) -> bool:
  """Whether attention writes no scores: cuDNN's."""
  return local.topology.chip.kind == "gpu" and local.itemsize == 2


def _scores(local: Local, block: BlockConfig) -> float:
  """Entries of a layer's scores."""
  heads = block.attention.num_heads / local.mesh.tensor
  return local.tokens * local.run.data.seq * heads


def _waiting(local: Local, block: BlockConfig) -> float:
  """What attention left for its own backward pass: scores in float32, and operands."""
  width = block.attention.num_heads * head_dim(block.attention, local.run.model.d_model)
  operands = 4 * local.tokens * width / local.mesh.tensor * local.itemsize
  return operands + (0.0 if _fused(local) else 4 * _scores(local, block))


def _attention(local: Local, block: BlockConfig) -> float:
  """Scores and their exponentials in float32, beside what waits."""
  return _waiting(local, block) + (0.0 if _fused(local) else 4 * _scores(local, block))


def _loss(local: Local) -> float:
  """A chunk's logits in float32 and their gradient; the matrix and its gradient."""
  model = local.run.model
  chunk = min(local.run.loss_chunk or default_chunk(model.vocab_size), local.tokens)
  matrix = model.d_model * model.vocab_size
  logits = chunk * model.vocab_size * (4 + local.itemsize)
  hidden = 2 * local.tokens * model.d_model * local.itemsize
  return logits + matrix * (local.itemsize + 4) + hidden


def _size(x: Any) -> float:
  return float(math.prod(x.shape)) * jnp.dtype(x.dtype).itemsize


def _bytes(tree: Any) -> float:
  return sum(_size(x) for x in jax.tree.leaves(tree) if hasattr(x, "dtype"))
