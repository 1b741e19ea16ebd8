"""A model's step over several devices learns, and its checkpoint fits fewer of them."""
# SPDX-License-Identifier: Apache-2.0

import dataclasses
import json
import math

import jax
import pytest

from experiments.benchmarks.mesh_train import __main__ as mesh_train, model
from experiments.benchmarks.olmoe_step.size import TINY, Size
from tests._cases import quickly

pytest.importorskip("orbax.checkpoint")


def test_counts_are_those_of_the_published_models():
  found = model.counts(model.MODELS["olmoe-1b-7b"][0], 4, 4096)
  size = Size()
  assert (found.params, found.active) == (size.params, size.active)
  assert found.flops == size.flops
  found = model.counts(model.MODELS["qwen3-30b-a3b"][0], 1, 1)
  assert round(found.params / 1e9, 1) == 30.5  # of which 3.3 active, with the embedding
  assert round(found.active / 1e9, 2) == 3.04


def test_a_dry_run_learns_and_is_restored_on_fewer_devices(tmp_path, capsys):
  out = tmp_path / "found.json"
  words = "--dry --gpus 4 --rounds 1 --layers 1 --checkpoint-layers 1 --rows 1"
  words = [*words.split(), "--folder", str(tmp_path), "--out", str(out)]
  # As users have it; attention needs it.
  with jax.numpy_dtype_promotion("standard"), quickly():
    code = mesh_train.main(words)
  assert code == 0, capsys.readouterr()
  found = json.loads(out.read_text())
  assert found["mesh"] == {"expert": 4} and str(tmp_path) not in found["command"]
  losses = found["step"]["losses"]
  assert losses[-1] < losses[0] == pytest.approx(math.log(500), abs=0.5)
  state = found["step"]["gb"]["state"]
  assert found["step"]["planned"]["gb"] > state > 0
  # Two bytes of a parameter, a float32 copy, two moments; of experts a quarter.
  size = dataclasses.replace(TINY, layers=1)
  bytes_each, experts = 2 + 3 * 4, size.experts * size.expert_params
  assert state == pytest.approx(
    (size.params - 0.75 * experts) * bytes_each / 1e9, rel=0.03
  )
  half, quarter = found["checkpoint"]["restored"]
  assert half["to"] == {"fsdp": 2} and quarter["to"] == {"expert": 1}
  assert half["same_bits"] and quarter["same_bits"]


@pytest.mark.parametrize(
  "words, said",
  [
    ("--mesh fsdp=2,expert=2", "4 devices, but there are 2"),
    ("--mesh pipe=2", "unknown axis 'pipe'"),
    ("--strategy sort", "--strategy sort: use one of"),
    ("--gpus 64", "--gpus 64"),
  ],
)
def test_bad_arguments_are_refused_in_one_line(words, said, capsys):
  with pytest.raises(SystemExit) as ended:
    mesh_train.main(["--dry", *words.split()])
  assert ended.value.code == 2
  assert said in capsys.readouterr().err
