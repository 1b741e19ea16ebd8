"""A sparse model that will be given more experts: what `experiments.grow` trains.

31 million parameters, six layers of sixteen experts of width 256, two a token, no
token dropped, so that what is added takes no place from what was there.  On the
`handbook` corpus (thirteen kinds of text in eight languages) without one kind of it:

  python -m experiments.grow --config grow --domain ko --seeds 0,1,2 --out runs/grow

Expected of `--arms grown=0.5,held=0.5`: Korean at 1.18 and 1.21 bits per byte, and the
other domains within 1 % of what they were; five minutes on one H200.

`experiments.branch` trains its dense model of equal active FLOPs apart on groups of
domains, and joins what becomes of it:

  python -m experiments.branch --config grow --seeds 0,1 --out runs/branch \
      --groups de,en,es,fr:ja,ko,ru,zh:python-code,python-docs:\
kernel-docs,man-pages,dictionary

Expected over all held-out text: the parent 1.416, trained on for as long as a branch
1.354, joined 1.287, with the gate alone trained 1.505; seven minutes on one H200.
"""
# SPDX-License-Identifier: Apache-2.0

from experiments.config import Data, Optim, Run
from experiments.vocabulary import VOCAB_SIZE
from jmoe.config import Attention, BlockConfig, ModelConfig, simple


def run() -> Run:
  """The run."""
  d_model = 384
  sparse = simple(d_model, d_ff=256, num_experts=16, k=2)
  block = BlockConfig(Attention(num_heads=6), sparse)
  return Run(
    name="grow",
    model=ModelConfig(
      VOCAB_SIZE, d_model, segments=(((block,), 6),), remat=False, dtype="bfloat16"
    ),
    data=Data(
      corpus="handbook", max_bytes=30_000_000, seq=512, batch=64, eval_context=128
    ),
    optim=Optim(learning_rate=1e-3, warmup_steps=100),
    loss_weights=(("load_balance", 0.01), ("router_z", 0.001)),
    steps=1200,
    save_every=400,
    prompt="The ",
  )
