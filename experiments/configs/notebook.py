"""A sparse model for one chip of 16 GB and ten minutes: what the notebook trains.

27 million parameters, 5 million of them met by a token: eight layers of sixteen
experts, two a token, in buckets of capacity 1.25, which every accelerator multiplies
at full speed.  The text is the `handbook` corpus: manuals, code and a dictionary in
many languages (needs apt, which Colab has).

  python -m experiments.main --config notebook --workdir runs/notebook
"""
# SPDX-License-Identifier: Apache-2.0

from experiments.config import Data, Optim, Run
from experiments.vocabulary import VOCAB_SIZE
from jmoe.config import Attention, BlockConfig, ModelConfig, simple


def run() -> Run:
  """The run."""
  d_model = 256
  sparse = simple(
    d_model,
    d_ff=256,
    num_experts=16,
    k=2,
    capacity_factor=1.25,
    eval_capacity_factor=2.0,
  )
  block = BlockConfig(Attention(num_heads=4, num_kv_heads=4), sparse)
  return Run(
    name="notebook",
    model=ModelConfig(
      VOCAB_SIZE, d_model, segments=(((block,), 8),), remat=False, dtype="bfloat16"
    ),
    data=Data(
      corpus="handbook", max_bytes=30_000_000, seq=512, batch=32, eval_context=256
    ),
    optim=Optim(learning_rate=2e-3, warmup_steps=100),
    loss_weights=(("load_balance", 0.01), ("router_z", 0.001)),
    steps=2000,
    save_every=250,
    prompt="The ",
  )
