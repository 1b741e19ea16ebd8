"""Chips and meshes by name: what is accepted, and one line for what is not."""
# SPDX-License-Identifier: Apache-2.0

import math

import pytest

from experiments.planning import chips, mesh as meshes, models, topology
from experiments.planning.mesh import Mesh

V5E = topology.parse("v5e:16x16")


@pytest.mark.parametrize(
  ("text", "devices", "node"),
  [
    ("v5e:16x16", 256, 256),
    ("v5p:4x4x4", 64, 64),
    ("tpu7x:2x2x1", 8, 8),  # a chip is two devices
    ("gpu:8xH200", 8, 8),
    ("gpu:4x8xb200", 32, 8),
    ("V5E:4X4", 16, 16),
    ("gpu:2xh200", 2, 2),
  ],
)
def test_topologies_have_devices(text, devices, node):
  found = topology.parse(text)
  assert (found.devices, found.node) == (devices, node)


@pytest.mark.parametrize(
  ("text", "words"),
  [
    ("v5x:4x4", "unknown; use v4:AxBxC, v5e:AxB"),
    ("v5p:4x4", "torus of 3 dimensions; write v5p:AxBxC, as in v5p:4x4x4"),
    ("gpu:8xH900", "with CHIP one of A100, H100, H200, B200"),
    ("gpu:0xH200", "unknown"),
    ("", "unknown"),
  ],
)
def test_unknown_topologies_are_answered_with_known_ones(text, words):
  with pytest.raises(ValueError, match="--topology") as error:
    topology.parse(text)
  assert words in str(error.value)
  assert "\n" not in str(error.value)


@pytest.mark.parametrize(
  ("text", "words"),
  [
    ("data=2,fsdp=2", "is 4 devices, but there are 256; data=128 or fsdp=128 would do"),
    ("date=256", "axis 'date'; did you mean 'data'"),
    ("data=16,data=16", "'data' is listed twice"),
    ("data=-1", "data='-1' must be a whole number"),
    ("data", "'data' has no size"),
  ],
)
def test_a_mesh_that_does_not_fit_is_answered_with_one_that_does(text, words):
  with pytest.raises(ValueError, match="^--mesh ") as error:
    meshes.parse(text, V5E)
  assert words in str(error.value)


def test_a_mesh_says_its_axes_in_the_order_given():
  mesh = meshes.parse("fsdp=32, expert=8", V5E)
  assert mesh == Mesh(fsdp=32, expert=8)
  assert str(mesh) == "fsdp=32,expert=8"
  turned = meshes.parse("expert=8, fsdp=32", V5E)
  assert turned.order == ("data", "expert", "tensor", "context", "fsdp")
  assert str(turned) == "expert=8,fsdp=32"
  assert topology.extents(V5E, turned.sizes)["fsdp"].spans[0] == (16, True)


@pytest.mark.parametrize(
  ("mesh", "words"),
  [
    (Mesh(fsdp=3), "d_model=2048; use 2 or 4."),
    (Mesh(expert=12), "num_experts=64; use 8 or 16."),
    (Mesh(tensor=32), "num_kv_heads=16; use 16."),
    (Mesh(data=7), "data.batch=8 is not divisible by data*fsdp*expert=7; use --set "
     "data.batch=7 or 14."),
    (Mesh(context=3), "data.seq=4096; use 2 or 4."),
  ],
)  # fmt: skip
def test_what_an_axis_does_not_divide_is_named_with_sizes_that_do(mesh, words):
  with pytest.raises(ValueError) as error:
    meshes.check(models.load("olmoe:1b-7b", rows=8), mesh)
  assert words in str(error.value)


def test_axes_lie_over_neighbours_and_whole_dimensions_are_rings():
  found = topology.extents(V5E, Mesh(data=4, fsdp=4, expert=16).sizes)
  assert found["expert"].spans == ((16, True),)
  assert found["fsdp"].spans == ((4, False),)
  assert found["data"].spans == ((4, False),)


def test_axes_of_gpus_stay_in_a_host_or_leave_it():
  hosts = topology.parse("gpu:4x8xH200")
  found = topology.extents(hosts, Mesh(data=2, expert=16).sizes)
  assert (found["expert"].inside, found["data"].inside) == (8, 1)
  turned = topology.extents(hosts, meshes.parse("expert=4,data=8", hosts).sizes)
  assert (turned["expert"].inside, turned["data"].inside) == (1, 8)
  three = topology.parse("gpu:3x8xH200")  # two groups of twelve in three hosts
  found = topology.extents(three, Mesh(data=2, expert=12).sizes)
  assert found["expert"].inside == 4


def test_a_gather_goes_at_the_speed_of_all_links_and_a_host_at_that_of_its_network():
  chip = chips.CHIPS["v5e"]
  whole = topology.extents(V5E, Mesh(fsdp=256).sizes)["fsdp"]
  reached = 0.8
  expected = 1e9 / (4 * chip.link * reached) + 255e-6  # and as many messages
  assert math.isclose(
    topology.seconds(V5E, whole, "all_gather", 1e9), expected, rel_tol=1e-6
  )
  one, four = topology.parse("gpu:8xH200"), topology.parse("gpu:4x8xH200")
  near = topology.extents(one, Mesh(expert=8).sizes)["expert"]
  far = topology.extents(four, Mesh(expert=32).sizes)["expert"]
  assert topology.seconds(four, far, "all_to_all", 1e9) > 5 * topology.seconds(
    one, near, "all_to_all", 1e9
  )


def test_every_chip_has_a_source():
  assert all(chip.source and chip.flops > 1e14 for chip in chips.CHIPS.values())
