"""Bytes at work at one time: arrays that a compiler cannot fold into others."""
# SPDX-License-Identifier: Apache-2.0

from experiments.planning import work
from experiments.planning.local import Local, buffer_rows
from experiments.planning.work import head_dim
from jmoe.config import BlockConfig, Dense, MoEConfig
from jmoe.models.cross_entropy import default_chunk


def block(local: Local, of: BlockConfig) -> float:
  """Bytes of one at work: in its feed-forward's backward pass, or in attention.

  The forward pass was made again before the backward pass, so what attention will need
  for its own waits meanwhile.
  """
  if isinstance(of.ff, MoEConfig):
    matrices, arrays = _sparse(local, of.ff)
  else:
    matrices, arrays = _dense(local, of)
  # Gradients of the last matrix are made when another's are gone; in the forward pass
  # matrices come while attention is still at work.
  up = _num_up(of.ff)
  in_backward = matrices * (1 + up / (up + 1)) + arrays + _waiting(local, of)
  return max(in_backward, matrices + _attention(local, of))


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


def _dense(local: Local, of: BlockConfig) -> tuple[float, float]:
  """The same of a dense feed-forward, whose rows are the tokens."""
  model, tensor = local.run.model, local.mesh.tensor
  assert isinstance(of.ff, Dense)
  width = of.ff.d_ff / tensor
  up = _num_up(of.ff)
  matrices = (up + 1) * width * model.d_model * local.gathered
  arrays = 3 * model.d_model + (2 * up + 1) * width
  return matrices, local.tokens * arrays * local.itemsize


def fused(local: Local) -> bool:
  """Whether attention writes no scores: cuDNN's."""
  return local.topology.chip.kind == "gpu" and local.itemsize == 2


def scores(local: Local, of: BlockConfig) -> float:
  """Entries of a layer's scores."""
  heads = of.attention.num_heads / local.mesh.tensor
  return local.tokens * local.run.data.seq * heads


def _waiting(local: Local, of: BlockConfig) -> float:
  """What attention left for its own backward pass: scores in float32, and operands."""
  width = of.attention.num_heads * head_dim(of.attention, local.run.model.d_model)
  operands = 4 * local.tokens * width / local.mesh.tensor * local.itemsize
  return operands + (0.0 if fused(local) else 4 * scores(local, of))


def _attention(local: Local, of: BlockConfig) -> float:
  """Scores and their exponentials in float32, beside what waits."""
  return _waiting(local, of) + (0.0 if fused(local) else 4 * scores(local, of))


def loss(local: Local) -> float:
  """A chunk's logits in float32 and their gradient; the matrix and its gradient."""
  model = local.run.model
  chunk = min(local.run.loss_chunk or default_chunk(model.vocab_size), local.tokens)
  matrix = model.d_model * model.vocab_size
  logits = chunk * model.vocab_size * (4 + local.itemsize)
  hidden = 2 * local.tokens * model.d_model * local.itemsize
  return logits + matrix * (local.itemsize + 4) + hidden
