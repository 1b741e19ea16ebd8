"""What the links between devices move, by collective, at the sizes that layers need.

All collectives send as many bytes from a device; `ppermute`, which does nothing but
send to a neighbour, is the limit.  Beside them stand other ways to the same results
(`variants`), and on GPUs exchanges by the copy engines.
"""
# SPDX-License-Identifier: Apache-2.0

import dataclasses
import statistics
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec as P

from experiments.benchmarks.mesh import variants
from experiments.benchmarks.peers import rows
from experiments.benchmarks.shapes import Shape
from jmoe.dispatch.exchange import exchange
from jmoe.parallel import mesh as meshes

AXIS = ("expert",)
_WIDTH = 2048  # of a row, in bfloat16
_TURN = 0.05  # seconds; a call takes 0.3 to 5 ms


@dataclasses.dataclass(frozen=True)
class Call:
  """A collective on a device's rows."""

  name: str
  per_device: int  # rows that go in
  leaves: float  # bytes that leave the device that sends or gets most
  function: Callable[..., Any]
  options: dict[str, str | bool] = dataclasses.field(default_factory=dict)

  def by_copies(self) -> "Call":
    """The same by the GPUs' copy engines."""
    name = f"{self.name}, copy engines"
    return dataclasses.replace(self, name=name, options=variants.COPIES)


def sizes(shape: Shape, n: int) -> dict[str, float]:
  """Bytes that leave a device: the rows of all choices, and of tokens to all others."""
  row = 2.0 * shape.d_model * shape.tokens
  return {"choices": row * shape.k * (n - 1) / n, "tokens": row * (n - 1)}


def calls(size: float, n: int) -> list[Call]:
  """Every collective at one size.

  Args:
    size: bytes that leave a device.
    n: devices.
  """
  row = 2 * _WIDTH
  all_rows = max(
    n, int(size / row * n / (n - 1)) // n * n
  )  # n equal messages, one stays
  shard = max(1, int(size / row / (n - 1)))
  ring = [(i, (i + 1) % n) for i in range(n)]
  part_n = np.exp(0.6 * np.linspace(-1, 1, n))  # two devices get 77 and 23%
  skewed_n = np.floor(part_n / part_n.sum() * all_rows).astype(np.int32)
  even_n = np.full(n, all_rows // n, np.int32)

  def ragged(count_n, room):
    count_nn = jnp.asarray(np.tile(count_n, (n, 1)))
    return lambda x_ND: exchange(x_ND, count_nn, room, AXIS)

  most = int(skewed_n.max())
  sent = row * max(all_rows - int(skewed_n.min()), most * (n - 1))
  exact = row * all_rows * (n - 1) / n
  gather, scatter = shard * row * (n - 1), shard * row * (n - 1)
  whole = variants.CHUNKS * max(1, shard // variants.CHUNKS)  # rows, of equal chunks
  chunked = whole * row * (n - 1)

  def over(function):
    return lambda x: function(x, AXIS)

  found = [
    Call("ppermute", int(exact / row), int(exact / row) * row,
         lambda x: lax.ppermute(x, AXIS, ring)),
    Call("all_to_all", all_rows, exact,
         lambda x: lax.all_to_all(x, AXIS, 0, 0, tiled=True)),
    Call("ragged_all_to_all", all_rows, exact, ragged(even_n, all_rows)),
    Call("ragged_all_to_all, skewed", all_rows, sent, ragged(skewed_n, n * most)),
    Call("all_gather", shard, gather,
         lambda x: lax.all_gather(x, AXIS, tiled=True)),
    Call("all_gather by all_to_all", shard, gather,
         over(variants.gather_by_all_to_all)),
    Call("all_gather by ppermute", shard, gather, over(variants.gather_by_ppermute)),
    Call("all_gather in chunks", whole, chunked, over(variants.gather_in_chunks)),
    Call("psum_scatter", shard * n, scatter,
         lambda x: lax.psum_scatter(x, AXIS, tiled=True)),
    Call("psum_scatter by all_to_all", shard * n, scatter,
         over(variants.scatter_by_all_to_all)),
    Call("psum_scatter by ppermute", shard * n, scatter,
         over(variants.scatter_by_ppermute)),
    Call("psum_scatter in chunks", whole * n, chunked,
         over(variants.scatter_in_chunks)),
  ]  # fmt: skip
  if jax.default_backend() == "gpu":
    permuting = [c for c in found if c.name in ("ppermute", "all_to_all")]
    found += [c.by_copies() for c in found if " by " in c.name or c in permuting]
  return found


def measured(
  shape: Shape,
  n: int,
  *,
  rounds: int,
  until: float,
  threads: int = 1,
  tiny: bool = False,
) -> list[dict[str, Any]]:
  """A dictionary for each collective and size: GB/s, and the share of `ppermute`'s.

  Args:
    shape: of the layer whose sizes are taken.
    n: devices.
    rounds: of all collectives in turn.
    until: of `time.monotonic`; no round begins later.
    threads: programs compiled at a time.
    tiny: few bytes and one size, to try it without GPUs.
  """
  mesh = meshes.make({"expert": n}, devices=jax.devices()[:n])
  split = NamedSharding(mesh, P(AXIS))
  found = []
  for what, size in sizes(shape, n).items():
    if tiny and found:
      break
    asked = calls(min(size, 2**20) if tiny else size, n)
    with ThreadPoolExecutor(threads) as pool:
      programs = [pool.submit(_compiled, call, split) for call in asked]
    # What runs over all devices runs in one thread: two would wait for each other.
    made = [
      (call, _row(call, program, split))
      for call, program in zip(asked, programs, strict=True)
    ]
    ready = [row for _, row in made if isinstance(row, rows.Row)]
    rows.in_turn(ready, lambda: 0.0, rounds, _TURN, kinds=("call",), until=until)
    limit = 0.0
    for call, row in made:
      entry = {"gpus": n, "collective": call.name, "size": what}
      entry["gb"] = call.leaves / 1e9
      times = getattr(row, "ms", {}).get("call")
      if not times:
        found.append(entry | {"why": row.why or "no time was left"})
        continue
      entry |= {"ms": times, "gb_s": call.leaves / statistics.median(times) / 1e6}
      limit = limit or entry["gb_s"]
      found.append(entry | {"share": entry["gb_s"] / limit})
  return found


def _like(call: Call, split: NamedSharding) -> jax.ShapeDtypeStruct:
  shape = (call.per_device * split.mesh.size, _WIDTH)
  return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=split)


def _compiled(call: Call, split: NamedSharding) -> list[Any]:
  """The program, and one without its options if it has any."""
  function = jax.shard_map(
    call.function, mesh=split.mesh, in_specs=P(AXIS), out_specs=P(AXIS)
  )
  lowered = jax.jit(function).lower(_like(call, split))
  first = lowered.compile(compiler_options=call.options or None)
  return [first, lowered.compile()] if call.options else [first]


def _row(
  call: Call, program: Future[list[Any]], split: NamedSharding
) -> rows.Row | rows.Missing:
  like = _like(call, split)
  try:
    x = jax.jit(
      lambda: jax.random.normal(jax.random.key(0), like.shape, like.dtype),
      out_shardings=split,
    )()
    compiled, *plain = program.result()
    if plain:
      same = jax.jit(lambda a, b: (a == b).all())(compiled(x), plain[0](x))
      if not same:
        return rows.Missing(call.name, "its result is not that without these options")
  except Exception as error:  # of a backend that lacks it
    return rows.Missing(call.name, rows.reason(error))

  def timed(kind: str, budget: float) -> float:
    del kind
    return rows.span(lambda: compiled(x), jax.block_until_ready, budget)

  return rows.Row(call.name, timed)


def shown(found: dict[str, Any]) -> str:
  """One collective in one line."""
  said = f"  {found['gpus']} GPUs, {found['collective']:<38}{found['size']:<9}"
  said += f"{found['gb']:8.3f} GB"
  if "why" in found:
    return f"{said} missing: {found['why']}"
  return f"{said}{found['gb_s']:8.1f} GB/s{found['share']:7.2f} of ppermute"
