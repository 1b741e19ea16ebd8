"""Seconds instead of minutes: what the tests of the training job run.

Nothing to look at: twelve steps of a model of two narrow layers.
"""
# SPDX-License-Identifier: Apache-2.0

from experiments.config import Data, Optim, Run
from experiments.vocabulary import VOCAB_SIZE
from jmoe.config import Attention, BlockConfig, Dense, ModelConfig, simple


def run() -> Run:
  """The run."""
  attention = Attention(num_heads=2, num_kv_heads=1)
  dense = BlockConfig(attention, Dense(d_ff=32))
  sparse = BlockConfig(attention, simple(16, d_ff=16, num_experts=4, k=2))
  return Run(
    name="micro",
    model=ModelConfig(VOCAB_SIZE, 16, segments=(((dense, sparse), 1),), remat=False),
    data=Data(max_bytes=60_000, seq=32, batch=4, eval_context=16),
    optim=Optim(learning_rate=1e-2, warmup_steps=2),
    loss_weights=(("load_balance", 0.01), ("router_z", 0.001)),
    steps=12,
    save_every=3,
    prompt="def ",
    sample_bytes=8,
  )
