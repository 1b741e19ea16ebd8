"""EMO on one big GPU: documents' pools of experts, and what a few of them are worth.

27 million parameters, eight layers of 31 experts of width 128, three a token, and a
shared one, on the `handbook` corpus (thirteen kinds of text in eight languages).
Arms of equal seed and order of data: EMO as it is (`sparse`), no pools (`pool=none`),
pools of eight experts (`pool=8`), balance within each row (`balance=sequence`).  98
million bytes of training; a batch holds hundreds of documents, which balance needs.

After the series the models are cut down to the experts that each domain asks for, and
read that domain's held-out text:

  python -m experiments.series --config emo \
      --arms sparse,pool=none,pool=8,balance=sequence --against pool=none \
      --seeds 0,1 --out runs/emo
  python -m experiments.emo runs/emo/*/seed-*

Expected: what the paper says of larger ones (arXiv 2605.06663): whole models
within 2 %, and at a quarter of the experts EMO loses a third of what the other loses.
Models this small need larger pools for the first, of 16 or more (`pool=16+`); with the
paper's rule (`sparse`) EMO is 3.7 % behind, and loses a fortieth (`docs/findings.md`).
"""
# SPDX-License-Identifier: Apache-2.0

from experiments.config import Data, Optim, Run
from experiments.vocabulary import VOCAB_SIZE
from jmoe.config import Attention, BlockConfig, ModelConfig
from jmoe.presets import emo


def run() -> Run:
  """The run."""
  d_model = 256
  sparse = emo.layer(d_model=d_model, d_ff=128, num_experts=31, k=3, max_documents=64)
  block = BlockConfig(Attention(num_heads=4), sparse)
  return Run(
    name="emo",
    model=ModelConfig(
      VOCAB_SIZE, d_model, segments=(((block,), 8),), remat=False, dtype="bfloat16"
    ),
    data=Data(
      corpus="handbook", max_bytes=30_000_000, seq=512, batch=128, eval_context=256
    ),
    optim=Optim(learning_rate=2e-3, warmup_steps=100),
    loss_weights=tuple(emo.LOSS_WEIGHTS.items()),
    steps=1500,
    save_every=500,
    prompt="The ",
  )
