"""A sparse layer of a published shape, jmoe's beside other libraries', in one run.

  python -m experiments.benchmarks.peers --shape qwen3
  python -m experiments.benchmarks.peers --shape qwen3 --list
  python -m experiments.benchmarks.peers --tune-sonic

Random bfloat16 operands, skewed routing that is given (`benchmarks.shapes`), SwiGLU
experts.  Forward, and forward with the gradients of the input, the matrices and the
routing weights.  The bound is the rate of 8192^3 products, measured between the rows;
FLOPs are those of the choices, so that padding counts as lost, and drops as done.  For
four tokens the output and the gradients are compared with float32.

  jmoe dropless, jmoe capacity 1.25   the layer
  plain, NAME                         sort, three ragged products, sort back, as other
                                      libraries' layers are
  jax's mgpu kernels, tokamax         the same, gathers instead of scatters in gradients
  torch ..., transformers ...         PyTorch, each in a process of its own
  scattermoe-style                    Triton kernels in the manner of ScatterMoE
  sonic-moe                           with tiles that were found beforehand

A row that cannot run here is listed with the reason.

Exit codes: 0 done, 2 bad arguments, 3 a result was wrong or one of jmoe's is missing.
"""
# SPDX-License-Identifier: Apache-2.0

import argparse
import importlib
import json
import os
import statistics
import sys
from pathlib import Path
from typing import Any

from experiments.benchmarks import shapes, tracing
from experiments.benchmarks.peers import remote, rows
from experiments.parser import Parser

_HERE = "experiments.benchmarks.peers."
# Modules of this process, and names of the rows that processes of their own serve.
JAX = ("ours", "mgpu", "tokamax")
TORCH = {
  "torch grouped_mm": "torch_layers",
  "torch grouped_mm, compiled": "torch_layers",
  "transformers experts": "torch_layers",
  "scattermoe-style": "scatter",
  "sonic-moe": "sonic",
}
_FULL = ("resource_exhausted", "out of memory", "outofmemory")  # worth a second try


def main(argv: list[str] | None = None) -> int:
  """Runs a command line; returns its exit code."""
  parser = Parser(
    prog="python -m experiments.benchmarks.peers",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  add = parser.add_argument
  add("--shape", choices=sorted(shapes.SHAPES), metavar="NAME")
  add("--rounds", type=int, default=5)
  add("--only", nargs="*", metavar="PART", help="rows whose names have a part of these")
  add("--patience", type=float, default=240.0, help="seconds for a process to compile")
  add("--list", action="store_true", help="the rows, and why some cannot run here")
  add("--legs", action="store_true", help="also the six products of a layer alone")
  add("--table", type=int, default=0, metavar="N", help="operations to list")
  add("--tune-sonic", action="store_true", help="print tiles; of one shape, or of all")
  add("--out", type=Path, help="JSON file for the figures")
  arguments = parser.parse_args(argv)
  if arguments.tune_sonic:
    return _tune(arguments)
  if not arguments.shape:
    parser.error("--shape is missing; give one of " + ", ".join(shapes.SHAPES))
  if arguments.table:
    tracing.prepare()
  # Several processes share the device: none may take all of its memory at once.
  os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
  os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.45")
  if arguments.list:
    return _list(arguments)
  return _measured(arguments)


def _chosen(name: str, arguments: argparse.Namespace) -> bool:
  return not arguments.only or any(part in name for part in arguments.only)


def _here(arguments: argparse.Namespace) -> list[tuple[str, Any]]:
  """(name, module) of the rows of this process."""
  modules = [importlib.import_module(_HERE + name) for name in JAX]
  pairs = [(name, module) for module in modules for name in module.LAYERS]
  return [(name, module) for name, module in pairs if _chosen(name, arguments)]


def _workers(arguments: argparse.Namespace) -> dict[str, remote.Worker]:
  """A process for each of the other rows."""
  names = [name for name in TORCH if _chosen(name, arguments)]
  return {n: remote.Worker(_HERE + TORCH[n], n, arguments.shape) for n in names}


def _list(arguments: argparse.Namespace) -> int:
  """Every row, and whether it can run here; measures nothing."""
  workers = _workers(arguments)
  whys = {name: module.missing(name) for name, module in _here(arguments)}
  for name, worker in workers.items():
    try:
      whys[name] = worker.ask(arguments.patience, do="missing")["why"]
    except RuntimeError as error:
      whys[name] = str(error)
    worker.close()
  for name, why in whys.items():
    print(f"{name:<28}{f'missing: {why}' if why else 'here'}")
  return 0


def _measured(arguments: argparse.Namespace) -> int:
  workers = _workers(arguments)
  try:
    built = _built(arguments, workers)
    ready = [row for row in built if isinstance(row, rows.Row)]
    ceilings = rows.in_turn(
      ready, lambda: shapes.ceiling(repeats=1), arguments.rounds, rows.TURN
    )
  finally:
    for worker in workers.values():
      worker.close()
  shape = shapes.SHAPES[arguments.shape]
  bound = statistics.median(ceilings) if ceilings else shapes.ceiling()
  found = [rows.summed_up(row, shape, bound) for row in ready if not row.why]
  missing = {row.name: row.why for row in built if row.why}
  for row in found:
    print(rows.shown(row), flush=True)
  for name, why in missing.items():
    print(f"{name:<28}missing: {why}")
  print(f"ceiling {bound / 1e12:.0f} TFLOP/s")
  result = _result(arguments, ceilings) | {"rows": found, "missing": missing}
  if arguments.table:
    for row, entry in ((r, e) for r in ready for e in found if e["name"] == r.name):
      if row.traced:
        step, given = row.traced["step"]
        print(row.name)
        entry["table"] = tracing.shown(step, given, arguments.table)
  if arguments.legs:
    from experiments.benchmarks.peers import legs

    result["legs"] = legs.measured(shape, shapes.routing(shape)[0])
    for name, rate in result["legs"].items():
      print(f"  {name:<12}{rate / 1e12:7.0f} TFLOP/s{rate / bound:7.3f}", flush=True)
  if arguments.out:
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=2) + "\n")
  ours = [name for name in missing if name.startswith("jmoe")]
  for said, names in (("wrong result of", rows.wrong(found)), ("no result of", ours)):
    if names:
      print(f"error: {said} {', '.join(names)}", file=sys.stderr)
  return 3 if ours or rows.wrong(found) else 0


def _built(
  arguments: argparse.Namespace, workers: dict[str, remote.Worker]
) -> list[rows.Row | rows.Missing]:
  """All rows; other processes compile while this one does.

  What ran out of memory beside the others is built once more when they have finished.
  """
  from experiments.benchmarks.peers import jax_rows

  shape, patience = shapes.SHAPES[arguments.shape], arguments.patience

  def here(name: str, module: Any) -> rows.Row | rows.Missing:
    if why := module.missing(name):
      return rows.Missing(name, why)
    return said(jax_rows.row(name, module.LAYERS[name], shape))

  def said(row: rows.Row | rows.Missing) -> rows.Row | rows.Missing:
    print(f"{row.name}: {row.why or 'built'}", file=sys.stderr, flush=True)
    return row

  for worker in workers.values():
    worker.send(do="build")
  modules = dict(_here(arguments))
  built = {name: here(name, module) for name, module in modules.items()}
  built |= {name: said(worker.built(patience)) for name, worker in workers.items()}
  for name, row in built.items():
    if row.why and any(said in row.why.lower() for said in _FULL):
      if name in modules:
        built[name] = here(name, modules[name])
      else:
        workers[name].send(do="build")
        built[name] = workers[name].built(patience)
  return list(built.values())


def _result(arguments: argparse.Namespace, ceilings: list[float]) -> dict[str, Any]:
  """What was run, where, and the bounds."""
  import jax

  only = f" --only {' '.join(arguments.only)}" if arguments.only else ""
  return {
    "shape": arguments.shape,
    "command": f"python -m experiments.benchmarks.peers --shape {arguments.shape} "
    f"--rounds {arguments.rounds}{only}",
    "device": jax.devices()[0].device_kind,
    "versions": _versions(),
    "ceilings_tflops": [rate / 1e12 for rate in ceilings],
  }


def _versions() -> dict[str, str]:
  """Of the packages that are compared, as far as they are installed."""
  from importlib import metadata

  found = {}
  for name in ("jax", "torch", "triton", "transformers", "tokamax", "sonic-moe"):
    try:
      found[name] = metadata.version(name)
    except metadata.PackageNotFoundError:
      continue
  return found


def _tune(arguments: argparse.Namespace) -> int:
  """Times a few tiles for each product of sonic-moe; prints the table to ship."""
  from experiments.benchmarks.peers import sonic_tiles

  names = (
    [arguments.shape] if arguments.shape else ["mixtral", "qwen3", "olmoe", "dsv3"]
  )
  table = {}
  for name in names:
    worker = remote.Worker(_HERE + "sonic", "sonic-moe", name)
    try:
      worker.send(do="missing")
      worker.receive(arguments.patience)
      # Its first shape compiles every candidate; others find them in quack's cache.
      tiles = worker.ask(3 * arguments.patience, do="tune")["tiles"]
    except RuntimeError as error:
      print(f"error: sonic-moe on {name}: {error}", file=sys.stderr)
      return 2
    finally:
      worker.close()
    table[name] = {leg: sonic_tiles.Tile.of(tile) for leg, tile in tiles.items()}
    print(sonic_tiles.printed(table), flush=True)
  return 0


if __name__ == "__main__":
  sys.exit(main())
