"""New experts beside those of a trained model, to learn text that it has not seen.

  python -m experiments.surgery grow --workdir runs/twelve --new 2 --domain thirteenth \
      --margin 4 --out runs/grown

The new run trains its new experts and its gates alone (`optim.freeze`, which --set may
change).  --domain: gate columns are the layer's mean input on training text of this
domain, instead of being drawn; with --margin, what tells it from the other domains of
the corpus: the logit of new experts is at most -M on theirs, and up to M on its own.
Another domain with fewer than --documents gives all of its own, as the receipt says.
--bias lowers the new experts' logits.  The lower they are on old text, the less moves
of what the model said before.  --set data... says what to train on.
"""
# SPDX-License-Identifier: Apache-2.0

import argparse
import functools
from typing import Any

from experiments.operations._several import calibration_rows, check_sparse, count


def arguments(add: Any) -> None:
  """Its own arguments."""
  add("--new", required=True, type=count, metavar="N", help="experts a layer")
  add("--domain", metavar="NAME", help="of the run's corpus")
  add("--documents", type=count, default=16, metavar="N",
      help="of each domain whose text is read; 16 if not given")  # fmt: skip
  add("--margin", type=float, metavar="M", help="of logits, between old and new text")
  add("--silent", action="store_true", help="with outputs of zero, instead of copies")
  add("--bias", type=float, help="of the new experts' logits; none if not given")
  add("--noise", type=float, default=0.0, help="share of the weights' deviation")


def operate(source: Any, arguments: argparse.Namespace) -> Any:
  """The larger model."""
  from experiments.operations._source import Outcome
  from jmoe.surgery import grow, layers

  check_sparse(source)
  columns = directions = None
  notes: dict[str, Any] = {"freeze": grow.freeze(source.model)}
  if arguments.margin is not None and arguments.domain is None:
    raise ValueError("--margin needs --domain, whose text is told from the others'.")
  if arguments.domain is not None:
    rows = calibration_rows(source, arguments, arguments.domain)
    if arguments.margin is None:
      columns = grow.inputs(source.model, rows)
    else:
      counts = _others(source, arguments)
      others = [
        calibration_rows(source, arguments, name, count)
        for name, count in counts.items()
      ]
      notes["documents"] = {arguments.domain: arguments.documents, **counts}
      directions = grow.apart(source.model, rows, others, margin=arguments.margin)
  made = grow.grow(
    source.model,
    arguments.new,
    copied=not arguments.silent,
    columns=columns,
    bias=arguments.bias,
    directions=directions,
    noise=arguments.noise,
    seed=arguments.seed,
  )
  kept = [list(range(layer.config.num_experts)) for layer in layers(source.model)]
  biased = arguments.bias is not None or directions is not None
  return Outcome(
    made,
    kept,
    notes,
    settings=(f"optim.freeze={notes['freeze']!r}",),
    moments=functools.partial(grow.silent, number=arguments.new, bias=biased),
  )


def _others(source: Any, arguments: argparse.Namespace) -> dict[str, int]:
  """Documents of each other domain that has some: --documents, or all there are."""
  from experiments import calibration

  found = {
    name: min(arguments.documents, calibration.available(source.encoded, n))
    for n, name in enumerate(source.texts.domains)
    if name != arguments.domain
  }
  return {name: count for name, count in found.items() if count}
