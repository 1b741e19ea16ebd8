"""The processes of a liger-cute-kernels row: rank 0 answers requests, all ranks work.

Requests and answers are those of `peers.worker`; "build" has a "routing" too.
"""
# SPDX-License-Identifier: Apache-2.0

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from typing import Any

from experiments.benchmarks import shapes
from experiments.benchmarks.peers import rows
from experiments.benchmarks.shapes import Shape


def main() -> int:
  parser = argparse.ArgumentParser()
  parser.add_argument("--world", type=int, required=True)
  parser.add_argument("--rank", type=int, default=0)
  parser.add_argument("--shape", required=True)
  parser.add_argument("--store")
  parser.add_argument("--dry", action="store_true")
  arguments = parser.parse_args()
  # What libraries print must not be taken for an answer.
  answers = os.fdopen(os.dup(1), "w")
  os.dup2(2, 1)
  others = _others(arguments) if arguments.rank == 0 else []
  waiting = [False]  # whether a request has no answer yet
  try:
    return _serve(arguments, answers, waiting)
  except BaseException as error:  # of somebody else's code: any
    if arguments.rank == 0:
      if not waiting[0]:
        sys.stdin.readline()
      _answer(answers, {"why": rows.reason(error)})
    return 1
  finally:
    for process in others:
      process.kill()
      process.wait()


def _others(arguments: argparse.Namespace) -> list[subprocess.Popen]:
  """The other ranks; they meet in a file."""
  arguments.store = tempfile.mktemp(prefix="liger-store-")
  module = "experiments.benchmarks.mesh.liger_worker"
  words = [sys.executable, "-m", module, "--world", str(arguments.world)]
  words += ["--shape", arguments.shape, "--store", arguments.store]
  words += ["--dry"] * arguments.dry
  return [
    subprocess.Popen([*words, "--rank", str(rank)], stdin=subprocess.DEVNULL)
    for rank in range(1, arguments.world)
  ]


def _answer(answers: Any, answer: dict[str, Any]) -> None:
  answers.write(json.dumps(answer) + "\n")
  answers.flush()


def _serve(arguments: argparse.Namespace, answers: Any, waiting: list[bool]) -> int:
  """Requests, told to all ranks; a rank that fails ends all of them."""
  import torch  # pyright: ignore[reportMissingImports]
  import torch.distributed as dist  # pyright: ignore[reportMissingImports]

  rank, world = arguments.rank, arguments.world
  if torch.cuda.is_available():
    torch.cuda.set_device(rank)
  backend = "gloo" if arguments.dry else "cpu:gloo,cuda:nccl"
  dist.init_process_group(
    backend, init_method=f"file://{arguments.store}", rank=rank, world_size=world
  )
  bench = _Bench(Shape(**json.loads(arguments.shape)), rank, world, arguments.dry)
  while True:
    asked: list[Any] = [None]
    if rank == 0:
      line = sys.stdin.readline()
      waiting[0] = bool(line)
      asked = [json.loads(line) if line else None]
    dist.broadcast_object_list(asked, 0)
    if asked[0] is None:
      return 0
    if asked[0]["do"] == "build":
      answer = {"figures": bench.build(asked[0]["routing"])}
    else:
      answer = {"ms": bench.timed(asked[0]["kind"], asked[0]["budget"])}
    if rank == 0:
      _answer(answers, answer)
      waiting[0] = False


class _Bench:
  """One rank's arrays and calls.

  Gate, up and down matrices are [E/n,F,D], [E/n,F,D] and [E/n,D,F]; any rank can make
  those of any expert, to compare results with.
  """

  def __init__(self, shape: Shape, rank: int, world: int, dry: bool):
    import torch  # pyright: ignore[reportMissingImports]

    self.shape, self.rank, self.world = shape, rank, world
    self.device = "cpu" if dry else f"cuda:{rank}"
    own = range(
      shape.num_experts // world * rank, shape.num_experts // world * (rank + 1)
    )
    made = [self._expert(e) for e in own]
    self.gate, self.up, self.down = (
      torch.stack([m[i] for m in made]) for i in range(3)
    )
    del made
    self.x, self.dy = (self._draw(10**6 * (i + 1) + rank, shape.tokens, shape.d_model)
                       for i in range(2))  # fmt: skip
    if dry:
      return
    from liger_cute_kernels import (  # pyright: ignore[reportMissingImports]
      nvshmem,
      tvm_ffi,
    )

    self.library = tvm_ffi
    nvshmem.init_from_pg()
    self.team = nvshmem.team_world()
    tvm_ffi.moe_configure_symmetric(
      max_tokens=shape.tokens,
      hidden_dim=shape.d_model,
      max_num_experts=shape.num_experts,
      max_top_k=shape.k,
      num_pes=world,
      num_hosts=1,
      gpus_per_host=world,
    )

  def _draw(self, seed: int, *size: int, scale: float = 1.0) -> Any:
    import torch  # pyright: ignore[reportMissingImports]

    made = torch.Generator(self.device).manual_seed(seed)
    drawn = torch.randn(
      size, generator=made, device=self.device, dtype=torch.bfloat16
    )  # fmt: skip
    return drawn.mul_(scale)

  def _expert(self, e: int) -> tuple[Any, Any, Any]:
    D, F = self.shape.d_model, self.shape.d_ff
    return (
      self._draw(3 * e, F, D, scale=D**-0.5),
      self._draw(3 * e + 1, F, D, scale=D**-0.5),
      self._draw(3 * e + 2, D, F, scale=F**-0.5),
    )

  def build(self, routing: str) -> dict[str, Any]:
    """Choices of all devices' tokens, of which a rank takes its own; then one step."""
    import torch  # pyright: ignore[reportMissingImports]

    T = self.shape.tokens
    whole = dataclasses.replace(self.shape, tokens=T * self.world)
    made = shapes.balanced if routing == "balanced" else shapes.routing
    own = slice(T * self.rank, T * (self.rank + 1))
    expert_TK, weight_TK = (
      torch.as_tensor(a[own]).to(self.device) for a in made(whole)
    )
    self.expert, self.weight = expert_TK.contiguous(), weight_TK.to(torch.bfloat16)
    begin = time.perf_counter()
    y, grads = self._step()
    self._wait()
    figures: dict[str, Any] = {"compile_s": time.perf_counter() - begin, "dropped": 0.0}
    figures |= self._errors(y, grads)
    free, total = (0, 0) if self.device == "cpu" else torch.cuda.mem_get_info()
    return figures | {"gb": (total - free) / 1e9, "matrix_error": 0.0}

  def _forward(self) -> Any:
    if self.device == "cpu":
      return self._plain()
    return self.library.moe_fused_fwd_bf16(
      self.x,
      self.expert,
      self.weight,
      self.gate,
      self.up,
      self.down,
      num_experts=self.shape.num_experts,
      top_k=self.shape.k,
      team_handle=self.team,
    )

  def forward(self) -> None:
    self._forward()
    if self.device != "cpu":
      self.library.moe_pop_fwd()

  def _step(self) -> tuple[Any, Any]:
    """(y, (dx, dgate, dup, ddown, dweight))"""
    out = self._forward()
    if self.device == "cpu":
      return out
    y, rows_in, rows_out, offsets, slots, tiles, tile = out
    grads = self.library.moe_fused_bwd_bf16(
      self.dy,
      rows_out,
      rows_in,
      slots,
      tiles,
      offsets,
      self.expert,
      self.weight,
      self.gate,
      self.up,
      self.down,
      num_experts=self.shape.num_experts,
      top_k=self.shape.k,
      team_handle=self.team,
      fwd_tile_m=tile,
    )
    self.library.moe_pop_fwd()
    return y, grads

  def _plain(self) -> tuple[Any, Any]:
    """Some tokens' results by `_exact`, where there is no GPU: to try the processes."""
    import torch  # pyright: ignore[reportMissingImports]

    y, dx = torch.zeros_like(self.x), torch.zeros_like(self.x)
    dweight = torch.zeros_like(self.weight)
    for t in rows.tokens(self.shape):
      for array, value in zip((y, dx, dweight), self._exact(t), strict=True):
        array[t] = value.to(array.dtype)
    return y, (dx, None, None, None, dweight)

  def timed(self, kind: str, budget: float) -> float:
    """Milliseconds of a call on the slowest rank; all ranks make as many calls."""
    import torch  # pyright: ignore[reportMissingImports]
    import torch.distributed as dist  # pyright: ignore[reportMissingImports]

    call = self.forward if kind == "forward" else self._step

    def spent(count: int) -> float:
      dist.barrier()
      begin = time.perf_counter()
      for _ in range(count):
        call()
      self._wait()
      took = torch.tensor([time.perf_counter() - begin], dtype=torch.float64)
      dist.all_reduce(took, dist.ReduceOp.MAX)
      return float(took[0]) / count

    spent(1)
    once = spent(1)
    if once > budget:
      return 1e3 * once
    return 1e3 * spent(max(2, round(budget / once)))

  def _wait(self) -> None:
    import torch  # pyright: ignore[reportMissingImports]

    if self.device != "cpu":
      torch.cuda.synchronize()

  def _errors(self, y: Any, grads: Any) -> dict[str, float]:
    """Of some of this rank's tokens, against float32; the worst of all ranks."""
    import torch  # pyright: ignore[reportMissingImports]
    import torch.distributed as dist  # pyright: ignore[reportMissingImports]

    worst = torch.zeros(2, dtype=torch.float64)
    dx, dweight = grads[0], grads[-1]
    for t in rows.tokens(self.shape):
      found = (y[t], dx[t], dweight[t])
      gaps = [
        float(torch.linalg.vector_norm(one.float() - other)
              / torch.linalg.vector_norm(other))
        for one, other in zip(found, self._exact(t), strict=True)
      ]  # fmt: skip
      worst = torch.maximum(worst, torch.tensor([gaps[0], max(gaps[1:])]).double())
    dist.all_reduce(worst, dist.ReduceOp.MAX)
    return {"error": float(worst[0]), "gradient_error": float(worst[1])}

  def _exact(self, t: int) -> tuple[Any, Any, Any]:
    """(y_D, dx_D, dweight_K) of a token in float32."""
    import torch  # pyright: ignore[reportMissingImports]

    x = self.x[t].float().requires_grad_()
    weight = self.weight[t].float().requires_grad_()
    parts = [self._expert(int(e)) for e in self.expert[t]]
    gate, up, down = (torch.stack([p[i] for p in parts]).float() for i in range(3))
    hidden = torch.nn.functional.silu(gate @ x) * (up @ x)
    y = torch.einsum("k,kdf,kf->d", weight, down, hidden)
    return (y.detach(), *torch.autograd.grad(y, (x, weight), self.dy[t].float()))


if __name__ == "__main__":
  sys.exit(main())
