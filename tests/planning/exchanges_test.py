"""Bytes and times of exchanges against sums by hand and measured rates."""
# SPDX-License-Identifier: Apache-2.0

import pytest

from experiments.benchmarks.shapes import SHAPES
from experiments.planning import dense, exchanges, models, rates, topology
from experiments.planning.mesh import Mesh
from jmoe.presets import mixtral

TWO = topology.parse("gpu:2xH200")


def layer(tokens=64, devices=4, again=False, skew=0.0, factor=1.25):
  config = mixtral.layer(d_model=16, d_ff=32, num_experts=8, k=2)
  return exchanges.Layer(
    config, 3, tokens, 2, 4, again, devices, devices, 1, factor, skew
  )


def outcome(strategy, of):
  found = exchanges.STRATEGIES[strategy](of)
  assert not isinstance(found, str), found
  return found


def sent(strategy, **keywords):
  return sum(e.size for e in outcome(strategy, layer(**keywords)).exchanges)


@pytest.mark.parametrize(
  ("strategy", "size"),
  [
    # 3 layers; rows are 16 x 2 bytes, 64 x 2 of them, three quarters leave.
    ("all_to_all", 3 * 4 * 1.25 * 64 * 2 * 32 * 3 / 4),
    ("ragged_all_to_all", 3 * 4 * 64 * 2 * 32 * 3 / 4),
    # Each of 4 gathers or scatters takes 64 tokens of three others.
    ("all_gather", 3 * 4 * 64 * 3 * 32),
    # 8 experts of three 16 x 32 matrices come in 2 bytes, gradients go in 4.
    ("gather experts", 3 * 8 * 3 * 16 * 32 * (2 + 4) * 3 / 4),
  ],
)
def test_bytes_are_those_by_hand(strategy, size):
  assert sent(strategy) == pytest.approx(size)


def test_a_block_made_again_sends_rows_out_once_more():
  assert sent("all_to_all", again=True) == 1.25 * sent("all_to_all")


def test_a_token_is_sent_less_often_than_its_choices():
  assert sent("deduplicated") < sent("ragged_all_to_all")


def test_one_host_has_no_hierarchy():
  assert "one host" in exchanges.hierarchical(layer())


@pytest.mark.parametrize(
  ("name", "all_to_all", "all_gather"),
  [
    ("mixtral", 0.97, 0.96),
    ("qwen3", 0.66, 0.87),
    ("olmoe", 0.71, 0.90),
    ("dsv3", 0.81, 0.94),
  ],
)
def test_two_gpus_get_the_share_that_measured_rates_give(name, all_to_all, all_gather):
  """Of one GPU's rate: 2/3 of a layer's time and four exchanges at measured GB/s."""
  shape = SHAPES[name]
  config = mixtral.layer(
    d_model=shape.d_model, d_ff=shape.d_ff, num_experts=shape.num_experts, k=shape.k
  )
  one = exchanges.Layer(config, 1, shape.tokens, 2, 2, False, 2, 2, 1, 1.0, 0.0)
  extent = topology.extents(TWO, Mesh(expert=2).sizes)["expert"]
  alone = shape.flops(backward=True) / TWO.flops
  alone /= rates.grouped(shape.d_model, shape.d_ff)
  for strategy, share in (("all_to_all", all_to_all), ("all_gather", all_gather)):
    away = sum(
      topology.seconds(TWO, extent, e.collective, e.size)
      for e in outcome(strategy, one).exchanges
    )
    assert alone / (alone + away) == pytest.approx(share, abs=0.025)


def test_blocks_gather_parameters_twice_and_scatter_gradients():
  from experiments.planning import step

  run = models.load("olmoe:1b-7b", rows=8)
  found = dense.of_parameters(run, Mesh(fsdp=8), step.state_of(run).params)
  by = {e.collective: e.size for e in found}
  # 6.9 billion parameters in bfloat16, seven eighths of them elsewhere; the embeddings,
  # 0.2 billion, are gathered once.
  assert by["reduce_scatter"] == pytest.approx(6.92e9 * 2 * 7 / 8, rel=0.002)
  assert by["all_gather"] == pytest.approx(
    (2 * 6.92e9 - 0.206e9) * 2 * 7 / 8, rel=0.002
  )
