"""EMO: each document trains a pool of the experts that it likes most."""
# SPDX-License-Identifier: Apache-2.0

from jmoe import dispatch, experts, gates, initializers, losses, restrict, routers
from jmoe._spelling import spelt
from jmoe.config import Attention, BlockConfig, ModelConfig, MoEConfig
from jmoe.use import use

LOSS_WEIGHTS = {"load_balance_mesh": 0.1, "router_z": 0.001}


@spelt
def layer(
  *,
  d_model: int,
  d_ff: int,
  num_experts: int = 127,
  k: int = 7,
  least: int | None = None,
  most: int | None = None,
  max_documents: int | None = None,
) -> MoEConfig:
  """An EMO layer.

  Wang, Bhagia, Min 2026, arXiv 2605.06663, and the released model: 127 routed
  experts of width 1024, seven a token, weighed by the softmax within the document's
  pool, not divided by their sum; one shared expert as wide, of weight 1; pools of
  U{8..127} experts; balance over the global batch 0.1, z-loss 0.001 (from the released
  scripts, as the truncated normal of 0.02).  The code draws up to 128 and so has no
  pool a little more often.

  Args:
    d_model, d_ff: widths; d_ff of one expert, and of the shared one.
    num_experts, k: routed experts; the paper's 128 and 8 count the shared one.
    least, most: experts of a pool; None: k + 1, the paper's k, and all of them.
    max_documents: see `restrict.document_pool`.
  """
  start = use(initializers.truncated_normal, stddev=0.02)
  expert = use(experts.glu, d_ff=d_ff, initializer=start)
  pool = use(
    restrict.document_pool,
    least=min(k + 1, num_experts) if least is None else least,
    most=most,
    max_documents=max_documents,
  )
  return MoEConfig(
    d_model,
    num_experts,
    gate=use(gates.linear, initializer=start),
    restrict=(pool,),
    rescore=True,
    router=use(routers.top_k, k=k),
    dispatch=use(dispatch.sort),
    experts=expert,
    shared=expert,
    losses=(use(losses.load_balance, over="mesh"), use(losses.router_z)),
  )


def _decoder(num_experts: int) -> ModelConfig:
  attention = Attention(num_heads=16, rope_theta=500_000.0)
  sparse = layer(d_model=2048, d_ff=1024, num_experts=num_experts, max_documents=64)
  return ModelConfig(
    vocab_size=100_352,
    d_model=2048,
    segments=(((BlockConfig(attention, sparse),), 16),),
    tied=False,
    dtype="bfloat16",
  )


# The released models: 13.6 billion parameters, 1.5 active; a quarter of the experts in
# the smaller one.  No norms of queries and keys.  Our bound on documents of a row is no
# number of theirs.
MODELS = {"1b-14b": _decoder(127), "1b-4b": _decoder(31)}
