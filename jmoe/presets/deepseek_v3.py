"""DeepSeek-V3: sigmoid scores, balanced by a bias instead of a loss."""
# SPDX-License-Identifier: Apache-2.0

from jmoe import balance, dispatch, experts, losses, restrict, routers, score
from jmoe._spelling import spelt
from jmoe.assign import renormalise
from jmoe.config import Attention, BlockConfig, Dense, ModelConfig, MoEConfig
from jmoe.use import use

LOSS_WEIGHTS = {"load_balance_sequence": 1e-4}  # alpha


@spelt
def layer(
  *,
  d_model: int,
  d_ff: int,
  num_experts: int = 256,
  k: int = 8,
  num_shared: int = 1,
  num_groups: int = 8,
  keep_groups: int = 4,
  scale: float = 2.5,
  rate: float = 1e-3,
) -> MoEConfig:
  """A DeepSeek-V3 layer.

  DeepSeek-AI 2024, arXiv 2412.19437, section 2.1.2: equations 12 to 16 (sigmoid scores;
  selection by score plus bias; weights are the chosen scores divided by their sum), the
  4 best of 8 expert groups by the sum of their two best, equations 17 to 20 (loss per
  sequence).  Section 4.2: d_model 7168, d_ff 2048, 1 shared expert, all blocks but the
  first 3, alpha 1e-4, bias rate 1e-3 (0 for the last 500B tokens).  From the released
  model: weights times 2.5.

  Args:
    d_model, d_ff, num_experts, k: sizes.
    num_shared: shared experts, each d_ff wide.
    num_groups: expert groups, one a node.
    keep_groups: how many of them a token may use.
    scale: what a token's weights sum to.
    rate: of the bias update.
  """
  return MoEConfig(
    d_model,
    num_experts,
    score=use(score.sigmoid),
    restrict=(
      use(restrict.expert_groups, num_groups=num_groups, keep=keep_groups, best=2),
    ),
    router=use(routers.top_k, k=k, scale=scale),
    renormalise=use(renormalise.before_dropping),
    dispatch=use(dispatch.sort),
    experts=use(experts.glu, d_ff=d_ff),
    shared=use(experts.glu, d_ff=num_shared * d_ff),
    losses=(use(losses.load_balance, over="sequence"),),
    balance=use(balance.update, rate=rate),
  )


def _sized() -> ModelConfig:
  # Latent attention has 187.1 million parameters a layer; these heads have 187.2.
  attention = Attention(num_heads=96, num_kv_heads=6, head_dim=128)
  dense = BlockConfig(attention, Dense(d_ff=18432))
  sparse = BlockConfig(attention, layer(d_model=7168, d_ff=2048))
  return ModelConfig(
    vocab_size=129280,
    d_model=7168,
    segments=(((dense,), 3), ((sparse,), 58)),
    tied=False,
    dtype="bfloat16",
  )


# Of the size of DeepSeek-V3 (section 4.2: 61 layers, 671 billion parameters, 37
# active), not DeepSeek-V3: grouped-query attention of as many parameters stands for its
# latent attention, and multi-token prediction is left out.
MODELS = {"671b-size": _sized()}
