"""A dense model of a sparse one: the mean of its experts, or all side by side.

python -m experiments.surgery to_dense --workdir runs/small --out runs/dense
"""
# SPDX-License-Identifier: Apache-2.0

import argparse
from typing import Any

from experiments.operations._several import check_sparse


def arguments(add: Any) -> None:
  """Its own arguments."""
  add("--how", choices=("average", "concatenate"), default="average")


def operate(source: Any, arguments: argparse.Namespace) -> Any:
  """The dense model."""
  from experiments.operations._source import Outcome
  from jmoe.surgery import to_dense

  check_sparse(source)
  made = to_dense(source.model, how=arguments.how)
  return Outcome(made, [], moments="experts have become one dense layer")
