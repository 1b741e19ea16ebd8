"""The command: what it prints of published models, and one line for bad input."""
# SPDX-License-Identifier: Apache-2.0

import importlib.util
import re

import pytest

from experiments import plan
from experiments.planning import models
from jmoe.analysis import cost


def lines(capsys, *arguments):
  code = plan.main(list(arguments))
  out, err = capsys.readouterr()
  assert not err
  return code, out


@pytest.mark.parametrize(
  ("name", "total", "active"),
  [
    ("olmoe:1b-7b", 6.92, 1.28),
    ("mixtral:8x7b", 46.70, 12.88),
    ("mixtral:8x22b", 140.63, 39.16),
    ("deepseek_v3:671b-size", 671.03, 37.56),
  ],
)
def test_published_models_have_their_published_sizes(name, total, active):
  found = cost.parameters(models.published()[name])
  assert (round(found.total / 1e9, 2), round(found.active / 1e9, 2)) == (total, active)


@pytest.mark.parametrize(
  ("config", "topology", "mesh"),
  [
    ("mixtral:8x7b", "v5p:4x4x4", "fsdp=8,expert=8"),
    ("deepseek_v3:671b-size", "v5p:8x8x8", "fsdp=8,expert=64"),
    ("olmoe:1b-7b", "v5e:16x16", "fsdp=256"),
    ("olmoe:1b-7b", "gpu:4x8xH200", "fsdp=2,expert=16"),
  ],
)
def test_a_plan_names_memory_collectives_drops_time_and_strategies(
  capsys, config, topology, mesh
):
  code, out = lines(capsys, "--config", config, "--topology", topology, "--mesh", mesh)
  assert code == 0
  for word in ("parameters", "optimizer", "peak", "all_gather", "drops", "step"):
    assert word in out
  assert int(re.findall(r"largest batch that fits: ([\d,]+)", out)[0].replace(",", ""))
  assert ("hierarchical         none: the expert axis lies within" in out) == (
    "expert" in mesh and topology.startswith("v5p")
  )
  assert "the fastest with other expert axes" in out


def test_a_run_of_ones_own_is_planned_too(capsys):
  code, out = lines(
    capsys, "--config", "small", "--topology", "gpu:1xH200", "--mesh", "data=1",
    "--set", "model.remat=True",
  )  # fmt: skip
  assert code == 0 and "model's capacity" in out


@pytest.mark.parametrize(
  ("change", "words"),
  [
    ({"--config": "mixtrl:8x7b"}, "did you mean 'mixtral:8x7b'"),
    ({"--mesh": "data=3"}, "is 3 devices, but there are 256"),
    ({"--topology": "v9:2x2"}, "unknown; use"),
    ({"--mesh": "expert=256"}, "does not divide num_experts=64"),
    ({"--set": "data.batch=100"}, "not divisible by data*fsdp*expert=256"),
    ({"--set": "data.bach=100"}, "unknown key 'bach'"),
    ({"--strategy": "hierarchical"}, "needs expert > 1; leave it out."),
    ({"--strategy": "telepathy"}, "is not known"),
    ({"--skew": "-1"}, "give a number of 0 to 10"),
    ({"--capacity-factor": "nan"}, "--capacity-factor"),
    ({"--topology": "gpu:32x8xH200", "--compile": ""}, "has no TPUs"),
    ({"--mesh": "fsdp=128,context=2", "--compile": ""}, "for context=2"),
    (
      {"--mesh": "fsdp=32,expert=8", "--strategy": "expert+tensor", "--compile": ""},
      "layers have no strategy 'expert+tensor'",
    ),
  ],
)
def test_bad_input_is_one_line(capsys, change, words):
  given = {"--config": "olmoe:1b-7b", "--mesh": "fsdp=256", "--topology": "v5e:16x16"}
  given |= change
  code = plan.main([part for pair in given.items() for part in pair if part])
  out, err = capsys.readouterr()
  assert code == 2 and not out
  assert words in err and err.startswith("error: ") and err.count("\n") == 1


@pytest.mark.skipif(
  importlib.util.find_spec("libtpu") is not None, reason="libtpu is installed"
)
def test_without_libtpu_compiling_names_the_extra(capsys):
  code = plan.main(
    ["--config", "olmoe:1b-7b", "--mesh", "fsdp=256", "--topology", "v5e:16x16"]
    + ["--compile"]
  )
  assert code == 2
  assert "pip install 'jmoe[aot]'" in capsys.readouterr().err


def test_the_first_axis_of_a_mesh_lies_over_hosts(capsys):
  given = ("--config", "olmoe:1b-7b", "--topology", "gpu:2x4xH200", "--mesh")
  far = lines(capsys, *given, "expert=2,fsdp=4")[1]
  near = lines(capsys, *given, "fsdp=4,expert=2")[1]
  assert "mesh expert=2,fsdp=4:" in far and "mesh fsdp=4,expert=2:" in near

  def seconds(out):
    return float(re.findall(r"all_to_all +[\d.]+ +([\d.]+)", out)[0])  # of rows

  assert seconds(far) > 2 * seconds(near)


def test_what_fits_nowhere_is_said(capsys):
  code, out = lines(
    capsys, "--config", "deepseek_v3:671b-size", "--topology", "v5e:2x2", "--mesh",
    "fsdp=4",
  )  # fmt: skip
  assert code == 3
  assert "largest batch that fits: none" in out
