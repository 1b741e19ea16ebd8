"""Held-out bits per byte where each document may use a few experts of its own.

  python -m experiments.pools runs/emo/*/seed-* --sizes 4,8,16

In every layer a document may use the N experts that its own tokens like most on average
(`restrict.document_pool(evaluation=N)`; EMO's authors evaluate so while they train,
with 32).  A token's experts then depend on later tokens: these are no likelihoods, and
are printed beside those of the model without pools.

What was measured is a line of DIR/pools.jsonl, and not measured again.

Exit codes: 0 done, 2 bad input, 130 stopped by Ctrl-C, 143 by SIGTERM.
"""
# SPDX-License-Identifier: Apache-2.0

import argparse
import dataclasses
import os
import sys
from pathlib import Path
from typing import Any

from experiments import staged
from experiments.parser import Parser, run

FILE = "pools.jsonl"


def main(argv: list[str] | None = None) -> int:
  """Runs a command line; returns its exit code."""
  parser = Parser(
    prog="python -m experiments.pools",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  add = parser.add_argument
  add("workdirs", nargs="+", metavar="DIR", help="of runs; local")
  add(
    "--sizes", required=True, type=_sizes, metavar="N,N,...", help="experts of a pool"
  )
  add("--cache", type=Path, metavar="DIR", default=Path.home() / ".cache" / "jmoe")
  arguments = parser.parse_args(argv)
  return staged.ended(lambda: _run(arguments))


def with_pools(model: Any, size: int) -> Any:
  """A `surgery.Model` whose documents have pools of so many experts in evaluation.

  Layers without `restrict.document_pool` get one, with scores taken anew within it, as
  EMO's; in training it is of all experts.

  Raises:
    ValueError: fewer experts than a token takes, or more than there are.
  """
  from jmoe import restrict, surgery
  from jmoe.use import use

  def change(_: int, layer: Any) -> Any:
    ff = layer.config
    own = [rule for rule in ff.restrict if rule.function is restrict.document_pool]
    if own:
      rules = tuple(
        rule.replace(evaluation=size) if rule in own else rule for rule in ff.restrict
      )
      return layer._replace(config=dataclasses.replace(ff, restrict=rules))
    pool = use(restrict.document_pool, least=ff.num_experts, evaluation=size)
    ff = dataclasses.replace(ff, restrict=(*ff.restrict, pool), rescore=True)
    return layer._replace(config=ff)

  return surgery.on_layers(model, change)


def _sizes(text: str) -> tuple[int, ...]:
  return tuple(staged.count(part) for part in text.split(","))


def _run(arguments: argparse.Namespace) -> None:
  import jax

  from experiments import workdir
  from experiments.operations._source import Source
  from experiments.signals import Stop
  from jmoe import surgery

  if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    jax.config.update("jax_compilation_cache_dir", str(arguments.cache / "compiled"))
  sizes = (None, *arguments.sizes)
  heads = "".join(f"{n or 'no pools':>10}" for n in sizes)
  print(f"{'bits per byte':<40}{heads}")
  with Stop() as stop:
    for name in arguments.workdirs:
      folder = workdir.opened(name, "DIR")
      if not workdir.is_local(folder):
        raise ValueError(f"{folder} is not local; bring it here first.")
      source = Source(folder, arguments.cache)
      if not surgery.layer_configs(source.model.config):
        raise ValueError(f"{folder} has no sparse layer; give a run with one.")
      bits = [_measured(source, size, stop) for size in sizes]
      print(f"{name[-39:]:<40}" + "".join(f"{x:>10.4f}" for x in bits), flush=True)


def _measured(source: Any, size: int | None, stop: Any) -> float:
  """Bits of all held-out text."""
  from experiments import metrics

  path = source.folder / FILE
  records = [r for r in metrics.kept(path, source.step) if r["step"] == source.step]
  for record in records:
    if record["pool"] == size:
      return record["bits"]["all"]
  print(f"{source.folder}: pools of {size or 'all'}", file=sys.stderr)
  bits = evaluated(source, size, stop)
  about = {"step": source.step, "pool": size, "bits": dict(bits)}
  metrics.Lines(path, [*records, about]).close()
  return bits["all"]


def evaluated(source: Any, size: int | None, stop: Any) -> Any:
  """Bits by domain with pools of a size; None: without."""
  import jax

  from experiments import evaluate, opening
  from experiments.program import program

  model, domains = source.model, source.texts.domains
  if size is not None:
    model = with_pools(model, size)
  made = program(
    dataclasses.replace(source.run, model=model.config),
    byte_lengths=source.words.byte_lengths,
    num_domains=len(domains),
  )
  step = jax.jit(made.eval_step)
  arrays = jax.device_put((dict(model.params), dict(model.state)))
  batches = opening.held_out_batches(source.run, source.encoded)
  return evaluate.evaluation(
    lambda batch: step(*arrays, batch),
    stop.between(batches, source.step),
    evaluate.domain_sizes(source.texts.held_out, domains),
    domains,
  ).bits


if __name__ == "__main__":
  run(main)
