"""Sparse against dense on one big GPU: the model that the series in `results/` train.

109 million parameters, 21 million of them met by a token: eight layers of sixteen
experts, two a token, in buckets of capacity 1.25, on the `handbook` corpus (thirteen
kinds of text in eight languages, 88 MB).  66 million bytes of training, less than once
over the text, so that what is measured is learning and not memory.

Expected at 1100 steps, three seeds: 1.243 bits per byte on the held-out documents, the
dense model of equal active FLOPs 1.303; five minutes on one H200 for both.

  python -m experiments.main --config small --workdir runs/small
  python -m experiments.series --config small --arms sparse,dense --out runs/series
"""
# SPDX-License-Identifier: Apache-2.0

from experiments.config import Data, Optim, Run
from experiments.vocabulary import VOCAB_SIZE
from jmoe.config import Attention, BlockConfig, ModelConfig, simple


def run() -> Run:
  """The run."""
  d_model = 512
  sparse = simple(
    d_model,
    d_ff=512,
    num_experts=16,
    k=2,
    capacity_factor=1.25,
    eval_capacity_factor=2.0,
  )
  block = BlockConfig(Attention(num_heads=8), sparse)
  return Run(
    name="small",
    model=ModelConfig(
      VOCAB_SIZE, d_model, segments=(((block,), 8),), remat=False, dtype="bfloat16"
    ),
    data=Data(
      corpus="handbook", max_bytes=30_000_000, seq=512, batch=64, eval_context=256
    ),
    optim=Optim(learning_rate=1e-3, warmup_steps=100),
    loss_weights=(("load_balance", 0.01), ("router_z", 0.001)),
    steps=2000,
    save_every=500,
    prompt="The ",
  )
