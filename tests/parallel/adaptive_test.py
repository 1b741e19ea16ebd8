"""The way to run a layer is chosen by size, and every way gives the same numbers."""
# SPDX-License-Identifier: Apache-2.0

import dataclasses

import jax
import pytest

import jmoe
from jmoe import dispatch, use
from jmoe.layer import apply, moe, moe_init, param_shapes
from jmoe.parallel import DATA, EXPERT_TENSOR, Rules, adaptive, mesh, param_specs
from tests._cases import quickly
from tests.tolerance import assert_close

pytestmark = pytest.mark.contract
SIZES = {"data": 2, "expert": 2, "tensor": 2}
RATES = adaptive.Rates(flops=1e15, link=1e11)


def wide(**fields):
  return jmoe.simple(4096, 14336, num_experts=8, k=2, sharding=EXPERT_TENSOR, **fields)


def test_many_tokens_fetch_matrices_and_few_go_to_them():
  many = adaptive.costs(wide(), 10_000_000, SIZES, RATES)
  few = adaptive.costs(wide(), 512, SIZES, RATES)
  assert many[0].name == "data" and many[0].dispatch == use(dispatch.sort)
  assert few[0].name == "expert_tensor"
  names = {"data", "expert", "expert_tensor"}
  assert {c.name for c in many} == {c.name for c in few} == names
  config = dataclasses.replace(wide(capacity_factor=1.0), group_size=64)
  limited = adaptive.costs(config, 512, SIZES, RATES)
  carriers = {c.dispatch for c in limited if c.name == "expert"}
  assert use(dispatch.all_to_all) in carriers and use(dispatch.all_gather) in carriers
  assert not any(c.dispatch == use(dispatch.all_to_all) for c in few)  # it would drop


def test_the_exchange_is_chosen_by_choices_devices_and_what_links_reach():
  """k choices on two devices: their tokens come at once; on many: they are sent out."""

  def first(sizes, k, **shares):
    config = jmoe.simple(2048, 768, num_experts=128, k=k, sharding=EXPERT_TENSOR)
    found = adaptive.costs(config, 2**18, sizes, RATES._replace(shares=shares))
    return next(c for c in found if c.name == "expert").dispatch

  assert first({"expert": 2}, 8, ragged_all_to_all=0.9) == use(dispatch.all_gather)
  assert first({"expert": 64}, 16) == use(dispatch.deduplicated)
  slow = dict(ragged_all_to_all=0.01)
  assert first({"expert": 64}, 2, **slow) == use(dispatch.all_gather)


def test_ways_that_cannot_divide_rows_or_groups_are_left_out():
  many = 8 * 2**20
  assert adaptive.costs(wide(), many, SIZES, RATES, num_rows=8)[0].name == "data"
  rows = adaptive.costs(wide(), many, SIZES, RATES, num_rows=4)  # of eight devices
  assert {c.name for c in rows} == {"expert_tensor"}
  grouped = dataclasses.replace(wide(capacity_factor=1.0), group_size=128)
  names = {c.name for c in adaptive.costs(grouped, 512, SIZES, RATES)}
  assert names == {"expert_tensor"}
  assert adaptive.choose(wide(), many, SIZES, RATES, num_rows=4).sharding.tokens == (
    "data", "expert",
  )  # fmt: skip


BY_SEQUENCE = jmoe.simple(
  8,
  4,
  num_experts=4,
  k=2,
  sharding=Rules(tokens=("data",), sequence=("expert",), expert=("expert",)),
)
IN_TWO = {"data": 2, "expert": 4}


@pytest.mark.parametrize(
  "fields, sizes, num_tokens, num_rows, said",
  [
    (dict(), SIZES, 512, 3, "num_rows=3 cannot .*; use num_rows=4, or fewer"),
    (dict(), SIZES, 30, None, "num_tokens=30 cannot .*; use num_tokens=28 or num_tokens"
     "=32, or"),
    (None, IN_TWO, 12, 2, "num_tokens=12 cannot .*; use num_tokens=8 or num_tokens=16"),
    (None, IN_TWO, 15, 3, "num_tokens=15 and num_rows=3 cannot .*; use num_tokens=8 "
     "with num_rows=2 or"),
    (dict(group_size=None), SIZES, 512, None, "group_size=None cannot .*; use "
     "group_size=128, or"),
    (dict(group_size="row"), SIZES, 512, None, "group_size='row' cannot .*; use "
     "group_size=128, or"),
    (dict(group_size=32), {"context": 2}, 256, 8, "num_tokens=256 and group_size=32 "
     "cannot .*; use group_size=16 or num_tokens=512, or fewer"),
    (dict(num_experts=6, group_size=1), {"expert": 4}, 512, None, "no way can run over "
     ".*: num_experts=6 is not divisible"),
  ],
)  # fmt: skip
def test_the_error_names_what_fails_and_what_would_do(
  fields, sizes, num_tokens, num_rows, said
):
  config = wide(capacity_factor=1.0) if fields else wide()
  config = dataclasses.replace(config, **fields) if fields is not None else BY_SEQUENCE
  with pytest.raises(ValueError, match=said):
    adaptive.costs(config, num_tokens, sizes, RATES, num_rows=num_rows)


@pytest.mark.parametrize(
  "fields, said",
  [
    (dict(config="foo"), "'foo' is no layer's configuration"),
    (dict(config=dataclasses.replace(wide(), sharding=None)), "sharding=None in"),
    (dict(sizes="expret=2"), "unknown axis 'expret'; did you mean 'expert'"),
    (dict(num_tokens="64"), "num_tokens='64' must be a whole number"),
    (dict(num_tokens=0), "num_tokens=0 must be a whole number"),
    (dict(num_rows=-1), "num_rows=-1 must be a whole number"),
    (dict(dtype="floaty"), "dtype='floaty' is no float dtype"),
    (dict(rates=adaptive.Rates(0, 1)), "rates.flops=0 must be a positive number"),
    (dict(rates=adaptive.Rates(1e15, -1)), "rates.link=-1 must be a positive"),
    (
      dict(rates=adaptive.Rates(1e15, 1e11, {"all_gather": 0.0})),
      r"rates.shares\['all_gather'\]=0.0 must be a positive",
    ),
  ],
)
def test_bad_input_is_named(fields, said):
  given = dict(config=wide(), num_tokens=512, sizes=SIZES, rates=RATES) | fields
  for call in (adaptive.costs, adaptive.choose):
    with pytest.raises((TypeError, ValueError), match=said) as error:
      call(**given)
    assert str(error.value).startswith(("adaptive: ", "mesh: "))
    assert "\n" not in str(error.value)


def test_a_mesh_and_a_text_are_sizes_too():
  expected = adaptive.choose(wide(), 512, SIZES, RATES)
  made = mesh.make(SIZES)
  assert adaptive.choose(wide(), 512, made, RATES) == expected
  assert adaptive.choose(wide(), 512, "data=2,expert=2,tensor=2", RATES) == expected


def test_expert_axes_that_split_sequences_split_tokens_once():
  params, x = param_shapes(BY_SEQUENCE), jax.ShapeDtypeStruct((2, 8, 8), "float32")
  found = adaptive.costs(BY_SEQUENCE, 16, IN_TWO, RATES, num_rows=2)
  assert {c.tokens for c in found} == {("data", "expert")}
  assert {c.name for c in found} == {"data", "expert"}
  with jax.set_mesh(mesh.make(IN_TWO)):
    for way in found:  # it runs; traced alone, since numbers are of other tests
      chosen = adaptive.as_chosen(BY_SEQUENCE, way, IN_TWO)
      y, _ = jax.eval_shape(lambda p, x, c=chosen: apply(p, x, c), params, x)
      assert y.shape == x.shape


def test_hidden_layers_are_whole_where_their_axis_splits_sequences():
  both = Rules(tokens=("data",), sequence=("tensor",), d_ff=("tensor",))
  config, sizes = dataclasses.replace(wide(), sharding=both), {"data": 2, "tensor": 4}
  (way,) = adaptive.costs(config, 4096, sizes, RATES, num_rows=2)
  assert way.name == "data" and way.tokens == ("data", "tensor")
  by_tokens = Rules(tokens=("data", "tensor"), d_ff=("tensor",))
  config = dataclasses.replace(wide(), sharding=by_tokens)
  same = adaptive.costs(config, 4096, sizes, RATES, num_rows=8)
  assert way.seconds == next(c.seconds for c in same if c.name == "data")


def test_a_table_still_names_axes_of_one_device():
  config = dataclasses.replace(wide(), sharding=DATA)
  assert adaptive.choose(config, 7, {"data": 1}, RATES).sharding == DATA


def test_the_cost_of_gathering_is_the_bytes_of_the_matrices():
  config, sizes = wide(), {"expert": 4}
  found = {c.name: c.seconds for c in adaptive.costs(config, 4096, sizes, RATES)}
  matrices = 8 * 3 * 4096 * 14336 * 2
  flops = 3 * 2 * (4096 / 4) * 2 * 3 * 4096 * 14336
  received = 2 * matrices * 3 / 4  # there, and their gradients home
  assert found["data"] == pytest.approx(flops / 1e15 + received / 1e11)


def test_switching_moves_no_parameter_and_changes_no_number():
  config = jmoe.simple(8, 4, num_experts=4, k=2, sharding=EXPERT_TENSOR)
  params = moe_init(jax.random.key(0), config)
  x = jax.random.normal(jax.random.key(1), (32, 8))
  y, _ = moe(params, x, dataclasses.replace(config, sharding=None))
  specs = []
  with quickly(), jax.set_mesh(mesh.make(SIZES)):
    seen = set()
    for way in adaptive.costs(config, 32, SIZES, RATES):
      chosen = adaptive.as_chosen(config, way, SIZES)
      specs.append(param_specs(param_shapes(chosen), chosen.sharding, SIZES))
      if way.name in seen:  # exchanges have tests of their own
        continue
      seen.add(way.name)
      found, _ = moe(params, x, chosen)
      assert_close(jax.device_get(found), jax.device_get(y), way.name)
  assert len(seen) == 3 and len(specs) == 7
  assert all(spec == specs[0] for spec in specs)
