"""What is sent to a GPU goes in pieces, and its kernels serve every shard of a mesh."""
# SPDX-License-Identifier: Apache-2.0

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from experiments.benchmarks.mesh import layer, variants
from experiments.benchmarks.peers import ours
from experiments.benchmarks.shapes import Shape
from jmoe import MoEConfig, dispatch, use
from jmoe.dispatch import apart, everywhere, exchange, placed
from jmoe.kernels import devices
from jmoe.parallel import mesh as meshes
from tests.parallel import cases
from tests.tolerance import assert_close

SHAPE = Shape(256, 128, 8, 2, 1024)


@pytest.mark.parametrize("pieces", [1, 4, 16])
def test_pieces_cover_what_each_device_is_sent(pieces):
  count_n = np.array([0, 3, 16, 37], np.int32)
  first_nP, size_nP = map(np.asarray, exchange.cut(jnp.asarray(count_n), pieces))
  assert first_nP.shape == size_nP.shape == (4, pieces)
  assert (size_nP >= 0).all()
  np.testing.assert_array_equal(size_nP.sum(1), count_n)
  np.testing.assert_array_equal(first_nP[:, 1:], (first_nP + size_nP)[:, :-1])


def test_messages_are_cut_on_gpus_alone_and_small_ones_less():
  assert exchange.number_of_pieces(10**6, 2) == 1  # a CPU
  with devices.as_if("hopper"):
    found = [exchange.number_of_pieces(rows, 4) for rows in (10, 640, 10**6)]
  assert found == [1, 8, exchange.PIECES]


@pytest.mark.skipif(
  jax.__version_info__ < (0, 10), reason="Hopper's kernels need jax 0.10"
)
@pytest.mark.parametrize("strategy", [
  "all_to_all", "ragged_all_to_all", "all_to_all own first", "all_gather own first",
])  # fmt: skip
def test_shards_run_the_kernels_of_hopper_and_nothing_dense(strategy):
  factor = 1.25 if strategy.startswith("all_to_all") else None
  given: Any = {}
  if jax.__version_info__ >= (0, 11):  # Pallas asks what it compiles for
    gpu = jax.sharding.AbstractDevice("NVIDIA H200", num_cores=132, platform="cuda")
    given["abstract_device"] = gpu
  mesh: Any = jax.sharding.AbstractMesh((1, 2), layer.AXES, **given)
  step = layer.step(layer.sharded(SHAPE, layer.Way(strategy, factor=factor), mesh))
  whole = Shape(256, 128, 8, 2, 2048)
  at = NamedSharding(mesh, layer.SPLIT)

  def struct(shape, dtype):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=at)

  params, x = jax.tree.map(
    lambda a: struct(a.shape, a.dtype), jax.eval_shape(lambda: ours.operands(whole))
  )
  weight, expert = (struct((2048, 2), t) for t in (jnp.float32, jnp.int32))
  with devices.as_if("hopper"), jax.numpy_dtype_promotion("standard"):
    traced = jax.jit(step).trace(params, x, weight, x, expert)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
  # Two products into the hidden layer and one out of it, and their gradients: of rows
  # in each buffer, of three matrices once for all.
  buffers = 2 if strategy.endswith("own first") else 1
  assert len(re.findall(r"custom_call @mosaic_gpu", text)) == 4 * buffers + 3
  assert not re.search(r"stablehlo\.(dot|dot_general)|ragged_dot", text)
  if strategy == "ragged_all_to_all":
    sizes = re.findall(r"custom_call @ragged_all_to_all.*?tensor<(\d+)xi32>", text)
    assert sizes == 2 * ["128", "256"]  # pieces; from twice the room they come home


@pytest.mark.skipif(
  jax.__version_info__ < (0, 10), reason="Triton's kernels for rows need jax 0.10"
)
@pytest.mark.parametrize("way", ["rows", "places", "own first"])
def test_what_exchanges_of_gpus_write_into_is_made_when_their_rows_are(way):
  """Arrays of nothing's making would be all layers' at once: 13.8 GB were of 70."""
  axis, mesh = ("expert",), meshes.make("expert=2", devices=jax.devices()[:2])
  at = PartitionSpec("expert")

  def local(x_ND, count_nn):
    if way == "rows":
      return exchange.exchange(x_ND, count_nn, 64, axis, zero=False)
    if way == "places":
      return placed.gathered(x_ND, axis)
    own, late = apart.slots_apart(x_ND.reshape(4, 8, -1), axis)
    return apart.slots_joined(own, late, axis).reshape(x_ND.shape)

  def pulled(x, count):
    over = jax.shard_map(local, mesh=mesh, in_specs=(at, PartitionSpec()), out_specs=at)
    y, pull = jax.vjp(lambda x: over(x, count), x)
    return y, pull(y)[0]

  x = jax.ShapeDtypeStruct((64, 256), jnp.bfloat16)
  with devices.as_if("hopper"):
    text = str(jax.make_jaxpr(pulled)(x, jax.ShapeDtypeStruct((2, 2), jnp.int32)))
  assert " empty[" not in text
  assert text.count("name=unwritten") == (1 if way == "places" else 2)


def test_other_ways_to_a_gather_and_a_scattered_sum_give_the_same():
  n, T, D = 8, 8, 3
  mesh = meshes.make(f"expert={n}")
  x_ND = jnp.asarray(np.random.default_rng(0).normal(size=(n * n * T, D)), jnp.float32)

  def over(function):
    at = PartitionSpec("expert")
    made = jax.shard_map(
      lambda x: function(x, ("expert",)), mesh=mesh, in_specs=at, out_specs=at
    )
    return np.asarray(jax.jit(made)(x_ND)).reshape(n, -1, D)

  def parts(x_nND):  # in an order of their own
    return np.sort(x_nND.reshape(n, -1), axis=1)

  gathered = np.broadcast_to(x_ND, (n, *x_ND.shape))
  np.testing.assert_array_equal(over(variants.gather_by_all_to_all), gathered)
  for function in (variants.gather_by_ppermute, variants.gather_in_chunks):
    np.testing.assert_array_equal(parts(over(function)), parts(gathered))
  summed = np.asarray(x_ND).reshape(n, n, T, D).sum(0)
  for function in (
    variants.scatter_by_all_to_all,
    variants.scatter_by_ppermute,
    variants.scatter_in_chunks,
  ):
    np.testing.assert_allclose(over(function), summed, rtol=1e-5, atol=1e-6)


def test_gradients_of_a_gather_by_exchanges_are_sums_in_float32():
  n, mesh, at = 8, meshes.make("expert=8"), PartitionSpec("expert")
  # Of each row the first device has 1 and the others 1/256, which bfloat16 cannot add.
  dy_nN = jnp.where(jnp.arange(n)[:, None] == 0, 1, jnp.full((n, n), 2.0**-8))

  def pulled(x, dy):
    return jax.vjp(lambda x: everywhere.gathered(x, ("expert",)), x)[1](dy)[0]

  made = jax.shard_map(pulled, mesh=mesh, in_specs=(at, at), out_specs=at)
  x, dy = jnp.ones(n, jnp.bfloat16), dy_nN.reshape(-1).astype(jnp.bfloat16)
  found = jax.jit(made)(x, dy)
  assert found.dtype == jnp.bfloat16
  np.testing.assert_array_equal(found, jnp.full(n, 1 + 7 / 256, jnp.bfloat16))


@pytest.mark.parametrize("strategy, by", [
  ("all_gather", "all_to_all"), ("all_gather", "ragged"), ("all_to_all", "ragged"),
])  # fmt: skip
def test_other_ways_of_an_exchange_are_the_layer_of_one_device(strategy, by):
  row = dict(router="top_k 1", strategy=strategy, extra="plain")
  config = cases.config_of(row)
  used = use(getattr(dispatch, strategy), by=by)
  config = dataclasses.replace(config, dispatch=used)
  found = cases.results(
    config, "plain", mesh=meshes.make("data=2,expert=4", axes=cases.AXES)
  )
  expected = cases.one_device(row)
  jax.tree.map(assert_close, *({**x, "kept": 0} for x in (found, expected)))


@pytest.mark.parametrize("n, local, size", [(2, 4, 4096), (3, 2, 100), (4, 1, 7)])
@pytest.mark.parametrize("which", ["there", "back", "all"])
def test_pieces_go_where_the_collective_would_have_them(which, n, local, size):
  """A ragged all-to-all in NumPy from the offsets: every row is written once."""
  rows = n * local * size
  sent_nR = np.arange(n * rows).reshape(n, rows)
  if which == "there":
    slots = sent_nR.reshape(n, n, local, size)  # [sender, receiver, expert, slot]
    expected, places = slots.transpose(1, 2, 0, 3), placed.out_of_slots
  elif which == "back":
    slots = sent_nR.reshape(n, local, n, size)  # [sender, expert, receiver, slot]
    expected, places = slots.transpose(2, 0, 1, 3), placed.into_slots
  else:
    sent_nR = sent_nR[:, : local * size]
    expected = np.broadcast_to(sent_nR.reshape(-1), (n, n * local * size))
    size, rows = local * size, n * local * size

    def places(me, n, local, size):
      return placed.behind_each_other(me, n, size)

  found_nR = np.full((n, rows), -1)
  for me in range(n):
    first, sizes, to = placed.cut_up(places(me, n, local, size), size)
    per_receiver = first.shape[0] // n
    assert per_receiver <= max(512, local)
    for i, (start, count, there) in enumerate(zip(first, sizes, to, strict=True)):
      target = found_nR[i // per_receiver, int(there) : int(there + count)]
      assert (target == -1).all()
      target[:] = sent_nR[me, int(start) : int(start + count)]
  np.testing.assert_array_equal(found_nR, expected.reshape(n, -1))


@pytest.mark.parametrize("models", [None, 3])
@pytest.mark.parametrize("shape", [(16, 5), (16, 2, 5)])
def test_places_are_traced_for_a_gpu_with_gradients_of_any_shape(shape, models):
  """Of one model and of several in one program, whose places are the same."""
  n, at = 4, PartitionSpec("expert")
  mesh = meshes.make({"expert": n}, devices=jax.devices()[:n])

  def local(x):
    y = placed.scattered(placed.gathered(x, ("expert",)), ("expert",))
    if y.ndim == 3:
      return y
    slots = placed.slots_there(y.reshape(8, 2, -1), ("expert",))
    return placed.slots_back(slots, ("expert",)).reshape(y.shape)

  over_mesh = jax.shard_map(local, mesh=mesh, in_specs=at, out_specs=at)

  def pulled(x):
    y, pull = jax.vjp(over_mesh, x)
    return y, pull(y)[0]

  whole = (n * shape[0], *shape[1:])
  x = jax.ShapeDtypeStruct(whole if models is None else (models, *whole), jnp.float32)
  function = pulled if models is None else jax.vmap(pulled)
  with devices.as_if("hopper"):
    traced = jax.jit(function).trace(x)
  found = jax.tree.map(lambda a: a.shape, traced.out_info)
  assert found == (x.shape, x.shape)
  assert str(traced.jaxpr).count("ragged_all_to_all") >= (2 if len(shape) == 3 else 6)


def test_a_way_that_is_not_known_is_refused():
  with pytest.raises(ValueError, match="by='ring': use one of 'all_gather'"):
    MoEConfig(4, 4, dispatch=use(dispatch.all_gather, by="ring"))
  with pytest.raises(ValueError, match="by='ring': use one of 'all_to_all', 'ragged'"):
    MoEConfig(4, 4, dispatch=use(dispatch.all_to_all, by="ring"))
