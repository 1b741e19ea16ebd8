"""What `explain` says of a layer on a mesh: specs, bytes, and groups over nodes."""
# SPDX-License-Identifier: Apache-2.0

import dataclasses
import re

import jax
import pytest

import jmoe
from jmoe import capacity, dispatch, restrict, use
from jmoe.experts import layout
from jmoe.parallel import EXPERT_TENSOR, Rules, explain

pytestmark = pytest.mark.contract
SHAPE = (8, 512, 4096)
SIZES = "fsdp=2,expert=4,tensor=2"
WIDE = dataclasses.replace(
  jmoe.simple(4096, 14336, num_experts=8, k=2, sharding=EXPERT_TENSOR),
  dispatch=use(dispatch.ragged_all_to_all),
)
LAST = "a mesh with the expert axes last"


def grouped(num_groups, **fields):
  groups = use(restrict.expert_groups, num_groups=num_groups, keep=1)
  return dataclasses.replace(WIDE, restrict=(groups,), **fields)


def line(text, start):
  (found,) = [line for line in text.splitlines() if line.startswith(start)]
  return found


def test_every_array_has_its_spec_and_the_bytes_of_one_device():
  text = explain(WIDE, SIZES, SHAPE)
  up = line(text, "experts up_EDF")
  assert "PartitionSpec(('expert', 'fsdp'), None, 'tensor')" in up
  assert f"{8 * 4096 * 14336 * 4 // 16:,} bytes" in up
  x = line(text, "x ")
  assert "PartitionSpec(('fsdp', 'expert'), None)" in x
  assert f"{8 * 512 * 4096 * 4 // 8:,} bytes" in x
  rows = 2 * 512 * 4  # of 512 tokens on each of four devices
  assert f"{rows * 4096 * 4:,} bytes" in line(text, "rows of experts")
  hidden = line(text, "hidden of experts")
  assert "PartitionSpec(('fsdp', 'expert'), 'tensor')" in hidden
  assert f"{rows * 14336 * 4 // 2:,} bytes" in hidden


def test_slots_are_rows_too():
  slots = use(capacity.by_factor, factor=1.25)
  config = dataclasses.replace(
    WIDE, capacity=slots, group_size=256, dispatch=use(dispatch.all_to_all)
  )
  rows = 8 * 2 * 80  # experts, groups of a device, ceil(2 * 256 * 1.25 / 8)
  assert f"{rows * 4096 * 4:,} bytes" in line(
    explain(config, SIZES, SHAPE), "rows of experts"
  )


@pytest.mark.parametrize(
  "sizes, devices_per_node, num_groups, remedies",
  [
    ("expert=4", 2, 2, None),
    ("expert=4", 2, 1, "num_groups=2."),
    ("data=2,expert=4", 2, 2, None),
    ("expert=4,data=2", 4, 2, None),  # a node holds every second device of an expert
    ("expert=4,data=2", 2, 2, f"num_groups=4 or {LAST}."),
    (
      "expert=4,tensor=2",
      2,
      2,
      f"num_groups=4 or {LAST}.",
    ),  # a node is one shard of experts
    ("expert=4,tensor=2", 4, 2, None),
    ("data=2,expert=4", 3, 4, None),  # a shard is on one device
    ("data=2,expert=4", 3, 2, "num_groups=4."),  # the second copy is cut
  ],
)
def test_groups_on_several_nodes_are_warned_of(
  sizes, devices_per_node, num_groups, remedies
):
  text = explain(grouped(num_groups), sizes, SHAPE, devices_per_node=devices_per_node)
  assert ("warning" in text) == (remedies is not None)
  if remedies is not None:
    assert text.endswith(f"devices; use {remedies}")


def test_groups_of_copies_and_of_domains_are_looked_at_too():
  busy = layout.replicate([9.0] + [1.0] * 7, num_devices=4, slots_per_device=3)
  copies = dataclasses.replace(EXPERT_TENSOR, placement=busy)
  text = explain(grouped(2, sharding=copies), "expert=4", SHAPE, devices_per_node=2)
  assert "warning: expert_groups" in text
  assert text.endswith("use fewer devices on the expert axes.")  # copies are far apart
  domains = use(restrict.domain, num_domains=2)
  config = dataclasses.replace(WIDE, restrict=(domains,))
  assert "warning" not in explain(config, "expert=4", SHAPE, devices_per_node=2)
  text = explain(config, "expert=4", SHAPE, devices_per_node=1)
  assert "warning: domain" in text and text.endswith("use num_domains=4.")


def test_axes_of_the_table_are_known_and_meshes_are_taken():
  renamed = Rules(tokens=("rows", "ep"), expert=("ep",))
  config = dataclasses.replace(WIDE, sharding=renamed)
  made = jax.make_mesh((2, 4), ("rows", "ep"))
  assert explain(config, made, SHAPE) == explain(config, "rows=2,ep=4", SHAPE)


def test_what_cannot_be_split_is_an_error():
  with pytest.raises(ValueError, match="sharding=None"):
    explain(dataclasses.replace(WIDE, sharding=None), "data=8", SHAPE)
  with pytest.raises(ValueError, match="num_experts=8 is not divisible.*use 6 or 9"):
    explain(WIDE, "expert=3", (6, 512, 4096))
  with pytest.raises(ValueError, match="8 is not divisible by data=3"):
    explain(WIDE, "data=3", SHAPE)
  with pytest.raises(ValueError, match=r"names no axis of the mesh \('foo',\)"):
    explain(WIDE, jax.make_mesh((8,), ("foo",)), SHAPE)
  with pytest.raises(ValueError, match="'foo'; known: context, data, expert, fsdp, t"):
    explain(WIDE, "foo=8", SHAPE)
  with pytest.raises(TypeError, match="shape=8; give that of x"):
    explain(WIDE, "data=8", 8)  # type: ignore[arg-type]
  with pytest.raises(ValueError, match=r"shape=\(-8, 512, 4096\) must be whole"):
    explain(WIDE, "data=8", (-8, 512, 4096))
  with pytest.raises(ValueError, match="dtype='floaty' is no float dtype; use"):
    explain(WIDE, "data=8", SHAPE, dtype="floaty")
  with pytest.raises(TypeError, match="'foo' is no layer's configuration"):
    explain("foo", "data=8", SHAPE)
  for wrong in (0, 2.5, "8"):
    with pytest.raises(ValueError, match=f"devices_per_node={wrong!r} must be a whole"):
      explain(WIDE, "data=8", SHAPE, devices_per_node=wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype, short", [("bfloat16", "bf16"), ("float16", "f16")])
def test_activations_are_of_a_dtype(dtype, short):
  assert f" {short}[8, 512, 4096] " in explain(WIDE, "data=8", SHAPE, dtype=dtype)


@pytest.mark.parametrize(
  "shape, said",
  [
    ((8, 512, 4097), "x has shape (8, 512, 4097); expected [..., 4096]"),
    ((8,), "x has shape (8,); expected [..., 4096]"),
    (
      (4096,),
      "x has shape (4096,): one token, which no mesh splits; expected [T, 4096]",
    ),
  ],
)
def test_a_shape_is_of_activations(shape, said):
  with pytest.raises(ValueError, match=re.escape(said)):
    explain(WIDE, "data=8", shape)
