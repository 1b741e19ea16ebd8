"""Models extracted from one model, as one again.

  python -m experiments.surgery compose --workdir runs/emo-kernel \
      --other runs/emo-python --out runs/emo-both

Experts that are in several parts must be equal, and so must all that the parts share:
compose them before they are trained further.  Parts that hold all experts together give
the model that they were extracted from, bit by bit.
"""
# SPDX-License-Identifier: Apache-2.0

import argparse
import json
from typing import Any


def arguments(add: Any) -> None:
  """Its own arguments."""
  add("--other", required=True, action="append", metavar="DIR", help="may be repeated")


def operate(source: Any, arguments: argparse.Namespace) -> Any:
  """The model with the experts of all."""
  from experiments import workdir
  from experiments.errors import BadData
  from experiments.operations._source import Outcome, Source
  from jmoe import surgery
  from jmoe.use import from_jsonable

  others = [
    Source(workdir.opened(name, "--other"), arguments.cache, argument="--other")
    for name in arguments.other
  ]
  receipts = [_receipt(each.folder) for each in (source, *others)]
  whole = receipts[0]["notes"]["whole"]
  for each, receipt in zip(others, receipts[1:], strict=True):
    if receipt["notes"]["whole"] != whole:
      raise BadData(
        f"--other {each.folder} was extracted from another model than "
        f"{source.folder}; give parts of one."
      )
  parts = [
    (each.model, receipt["kept"])
    for each, receipt in zip((source, *others), receipts, strict=True)
  ]
  found = surgery.compose(from_jsonable(whole, allow=("experiments",)), parts)
  return Outcome(
    found.model, found.kept, {"whole": whole}, moments="it is made of several runs"
  )


def _receipt(folder: Any) -> dict[str, Any]:
  from experiments.errors import BadData

  path = folder / "receipt.json"
  found = json.loads(path.read_text()) if path.exists() else {}
  if "whole" not in found.get("notes", {}):
    raise BadData(
      f"{path} is no receipt of an extraction; give folders that `extract` made."
    )
  return found
