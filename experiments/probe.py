"""The training of `experiments.composition`: the seeds of an arm, as one program."""
# SPDX-License-Identifier: Apache-2.0

import sys
import time
from typing import Any

import jax
import numpy as np

from experiments import problems
from experiments.config import Run
from experiments.program import program
from experiments.seeds import stack
from jmoe.analysis import cost


def trained(
  run: Run, task: problems.Task, *, seeds: int, steps: int, every: int, label: str
) -> list[dict[str, Any]]:
  """What each seed can answer at each evaluation.

  Args:
    run: but for its seed, its data and its steps.
    task: of which each seed has tables of its own.
    seeds: 0 to this, in one program.
    steps: to train.
    every: steps between two evaluations, which are one call.
    label: of the lines of progress on stderr.

  Returns:
    For each seed and evaluation the share of right answers by kind of problem, "step",
    "seed", and what is the same of all: "parameters", "flops", "device", "jax".
  """
  made = program(
    run, byte_lengths=np.ones(run.model.vocab_size, np.int32), num_domains=3
  )

  def some_steps(state, given):
    key = jax.random.fold_in(jax.random.wrap_key_data(state.key), 1 << 30)

    def one(state, _):
      batch = problems.drawn(jax.random.fold_in(key, state.step), given, task)
      state, values, _ = made.train_step(state, batch)
      return state, values["loss"]

    return jax.lax.scan(one, state, length=every)

  def answered(state, given):
    batch = problems.asked(given, task)
    model = made.blueprint.model(state.params, state.balance)
    names = ("inputs", "segment", "position")
    x_BSD, _ = model.hidden(*(batch[name] for name in names))
    return problems.right(model.logits(x_BSD), batch)

  draw = jax.jit(jax.vmap(lambda seed: problems.tables(jax.random.key(seed), task)))
  given = draw(np.arange(seeds))
  state = stack([made.of_seed(n).init() for n in range(seeds)])
  train = jax.jit(jax.vmap(some_steps), donate_argnums=0)
  evaluate = jax.jit(jax.vmap(answered))
  about = {
    "parameters": cost.parameters(run.model).total,
    "flops": cost.flops_per_token(run.model, seq=4),
    "device": jax.devices()[0].device_kind,
    "jax": jax.__version__,
  }
  lines, begin = [], time.perf_counter()
  for step in range(every, steps + 1, every):
    state, loss = train(state, given)
    right = np.asarray(evaluate(state, given))
    shown = " ".join(f"{x:.3f}" for x in right.mean(0))
    print(
      f"{label}: step {step}, loss {float(loss[:, -1].mean()):.3f}, right "
      f"{shown}, {time.perf_counter() - begin:.0f} s",
      file=sys.stderr,
      flush=True,
    )
    for seed in range(seeds):
      each = dict(zip(problems.KINDS, right[seed].tolist(), strict=True))
      lines.append({**about, "seed": seed, "step": step, **each})
  return lines
