"""A smaller model of the experts that documents of one domain ask for.

  python -m experiments.surgery extract --workdir runs/emo --domain kernel-docs \
      --keep 8 --out runs/emo-kernel

Training documents of the domain run through the model.  In each layer the --keep
experts with the highest score stay, and shared ones; router columns go with those that
leave.  --keep 32,32,8,8 says it layer by layer.  EMO (arXiv 2605.06663) scores by mean
routing probability, layer after layer with those before already cut; Easy-EP (arXiv
2504.06792) by what experts give, in one pass; `random` is the floor.
"""
# SPDX-License-Identifier: Apache-2.0

import argparse
import functools
from typing import Any


def arguments(add: Any) -> None:
  """Its own arguments."""
  add("--domain", required=True, metavar="NAME", help="of the run's corpus")
  add(
    "--keep", required=True, type=_keep, metavar="N", help="or N,N,... layer by layer"
  )
  add("--documents", type=_count, default=50, metavar="N", help="50 if not given")
  add(
    "--score",
    choices=("mean_probability", "easy_ep", "random"),
    default="mean_probability",
  )
  add(
    "--order",
    choices=("layerwise", "one-pass"),
    help="of choosing; layerwise, but one-pass for easy_ep, if not given",
  )


def operate(source: Any, arguments: argparse.Namespace) -> Any:
  """The smaller model."""
  from experiments import calibration
  from experiments.operations._source import Outcome
  from jmoe import surgery
  from jmoe.use import to_jsonable

  of, keep = source.run.data, arguments.keep
  domain = calibration.number(source.texts.domains, arguments.domain)
  if arguments.score == "random":
    found = surgery.at_random(source.model, keep=keep, seed=arguments.seed)
  else:
    samples = calibration.samples(
      source.encoded,
      domain,
      arguments.documents,
      seed=arguments.seed,
      batch=of.batch,
      seq=of.seq,
    )
    default = "one-pass" if arguments.score == "easy_ep" else "layerwise"
    one_pass = (arguments.order or default) == "one-pass"
    way = surgery.in_one_pass if one_pass else surgery.layerwise
    score = getattr(surgery, arguments.score)
    found = way(source.model, samples, keep=keep, score=score)
  scores = [score_E.tolist() for score_E in found.scores]
  whole = to_jsonable(source.model.config)
  return Outcome(
    found.model,
    found.kept,
    {"scores": scores, "whole": whole},
    moments=functools.partial(surgery.cut_model, kept=found.kept),
    origins=found.kept,
  )


def _keep(text: str) -> int | tuple[int, ...]:
  try:
    each = tuple(_count(part) for part in text.split(","))
  except argparse.ArgumentTypeError:
    raise argparse.ArgumentTypeError(
      f"{text!r} is not a number of experts, or one for each sparse layer as in 8,8,4"
    ) from None
  return each[0] if len(each) == 1 else each


def _count(text: str) -> int:
  if not text.isdecimal() or int(text) < 1:
    raise argparse.ArgumentTypeError(f"{text!r} is not a whole number >= 1")
  return int(text)
