"""A sparse layer compiled for one TPU chip, without a TPU: work, bytes and memory.

  python -m experiments.benchmarks.compiled_tpu --shape qwen3 --topology v5e:1x1

Needs the libtpu that the installed jax pins, and JAX_PLATFORMS=cpu.  Forward, and
forward with the gradients of the input, the matrices and the routing weights, in
bfloat16, from choices that are given.

  jmoe                  the dropless layer, as it runs on this jax
  jmoe, ragged_dot      the same with XLA's product
  plain, ragged_dot     sort, three `jax.lax.ragged_dot`, sort back
  MaxText               its layer by its own default tiles, if it can be imported

FLOPs and bytes of grouped products are counted from the grid of tiles in the compiled
kernels and the group sizes of the benchmark's routing (`benchmarks.grids`), bytes of
all else operation by operation (`benchmarks.traffic`); what the compiler believes is
beside it.  Other FLOPs and the memory are the compiler's.  Nothing here is a time.

Exit codes: 0 done, 2 bad arguments, 3 a dense product was found in jmoe's own row.
"""
# SPDX-License-Identifier: Apache-2.0

import argparse
import contextlib
import importlib.metadata
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from experiments.benchmarks import grids, shapes, traffic
from experiments.benchmarks.shapes import Shape
from experiments.parser import Parser


def chip(topology: str) -> Any:
  """The first chip of a topology such as v5e:1x1, v5p:1x1x1 or tpu7x:1x1x1.

  Raises:
    RuntimeError, ValueError: no such topology, or no libtpu.
  """
  os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
  from jax.experimental import topologies

  sides = [int(n) for n in topology.partition(":")[2].split("x")]
  bounds = (*sides, 1, 1)[:3]
  return topologies.get_topology_desc(
    platform="tpu", topology_name=topology, chips_per_host_bounds=bounds
  ).devices[0]


def counted(compiled: Any, shape: Shape, sizes_E: Any, *, backward: bool) -> Any:
  """What a compiled layer does, as numbers for JSON.

  Args:
    compiled: of `jax.jit(...).lower(...).compile()`.
    shape: of the layer.
    sizes_E: rows of each group that its kernels are given.
    backward: whether gradients are in it.
  """
  text, useful = compiled.as_text(), shape.flops(backward=backward)
  cost, memory = compiled.cost_analysis(), compiled.memory_analysis()
  cost = cost[0] if isinstance(cost, list) else cost
  found = grids.kernels(text)
  flops = sum(kernel.flops(sizes_E) for kernel in found)
  moved = sum(kernel.bytes(sizes_E) for kernel in found)
  rest_flops = cost["flops"] - sum(kernel.declared_flops for kernel in found)
  rest_bytes = traffic.moved(grids.lines(text), {kernel.name for kernel in found})
  products = grids.products(text)
  return {
    "useful_flops": useful,
    "declared_flops": cost["flops"],
    "flops": flops + rest_flops,
    "ratio": (flops + rest_flops) / useful,
    "declared_ratio": cost["flops"] / useful,
    "bytes": moved + rest_bytes,
    "product_bytes": moved,
    "declared_bytes": cost["bytes accessed"],
    "peak_bytes": memory.argument_size_in_bytes
    + memory.output_size_in_bytes
    + memory.temp_size_in_bytes
    - memory.alias_size_in_bytes,
    "temp_bytes": memory.temp_size_in_bytes,
    "kernels": [f"{k.blocks[0]} {k.blocks[1]} grid {k.grid}" for k in found],
    # Each expert's rows by its own matrix is an E-th of what a dense product makes.
    "dense": [p for p in products if p[1] > shape.flops(backward=False) / 3],
  }


def lowered(
  call: Callable[..., Any], shape: Shape, sharding: Any, *, backward: bool, logits: bool
) -> Any:
  """The layer on shapes: forward, or with the gradients of all that is not integer."""
  import jax
  import jax.numpy as jnp

  D, F, E, T = shape.d_model, shape.d_ff, shape.num_experts, shape.tokens

  def given(*size: int, dtype: Any = jnp.bfloat16) -> Any:
    return jax.ShapeDtypeStruct(size, dtype, sharding=sharding)

  wide = {name: given(E, D, F) for name in ("gate_EDF", "up_EDF")}
  inputs = [{**wide, "down_EFD": given(E, F, D)}, given(T, D)]
  if logits:
    inputs.append(given(T, E))
    last = []
  else:
    inputs.append(given(T, shape.k, dtype=jnp.float32))
    last = [given(T, shape.k, dtype=jnp.int32)]

  def step(dy_TD: Any, *inputs: Any) -> Any:
    y_TD, pull = jax.vjp(lambda *a: call(*a, *inputs[3:]), *inputs[:3])
    return y_TD, pull(dy_TD)

  if not backward:
    return jax.jit(call).lower(*inputs, *last)
  return jax.jit(step).lower(given(T, D), *inputs, *last)


def rows_of(shape: Shape, device: Any) -> dict[str, dict[str, Any]]:
  """What is compiled, by name: a call, where its operands are, group sizes."""
  import jax

  from experiments.benchmarks.peers import maxtext, ours
  from jmoe.kernels import devices, grouped_matmul
  from jmoe.use import use

  here = jax.sharding.SingleDeviceSharding(device)
  exact_E = np.bincount(
    shapes.routing(shape)[0].reshape(-1), minlength=shape.num_experts
  )
  as_tpu = lambda: devices.as_if("tpu")  # noqa: E731
  with as_tpu():
    block = devices.row_alignment("bfloat16", shape.tokens * shape.k / len(exact_E))
  whole_E = -(-exact_E // block) * block
  xla = use(grouped_matmul, implementation="ragged_dot", allow_dense=True)
  ragged_dot = jax.lax.ragged_dot
  common = dict(sharding=here, context=as_tpu, logits=False)
  rows: dict[str, dict[str, Any]] = {
    "jmoe": dict(call=ours.layer(shape), sizes=whole_E, **common),
    "jmoe, ragged_dot": dict(
      call=ours.layer(shape, matmul=xla), sizes=whole_E, **common
    ),
    "plain, ragged_dot": dict(
      call=ours.plain(shape, ragged_dot), sizes=exact_E, **common
    ),
  }
  if maxtext.present():
    call, sharding, context = maxtext.layer(shape, device)
    rows["MaxText"] = dict(
      call=call, sharding=sharding, context=context, logits=True, sizes=exact_E
    )
  return rows


def measured(row: dict[str, Any], shape: Shape) -> dict[str, Any]:
  """Forward and step of one row, or why the compiler refuses it."""
  found: dict[str, Any] = {}
  for kind in ("forward", "step"):
    backward = kind == "step"
    with contextlib.ExitStack() as stack:
      stack.enter_context(row["context"]())
      try:
        compiled = lowered(
          row["call"], shape, row["sharding"], backward=backward, logits=row["logits"]
        ).compile()
      except Exception as error:  # the compiler's own has many classes
        found[kind] = {"error": str(error).split("\n")[0][:300]}
        continue
    found[kind] = counted(compiled, shape, row["sizes"], backward=backward)
  return found


def main(argv: list[str] | None = None) -> int:
  """Runs a command line; returns its exit code."""
  parser = Parser(
    prog="python -m experiments.benchmarks.compiled_tpu",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  add = parser.add_argument
  add("--shape", required=True, choices=sorted(shapes.SHAPES), metavar="NAME")
  add("--topology", default="v5e:1x1", help="its first chip is compiled for")
  add("--only", nargs="*", help="names of rows; jmoe's own always runs")
  add("--out", type=Path, help="JSON file for the figures")
  arguments = parser.parse_args(argv)
  import jax

  shape = shapes.SHAPES[arguments.shape]
  try:
    device = chip(arguments.topology)
  except (RuntimeError, ValueError) as error:
    print(f"compiled_tpu: {arguments.topology}: {error}", file=sys.stderr)
    return 2
  rows = rows_of(shape, device)
  result: dict[str, Any] = {
    "shape": arguments.shape,
    "topology": arguments.topology,
    "device": device.device_kind,
    "versions": {
      name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "libtpu")
    },
    "command": "python -m experiments.benchmarks.compiled_tpu "
    f"--shape {arguments.shape} --topology {arguments.topology}",
    "rows": {},
  }
  print(f"{arguments.shape} on {device.device_kind}, jax {jax.__version__}")
  for name, row in rows.items():
    if arguments.only is not None and name not in ("jmoe", *arguments.only):
      continue
    result["rows"][name] = found = measured(row, shape)
    for kind in found:
      _show(name, kind, found[kind])
    if arguments.out:  # as they come: a row may take minutes, or for ever
      arguments.out.parent.mkdir(parents=True, exist_ok=True)
      arguments.out.write_text(json.dumps(result, indent=2) + "\n")
  if "MaxText" not in rows:
    print("MaxText             missing")
  return 3 if any(k.get("dense") for k in result["rows"]["jmoe"].values()) else 0


def _show(name: str, kind: str, found: dict[str, Any]) -> None:
  if "error" in found:
    print(f"{name:<19} {kind:<8} {found['error']}", flush=True)
    return
  print(
    f"{name:<19} {kind:<8}{found['useful_flops'] / 1e12:7.3f} TFLOP useful,"
    f"{found['ratio']:6.3f} x multiplied,{found['declared_ratio']:6.3f} x declared,"
    f"{found['bytes'] / 1e9:7.2f} GB moved, peak"
    f"{found['peak_bytes'] / 2**30:6.2f} GiB, {len(found['dense'])} dense",
    flush=True,
  )


if __name__ == "__main__":
  sys.exit(main())
