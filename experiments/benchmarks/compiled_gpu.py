"""Memory of a sparse layer's step on an H200, by the compiler alone: no GPU is needed.

  python -m experiments.benchmarks.compiled_gpu --shape qwen3

The layer of `benchmarks.peers`, forward and all gradients, compiled for an H200 that is
only described.  Arguments, results and temporaries are what `memory_analysis` says; as
results have their places from the beginning, other programs' peaks, which count a
gradient when it is made, may be lower for the same arrays.  Needs jax's CUDA plugin
(`pip install jax-cuda12-plugin jax-cuda12-pjrt`, of jax's version) beside jax 0.11.

Exit codes: 0 done, 2 bad arguments or no plugin.
"""
# SPDX-License-Identifier: Apache-2.0

import argparse
import contextlib
import json
import os
import sys
from pathlib import Path
from typing import Any

from experiments.benchmarks import shapes
from experiments.parser import Parser

H200 = """
gpu_device_info {
  cuda_compute_capability { major: 9 } core_count: 132 fpus_per_core: 128
  clock_rate_ghz: 1.98 memory_bandwidth: 4800000000000 l2_cache_size: 62914560
  device_memory_size: 150000000000 threads_per_warp: 32 threads_per_block_limit: 1024
  threads_per_core_limit: 2048 shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448 shared_memory_per_core: 233472
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 8 }
runtime_version { major: 12 minor: 8 }
device_description_str: "NVIDIA H200"
"""
WAYS: dict[str, dict[str, Any]] = {
  "dropless": {},
  "dropless, rows kept": dict(keep="rows"),
  "dropless, made anew": dict(keep="inputs"),
  "capacity 1.25": dict(capacity_factor=1.25),
}


def main(argv: list[str] | None = None) -> int:
  """Runs a command line; returns its exit code."""
  parser = Parser(
    prog="python -m experiments.benchmarks.compiled_gpu",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  add = parser.add_argument
  add("--shape", required=True, choices=sorted(shapes.SHAPES), metavar="NAME")
  add("--out", type=Path, help="JSON file for the figures")
  arguments = parser.parse_args(argv)
  os.environ.setdefault("JAX_PLATFORMS", "cpu")
  import jax

  try:
    here = described()
  except RuntimeError as e:
    print(f"error: {e}", file=sys.stderr)
    return 2
  shape, rows = shapes.SHAPES[arguments.shape], []
  for name, fields in WAYS.items():
    rows.append({"name": name, **compiled(shape, here, **fields)})
    row = rows[-1]
    print(
      f"{name:<22}{row['gb']:7.2f} GB (arguments {row['arguments_gb']:.2f}, results "
      f"{row['results_gb']:.2f}, temporaries {row['temporaries_gb']:.2f})",
      flush=True,
    )
  if arguments.out:
    found = {
      "shape": arguments.shape,
      "command": "python -m experiments.benchmarks.compiled_gpu --shape "
      f"{arguments.shape}",
      "device": "compiled for NVIDIA H200, not run",
      "jax": jax.__version__,
      "rows": rows,
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(found, indent=2) + "\n")
  return 0


def described() -> Any:
  """The sharding of arrays on one H200 that is only described.

  Raises:
    RuntimeError: jax has no plugin that compiles for it.
  """
  import jax
  from jax.experimental import topologies

  try:
    topology = topologies.get_topology_desc(
      platform="cuda", target_config=H200, topology="1x1x1"
    )
  except Exception as e:  # whatever jax says of a plugin that is not there
    reason = " ".join(str(e).split())[:200]
    raise RuntimeError(f"jax has no CUDA plugin to compile with ({reason})") from e
  mesh = topologies.make_mesh(topology, (1,), ("x",))
  return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())


def compiled(shape: shapes.Shape, here: Any, **fields: Any) -> dict[str, float]:
  """GB of a step's arguments, results, temporaries, and of all of them.

  Args:
    shape: of the layer.
    here: from `described`.
    fields: of `ours.layer`.
  """
  import jax
  import jax.numpy as jnp

  from experiments.benchmarks.peers import ours

  def struct(a):
    return jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=here)

  layer = ours.layer(shape, **fields)
  params, x = jax.tree.map(struct, jax.eval_shape(lambda: ours.operands(shape)))
  choices = shape.tokens, shape.k
  weight = struct(jax.ShapeDtypeStruct(choices, jnp.float32))
  expert = struct(jax.ShapeDtypeStruct(choices, jnp.int32))

  def step(params, x, weight, dy, expert):
    y, pull = jax.vjp(lambda p, x, w: layer(p, x, w, expert), params, x, weight)
    y, dy = jax.lax.optimization_barrier((y, dy))  # as in `peers`
    return y, pull(dy)

  with as_hopper():
    traced = jax.jit(step).trace(params, x, weight, x, expert)
    memory: Any = traced.lower().compile().memory_analysis()
  found = {
    "arguments_gb": memory.argument_size_in_bytes / 1e9,
    "results_gb": memory.output_size_in_bytes / 1e9,
    "temporaries_gb": memory.temp_size_in_bytes / 1e9,
  }
  return {"gb": sum(found.values()), **found}


def as_hopper() -> contextlib.ExitStack:
  """For jmoe's choices and for Pallas, which asks what it compiles for."""
  import jax

  from jmoe.kernels import devices

  stack = contextlib.ExitStack()
  stack.enter_context(devices.as_if("hopper"))
  device = jax.sharding.AbstractDevice(
    device_kind="NVIDIA H200", num_cores=132, platform="cuda"
  )
  mesh = jax.sharding.AbstractMesh((), (), abstract_device=device)
  stack.enter_context(jax.sharding.use_abstract_mesh(mesh))
  return stack


if __name__ == "__main__":
  sys.exit(main())
