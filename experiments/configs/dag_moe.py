"""DAG-MoE at ten minutes: the plain model, and arms that change how choices are summed.

11 million parameters, 4 million of them met by a token: six layers of sixteen experts
half as wide as a token, of which it takes four; nothing is dropped, so that every arm
sees all of its nodes; on the `handbook` corpus.  Expected of the paper (Feng et al.
2026, arXiv 2606.01062): dag=2 over dag=1 over shared=2 over sparse, by 0.01 to 0.03
nats a token between shared=2 and dag=2; it does not say how shared=2-flops does.

  python -m experiments.series --config dag_moe --seeds 0,1,2 --against shared=2 \
      --arms sparse,shared=2,shared=2-flops,dag=1,dag=2,dag=2-sigmoid,dag=2-ungated \
      --out runs/dag
  python -m experiments.series --config dag_moe --seeds 0,1,2 --against sparse \
      --arms sparse,finer=2,finer=4 --out runs/finer

Fine-tuned on a domain that none of them has seen, political essays; the paper compares
models with and without messages on tasks after fine-tuning both, which at this size are
guesses, so here it is bits per byte of the domain's held-out documents:

  python -m experiments.corpora 'handbook?essays=yes' --domains essays \
      --out runs/essays.jsonl.xz
  python -m experiments.series --config dag_moe --seeds 0,1,2 --against shared=2 \
      --arms sparse,shared=2,dag=1,dag=2 --start-from runs/dag --out runs/dag-tuned \
      --set data.corpus=packed:runs/essays.jsonl.xz --set steps=150 \
      --set optim.learning_rate=2e-4 --set optim.warmup_steps=20 --name dag-tuned

Where a step's time goes, and two-step problems (`experiments.composition`):

  python -m experiments.benchmarks.step --config dag_moe --seeds 3 --parts \
      --arms sparse,finer=2,finer=4,dag=1,dag=2
  python -m experiments.composition --out runs/composition
"""
# SPDX-License-Identifier: Apache-2.0

from experiments.config import Data, Optim, Run
from experiments.vocabulary import VOCAB_SIZE
from jmoe.config import Attention, BlockConfig, ModelConfig, simple
from jmoe.presets.dag_moe import LOSS_WEIGHTS


def run() -> Run:
  """The run."""
  d_model = 256
  sparse = simple(d_model, d_ff=128, num_experts=16, k=4)
  block = BlockConfig(Attention(num_heads=4), sparse)
  return Run(
    name="dag_moe",
    model=ModelConfig(
      VOCAB_SIZE, d_model, segments=(((block,), 6),), remat=False, dtype="bfloat16"
    ),
    data=Data(
      corpus="handbook", max_bytes=30_000_000, seq=512, batch=64, eval_context=256
    ),
    optim=Optim(learning_rate=1e-3, warmup_steps=100),
    loss_weights=tuple(LOSS_WEIGHTS.items()),
    steps=2000,
    save_every=500,
    prompt="The ",
  )
