"""Several runs made one model.

  python -m experiments.surgery merge --workdir runs/a --with runs/b --how concatenate \
      --out runs/both

`average`: the mean of each array.  `concatenate`: the experts and gate columns of all,
side by side (arXiv 2109.10465).  `mix`: dense models become experts under a new gate,
which is then trained with the rest (Branch-Train-MiX, arXiv 2403.07816).  `flex`: what
was trained beside one public model after `flex`, joined without training (FlexOlmo,
arXiv 2507.07024).
"""
# SPDX-License-Identifier: Apache-2.0

import argparse
from typing import Any

from experiments.operations._several import LOSS_WEIGHTS, count, others


def arguments(add: Any) -> None:
  """Its own arguments."""
  add("--with", required=True, action="append", dest="others", metavar="DIR",
      help="of another run; may be given more than once")  # fmt: skip
  add("--how", required=True, choices=("average", "concatenate", "mix", "flex"))
  add("--k", type=count, help="experts of a token; as before, or 2, if not given")
  add("--rest", choices=("average", "first"),
      help="of concatenate: what is not of experts; average if not given")  # fmt: skip


def operate(source: Any, arguments: argparse.Namespace) -> Any:
  """The merged model."""
  from experiments.operations._source import Outcome
  from jmoe.surgery import flex, layers, merge

  how, k = arguments.how, arguments.k
  for name, unread in (("k", how == "average"), ("rest", how != "concatenate")):
    if unread and (value := getattr(arguments, name)) is not None:
      raise ValueError(f"--{name} {value}: --how {how} does not read it; leave it out.")
  models = [source.model, *(each.model for each in others(source, arguments))]
  if how == "average":
    made = merge.average(models)
  elif how == "concatenate":
    made = merge.concatenate(models, rest=arguments.rest or "average", k=k)
  elif how == "mix":
    made = merge.mix(models, k=k or 2, seed=arguments.seed)
  else:
    made = flex.join(models, k=k or 2)
  runs = [arguments.workdir, *arguments.others]
  if how == "concatenate":
    kept = [dict(zip(runs, map(list, each), strict=True))
            for each in merge.offsets(models)]  # fmt: skip
  else:
    kept = [runs if how != "flex" else ["public", *runs] for _ in layers(made)]
  settings = () if source.run.loss_weights or how != "mix" else (LOSS_WEIGHTS,)
  same = [range(layer.config.num_experts) for layer in layers(made)]
  return Outcome(
    made,
    kept,
    settings=settings,
    moments="it is made of several runs",
    origins=same if how == "average" else None,
  )
