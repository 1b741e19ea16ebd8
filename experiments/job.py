"""From checked runs and their folders to trained models and a table of how they did."""
# SPDX-License-Identifier: Apache-2.0

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path

import jax

from experiments import (
  corpus,
  data,
  dataset,
  evaluate,
  optim,
  sample,
  state as states,
  step,
)
from experiments.checkpoint import Checkpoints, digests
from experiments.config import Run
from experiments.loop import Report, train
from experiments.workdir import claim, write_json
from jmoe.analysis import cost
from jmoe.use import to_jsonable


@dataclasses.dataclass(frozen=True)
class Trained:
  """A finished run."""

  run: Run
  state: states.TrainState
  bits: evaluate.Bits


def execute(runs: Sequence[tuple[Run, Path]], cache: Path) -> None:
  """Trains each run in its folder, or goes on with it, and prints how well it did.

  Raises:
    BadData, BadCheckpoint, Diverged: see there.
  """
  texts = dataset.load(cache, runs[0][0].data.max_bytes)
  finished = [_finished(run, folder, texts) for run, folder in runs]
  held_out = list(texts.held_out)
  columns = {trained.run.name: trained.bits for trained in finished}
  columns["gzip -9"] = evaluate.gzip_bits(held_out, alone=False)
  columns["gzip -9, each alone"] = evaluate.gzip_bits(held_out, alone=True)
  sizes = evaluate.domain_sizes(held_out)
  print(f"\nbits per byte on {len(held_out)} held-out documents")
  print(f"{'':<12}{'bytes':>8}" + "".join(f"{name:>22}" for name in columns))
  for domain, size in sizes.items():
    bits = "".join(f"{column[domain]:>22.3f}" for column in columns.values())
    print(f"{domain:<12}{size:>8}{bits}")
  print("gzip -9 has one file for each domain, or one for each document alone.")
  trained = finished[0]
  if trained.run.sample_bytes:
    print(f"\nsample of {trained.run.name}:\n{_sample(trained)}")


def _finished(run: Run, folder: Path, texts: dataset.Texts) -> Trained:
  """Trains what is missing, evaluates, and writes result.json."""
  claim(run, folder)
  shape = {"batch": run.data.batch, "seq": run.data.seq}
  batches = data.batches(
    data.Windows(texts.train, seq=run.data.seq),
    seed=run.data.seed,
    num_workers=run.data.num_workers,
    **shape,
  )
  blueprint, names = states.blueprint(run.model)
  optimizer = optim.optimizer(run.optim, steps=run.steps, names=names)
  key = jax.random.key_data(jax.random.key(run.seed))
  init = functools.partial(
    states.init_state, key, config=run.model, optimizer=optimizer
  )
  facts = {"config": to_jsonable(run), "text": texts.digest}
  checkpoints = Checkpoints(folder / "checkpoints", facts)
  if checkpoints.latest is None:
    state = init()
  else:
    state = checkpoints.restore(jax.eval_shape(init), batches)
  print(_headline(run))
  report = Report(
    folder / "metrics.jsonl",
    name=run.name,
    step=int(state.step),
    steps=run.steps,
    tokens=run.data.batch * run.data.seq,
  )
  train_step = jax.jit(
    functools.partial(
      step.train_step,
      blueprint=blueprint,
      optimizer=optimizer,
      loss_weights=run.loss_weights,
    ),
    donate_argnums=0,
  )
  try:
    state = train(
      state,
      batches,
      train_step=train_step,
      steps=run.steps,
      save_every=run.save_every,
      save=lambda state: checkpoints.save(state, batches),
      report=report,
    )
  finally:
    report.close()
    checkpoints.close()
  eval_step = jax.jit(
    functools.partial(
      step.eval_step, blueprint=blueprint, num_domains=len(corpus.DOMAINS)
    )
  )
  context = run.data.eval_context
  windows = data.Windows(texts.held_out, seq=run.data.seq, context=context)
  bits = evaluate.model_bits(
    lambda batch: eval_step(state.params, state.balance, batch),
    data.one_pass(windows, **shape),
    evaluate.domain_sizes(texts.held_out),
  )
  result = {"bits_per_byte": bits, "digests": digests(state.params)}
  write_json(folder / "result.json", result)
  return Trained(run, state, bits)


def _headline(run: Run) -> str:
  counted = cost.parameters(run.model)
  flops = 3 * cost.flops_per_token(run.model, seq=run.data.seq)
  return (
    f"{run.name}: {counted.total / 1e6:.2f}M parameters, {counted.active / 1e6:.2f}M "
    f"active, {flops / 1e6:.1f} MFLOP a trained token, on {jax.default_backend()}"
  )


def _sample(trained: Trained) -> str:
  blueprint, _ = states.blueprint(trained.run.model)
  return sample.sample(
    trained.state.params,
    trained.state.balance,
    jax.random.key(trained.run.seed),
    blueprint=blueprint,
    prompt=trained.run.prompt,
    num_bytes=trained.run.sample_bytes,
  )
