"""Tables of where a step's time goes."""
# SPDX-License-Identifier: Apache-2.0

from experiments.benchmarks import tracing


def test_layers_that_repeat_an_operation_make_one_row():
  rows = [
    [1.0, 1, "mpmd_map.7", "experts/ffn_hidden"],
    [2.0, 1, "mpmd_map.12", "experts/ffn_hidden"],
    [2.5, 4, "mpmd_map.9", "experts/ffn_back"],
    [0.5, 1, "sort", "route"],
  ]
  assert tracing.merged(rows) == [
    [3.0, 2, "mpmd_map", "experts/ffn_hidden"],
    [2.5, 4, "mpmd_map", "experts/ffn_back"],
    [0.5, 1, "sort", "route"],
  ]
