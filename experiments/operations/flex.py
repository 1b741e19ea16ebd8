"""An expert of one's own beside a frozen public model, or one taken out again.

  python -m experiments.surgery flex --workdir runs/public --domain mine \
      --public-domain manuals --out runs/mine
  python -m experiments.main --workdir runs/mine
  python -m experiments.surgery merge --how flex --workdir runs/mine --with runs/yours \
      --out runs/joined
  python -m experiments.surgery flex --workdir runs/joined --without 2 --out runs/less

FlexOlmo (arXiv 2507.07024): the new run trains its expert and its gate column alone
(`optim.freeze`); taking an expert out gives the model that never had it, to the bit.
"""
# SPDX-License-Identifier: Apache-2.0

import argparse
from typing import Any

from experiments.operations._several import (
  LOSS_WEIGHTS,
  calibration_rows,
  check_sparse,
  count,
)


def arguments(add: Any) -> None:
  """Its own arguments."""
  add("--domain", metavar="NAME", help="that the new expert is for")
  add("--public-domain", action="append", metavar="NAME",
      help="of the public model; may be given more than once")  # fmt: skip
  add("--documents", type=count, default=16, metavar="N", help="of each domain")
  add("--without", type=count, metavar="N", help="the expert to take out, from 1 on")


def operate(source: Any, arguments: argparse.Namespace) -> Any:
  """The model with one more expert, or one less."""
  from experiments.operations._source import Outcome
  from jmoe.surgery import flex, layers

  domain, left = arguments.domain, arguments.without
  begins = domain, arguments.public_domain
  if not (all(begins) if left is None else not any(begins)):
    raise ValueError(
      "flex: give --domain and --public-domain to begin, or --without to take out."
    )
  if left is not None:
    check_sparse(source)
    made = flex.without(source.model, left)
    kept = [[e for e in range(layer.config.num_experts) if e != left]
            for layer in layers(source.model)]  # fmt: skip
    return Outcome(
      made, kept, moments=lambda model: flex.without(model, left), origins=kept
    )
  ours = calibration_rows(source, arguments, domain)
  public = [
    rows
    for name in arguments.public_domain
    for rows in calibration_rows(source, arguments, name)
  ]
  made = flex.begin(source.model, public, ours)
  kept = [["public", domain] for _ in layers(made)]
  settings = (f"optim.freeze={flex.FREEZE!r}", LOSS_WEIGHTS)
  return Outcome(
    made,
    kept,
    {"freeze": flex.FREEZE},
    settings=settings,
    moments="the public model is frozen, and its experts are new",
  )
