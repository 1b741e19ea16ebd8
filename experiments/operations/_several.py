"""Other runs beside the one that an operation was given."""
# SPDX-License-Identifier: Apache-2.0

import argparse
from typing import Any

from experiments.errors import BadData

# Of a model that was dense: its run weighs no losses of sparse layers.
LOSS_WEIGHTS = 'loss_weights=(("load_balance", 0.01), ("router_z", 0.001))'


def others(source: Any, arguments: argparse.Namespace) -> list[Any]:
  """The runs of `--with`, their newest whole checkpoints.

  Raises:
    BadData: one has another vocabulary.
  """
  from experiments import workdir
  from experiments.operations._source import Source

  found = []
  for name in arguments.others:
    folder = workdir.opened(name, "--with")
    other = Source(folder, arguments.cache, argument="--with")
    if other.words.digest != source.words.digest:
      raise BadData(
        f"--with {name} has another vocabulary than {arguments.workdir}; give runs "
        "that were trained with one."
      )
    found.append(other)
  return found


def check_sparse(source: Any) -> None:
  """Raises BadData if a run's model has no sparse layer."""
  from jmoe.surgery import layer_configs

  if not layer_configs(source.model.config):
    raise BadData(
      f"--workdir {source.folder}: its model has no sparse layer; `upcycle` or "
      "`cluster` makes one that has some."
    )


def calibration_rows(
  source: Any, arguments: argparse.Namespace, domain: str, count: int | None = None
) -> Any:
  """Training documents of a domain, packed as the run packs; --documents if no count.

  Raises:
    BadData: no such domain, or one that has not as many.
  """
  from experiments import calibration

  of = source.run.data
  return calibration.samples(
    source.encoded,
    calibration.number(source.texts.domains, domain),
    arguments.documents if count is None else count,
    seed=arguments.seed,
    batch=of.batch,
    seq=of.seq,
  )


def count(text: str) -> int:
  """A whole number of at least 1, for `type=`."""
  if not text.isdecimal() or int(text) < 1:
    raise argparse.ArgumentTypeError(f"{text!r} is not a whole number >= 1")
  return int(text)


def numbers(text: str) -> list[int]:
  """Whole numbers separated by commas, for `type=`."""
  if not all(part.isdecimal() for part in text.split(",")):
    raise argparse.ArgumentTypeError(f"{text!r} are not whole numbers, as in 1,3")
  return [int(part) for part in text.split(",")]
