"""A process that times a PyTorch layer on request: one JSON object a line, both ways.

Requests are {"do": "missing"}, {"do": "build"}, {"do": "time", "kind": KIND, "budget":
SECONDS} and {"do": "tune"}; each has one answer, with "why" where it failed.  The
process ends with its standard input.
"""
# SPDX-License-Identifier: Apache-2.0

import argparse
import importlib
import json
import os
import sys
from typing import Any

from experiments.benchmarks.shapes import SHAPES


def main(argv: list[str] | None = None) -> int:
  parser = argparse.ArgumentParser()
  parser.add_argument("--module", required=True)
  parser.add_argument("--row", required=True)
  parser.add_argument("--shape", required=True, choices=sorted(SHAPES))
  arguments = parser.parse_args(argv)
  # What libraries print must not be taken for an answer.
  answers = os.fdopen(os.dup(1), "w")
  os.dup2(2, 1)
  made: list[Any] = []
  for line in sys.stdin:
    try:
      answer = _answered(json.loads(line), arguments, made)
    except BaseException as error:  # of somebody else's code: any
      answer = {"why": " ".join(f"{type(error).__name__}: {error}".split())[:200]}
    answers.write(json.dumps(answer) + "\n")
    answers.flush()
  return 0


def _answered(
  asked: dict[str, Any], arguments: argparse.Namespace, made: list[Any]
) -> dict[str, Any]:
  module = importlib.import_module(arguments.module)
  if asked["do"] == "missing":
    return {"why": module.missing(arguments.row)}
  if asked["do"] == "tune":
    return {"tiles": module.tuned(arguments.shape)}
  from experiments.benchmarks.peers import torch_rows

  if asked["do"] == "build":
    if why := module.missing(arguments.row):
      return {"why": why}
    layer, shape = module.LAYERS[arguments.row], SHAPES[arguments.shape]
    made[:] = [torch_rows.row(arguments.row, layer, shape)]
    return {"figures": made[0].figures}
  return {"ms": made[0].timed(asked["kind"], asked["budget"])}


if __name__ == "__main__":
  sys.exit(main())
