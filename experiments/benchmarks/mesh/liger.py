"""liger-cute-kernels' expert-parallel layer as a row, one process for each GPU.

`--liger-site DIR` is a folder with its wheel and those it needs unpacked; torch is
taken from the machine, of any CUDA.  The wheel wants libcudart.so.12 and NVSHMEM 3.6.5.
On Hopper `libliger_cute_kernels_sm100f.so` may be left out, and of NVSHMEM all but
`libnvshmem_host.so.3` and `nvshmem_bootstrap_uid.so.3`.

  get="pip download --no-deps --python-version 3.12 --only-binary=:all: -d W"
  $get --platform manylinux_2_35_x86_64 liger-cute-kernels==0.8.5
  $get --platform manylinux_2_28_x86_64 apache-tvm-ffi
  $get --platform manylinux2014_x86_64 nvidia-nvshmem-cu12==3.6.5
  $get --platform manylinux2014_x86_64 nvidia-cuda-runtime-cu12
  for w in W/*.whl; do unzip -q -d DIR $w; done
"""
# SPDX-License-Identifier: Apache-2.0

import dataclasses
import json
import os
from pathlib import Path

from experiments.benchmarks.peers import remote, rows
from experiments.benchmarks.shapes import Shape

NAME = "liger-cute-kernels"
_PATIENCE = 120.0


class Peer:
  """Its processes, from the start: they load and compile while others do."""

  def __init__(self, shape: Shape, n: int, site: Path | None, *, dry: bool = False):
    self.why: str | None = None
    if site is None:
      self.why = "--liger-site is not given"
    elif not (site / "liger_cute_kernels").is_dir():
      self.why = f"--liger-site {site} has no folder liger_cute_kernels"
    if site is None or self.why:
      return
    words = (
      *("experiments.benchmarks.mesh.liger_worker", "--world", str(n)),
      *("--shape", json.dumps(dataclasses.asdict(shape)), *["--dry"] * dry),
    )
    before = dict(os.environ)
    site = site.resolve()
    path = [str(site), os.getcwd(), *filter(None, [before.get("PYTHONPATH")])]
    os.environ["PYTHONPATH"] = os.pathsep.join(path)
    found = [str(lib) for lib in site.glob("nvidia/*/lib")]
    found += [str(site / "tvm_ffi" / "lib")]
    known = filter(None, [before.get("LD_LIBRARY_PATH")])
    os.environ["LD_LIBRARY_PATH"] = os.pathsep.join([*found, *known])
    # NVLink multicast stays off; the heap of rows is made once.  Nothing leaves the
    # host, and a library for that which is missing would end NVSHMEM.
    os.environ.setdefault("NVSHMEM_REMOTE_TRANSPORT", "none")
    os.environ.setdefault("NVSHMEM_DISABLE_NVLS", "1")
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
    os.environ.setdefault("NVSHMEM_SYMMETRIC_SIZE", str(_heap(shape)))
    try:
      self._worker = remote.Worker("", NAME, "", words)
    finally:
      os.environ.clear()
      os.environ.update(before)

  def row(self, routing: str) -> rows.Row | rows.Missing:
    """Built with a routing; the row serves until the next one is asked for."""
    if self.why:
      return rows.Missing(NAME, self.why)
    try:
      figures = self._worker.ask(_PATIENCE, do="build", routing=routing)["figures"]
    except RuntimeError as error:
      self.why = str(error)
      return rows.Missing(NAME, self.why)

    def timed(kind: str, budget: float) -> float:
      return self._worker.ask(60.0, do="time", kind=kind, budget=budget)["ms"]

    try:
      figures["forward_ms"] = [timed("forward", rows.TURN) for _ in range(4)][1:]
    except RuntimeError as error:
      self.why = str(error)
      return rows.Missing(NAME, self.why)
    return rows.Row(NAME, timed, figures)

  def close(self) -> None:
    if worker := getattr(self, "_worker", None):
      worker.close()


def _heap(shape: Shape) -> int:
  """Bytes of the symmetric heap: six arrays of rows, padding of experts included."""
  slots = shape.tokens * shape.k + 128 * shape.num_experts
  return max(2**30, 6 * 2 * slots * shape.d_model)
