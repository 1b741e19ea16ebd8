"""A whole training step of OLMoE-1B-7B: jmoe beside transformers, in one run.

  python -m experiments.benchmarks.olmoe_step --out FILE.json
  python -m experiments.benchmarks.olmoe_step --peer none --keep hidden,most --table 40
  python -m experiments.benchmarks.olmoe_step --budget
  JAX_PLATFORMS=cpu python -m experiments.benchmarks.olmoe_step --tiny

16 layers, 6.92 billion parameters, four rows of 4096 random tokens, AdamW, parameters
and moments in bfloat16, the state donated.  Sides take turns, each in a process of its
own, for together they do not fit; within a process the step takes turns with 8192^3
products, whose median rate is the ceiling.  FLOPs are 6 for each token and active
parameter, without the embedding, and causal attention: the same for both sides.

  --keep     what jmoe's blocks keep for the backward pass: nothing (but their inputs),
             attention, hidden, most, all; several are measured in turn
  --peer     compiled, eager, checkpointed, sonic; or none
  --loop     scan over layers and update at the end, instead of each by itself
  --parity   compares a small model's logits with transformers' first (the default where
             there are peers)

jmoe also trains on the batch while it is timed: its loss must begin near the logarithm
of the vocabulary and fall.

Exit codes: 0 done, 2 bad arguments, 3 a result was wrong or did not come.
"""
# SPDX-License-Identifier: Apache-2.0

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from experiments.benchmarks.olmoe_step.size import TINY, Size
from experiments.benchmarks.olmoe_step.theirs import SETTINGS
from experiments.parser import Parser, run

KEEPS = ("nothing", "attention", "hidden", "most", "all")
_HERE = "experiments.benchmarks.olmoe_step"


def main(argv: list[str] | None = None) -> int:
  """Runs a command line; returns its exit code."""
  parser = Parser(
    prog=f"python -m {_HERE}",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  add = parser.add_argument
  add("--layers", type=int, help="of the model; 16")
  add("--tiny", action="store_true", help="a small model, to try this without a GPU")
  add("--keep", default="most", help="separated by commas")
  add("--peer", default="compiled,eager", help="separated by commas, or none")
  add("--turns", type=int, default=2, help="of all sides")
  add("--rounds", type=int, default=5, help="of ceiling and steps, in a turn")
  add("--chunk", type=int, help="tokens whose logits exist at once")
  add("--loop", action="store_true")
  add("--parity", action=argparse.BooleanOptionalAction, default=None)
  add("--budget", action="store_true", help="prints where memory goes; runs nothing")
  add("--table", type=int, default=0, metavar="N", help="operations to list")
  add("--limit", type=float, default=570, help="seconds that all of it may take")
  add("--torch-python", default=sys.executable, help="interpreter with transformers")
  add("--out", type=Path, help="JSON file for the figures, written as figures come")
  arguments = parser.parse_args(argv)
  size = TINY if arguments.tiny else Size()
  if arguments.layers is not None:
    size = dataclasses.replace(size, layers=arguments.layers)
  keeps = arguments.keep.split(",")
  peers = [] if arguments.peer == "none" else arguments.peer.split(",")
  for what, names, known in (("keep", keeps, KEEPS), ("peer", peers, SETTINGS)):
    for name in names:
      if name not in known:
        parser.error(f"--{what} {name}: use some of {', '.join(known)}")
  if arguments.budget:
    from experiments.benchmarks.olmoe_step import budget

    for keep in keeps:
      budget.shown(size, keep, loop=arguments.loop, chunk=arguments.chunk)
    return 0
  return _Session(arguments, size).measured(keeps, peers)


class _Session:
  """One run: what was asked for, what came out, and when it began."""

  def __init__(self, arguments: argparse.Namespace, size: Size):
    self.arguments, self.size = arguments, size
    self.begin = time.monotonic()
    self.folder = tempfile.TemporaryDirectory()
    # Later turns find what the first ones compiled.
    cache = Path(self.folder.name) / "compiled"
    self.environment = {
      "JAX_COMPILATION_CACHE_DIR": str(cache / "jax"),
      "TORCHINDUCTOR_CACHE_DIR": str(cache / "torch"),
      **os.environ,
    }
    self.found: dict[str, Any] = {
      "what": "training step of OLMoE-1B-7B",
      "command": " ".join([f"python -m {_HERE}", *_given(arguments)]),
      "size": dataclasses.asdict(size),
      "flops": size.flops,
      "turns": [],
    }

  def measured(self, keeps: list[str], peers: list[str]) -> int:
    arguments = self.arguments
    wanted = bool(peers) if arguments.parity is None else arguments.parity
    right = True
    if wanted:
      right = self._parity()
    for turn in range(arguments.turns):
      last = turn == arguments.turns - 1
      rows: list[dict[str, Any]] = []
      self.found["turns"].append(rows)
      for keep in keeps:
        rows.append(self._ours(keep, arguments.table if last else 0))
        self._save()
      for setting in peers:
        rows.append(self._theirs(setting))
        self._save()
      # Sonic-moe is a peer only where it is installed.
      came = [row for row in rows if "ms" in row or "sonic" not in row["what"]]
      right &= all(row.get("right", False) for row in came)
      self._compare(rows)
      self._save()
    self.folder.cleanup()
    return 0 if right else 3

  def _save(self) -> None:
    """What there is, so that a run that is cut off leaves it."""
    if out := self.arguments.out:
      out.parent.mkdir(parents=True, exist_ok=True)
      out.write_text(json.dumps(self.found, indent=2) + "\n")

  def _ours(self, keep: str, table: int) -> dict[str, Any]:
    words = ["--keep", keep, "--rounds", str(self.arguments.rounds)]
    if self.arguments.chunk:
      words += ["--chunk", str(self.arguments.chunk)]
    words += ["--loop"] * self.arguments.loop
    words += ["--table", str(table)] if table else []
    return self._row(f"jmoe, keeps {keep}", sys.executable, "ours", words)

  def _theirs(self, setting: str) -> dict[str, Any]:
    words = ["--setting", setting, "--rounds", str(self.arguments.rounds)]
    python = self.arguments.torch_python
    return self._row(f"transformers {setting}", python, "theirs", words)

  def _parity(self) -> bool:
    """Two small layers with equal weights, in float32."""
    file = Path(self.folder.name) / "parity.npz"
    small = dataclasses.replace(TINY, layers=2)
    python = self.arguments.torch_python
    made = self._process(python, "theirs", ["--parity"], file, small)
    row = made
    if "error" not in made:
      words = ["--parity", str(file)]
      row = self._process(sys.executable, "ours", words, None, small)
    self.found["parity"] = row
    print(f"parity: {row.get('error') or _parity_said(row)}", flush=True)
    return row.get("right", False)

  def _row(self, what: str, python: str, module: str, words: list[str]):
    row = self._process(python, module, words, None, self.size)
    row.setdefault("what", what)
    if "ms" in row:
      rate = self.size.flops / row["ms"] * 1e3
      row["tokens_per_second"] = self.size.tokens / row["ms"] * 1e3
      row["tflops"] = rate / 1e12
      row["ceiling_tflops"] = statistics.median(row["ceilings_tflops"])
      row["share"] = row["tflops"] / row["ceiling_tflops"]
    _show(row)
    return row

  def _process(
    self, python: str, module: str, words: list[str], out: Path | None, size: Size
  ) -> dict[str, Any]:
    """What a process wrote, or how it ended."""
    left = self.arguments.limit - (time.monotonic() - self.begin)
    if left <= 0:
      return {"error": f"not begun after {self.arguments.limit:.0f} s"}
    file = out or Path(self.folder.name) / "found.json"
    file.unlink(missing_ok=True)
    command = [python, "-m", f"{_HERE}.{module}", *words]
    command += ["--size", json.dumps(dataclasses.asdict(size)), "--out", str(file)]
    # Logits are compared on the host, in float32; kernels have tests of their own.
    host = {"JAX_PLATFORMS": "cpu"} if "--parity" in words else {}
    try:
      done = subprocess.run(
        command,
        env=self.environment | host,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        timeout=left,
      )
    except subprocess.TimeoutExpired:
      return {"error": f"stopped after {self.arguments.limit:.0f} s of the run"}
    if done.returncode or not file.exists():
      print(done.stderr[-4000:], file=sys.stderr)
      lines = done.stderr.strip().splitlines() or ["nothing said"]
      return {"error": f"exit code {done.returncode}: {lines[-1][:300]}"}
    return {} if out else json.loads(file.read_text())

  def _compare(self, rows: list[dict[str, Any]]) -> None:
    """The fastest of each side, of one turn."""
    speeds = {}
    for row in rows:
      if "tokens_per_second" in row:
        side = row["what"].split()[0].rstrip(",")
        speeds[side] = max(speeds.get(side, 0), row["tokens_per_second"])
    if len(speeds) == 2:
      ratio = speeds["jmoe"] / speeds["transformers"]
      self.found.setdefault("ratios", []).append(ratio)
      print(f"  jmoe's tokens/s are {ratio:.3f} of transformers' fastest", flush=True)


def _given(arguments: argparse.Namespace) -> list[str]:
  """The options that change a figure."""
  words = []
  for name in ("layers", "keep", "peer", "turns", "rounds", "chunk", "table"):
    value = getattr(arguments, name)
    if value is not None and value != 0:
      words += [f"--{name}", str(value)]
  return words + ["--tiny"] * arguments.tiny + ["--loop"] * arguments.loop


def _parity_said(row: dict[str, Any]) -> str:
  ours, theirs = row["losses"]
  return (
    f"logits differ by {row['gap']:.1e} of the largest, losses {ours:.6f} and "
    f"{theirs:.6f}"
  )


def _show(row: dict[str, Any]) -> None:
  if "error" in row:
    print(f"{row['what']:<28} {row['error']}", flush=True)
    return
  times, losses = row["ms_all"], row["losses"]
  print(
    f"{row['what']:<28}{row['ms']:9.1f} ms ({min(times):.1f} to {max(times):.1f})"
    f"{row['tokens_per_second'] / 1e3:8.2f}k tokens/s{row['tflops']:8.1f} TFLOP/s,"
    f" {row['share']:.3f} of {row['ceiling_tflops']:.0f}; {row['peak_gb']:.1f} GB; "
    f"loss {losses[0]:.3f} to {losses[-1]:.3f}" + ("" if row["right"] else "  WRONG"),
    flush=True,
  )
  if "compiled_gb" in row:
    parts = row["compiled_gb"]
    print(
      f"{'':<28}compiled in {row['compile_s']:.0f} s: arguments "
      f"{parts['arguments']:.1f}, temporaries {parts['temporaries']:.1f}, results of "
      f"their own {parts['outputs_of_their_own']:.1f} GB",
      flush=True,
    )


if __name__ == "__main__":
  run(main)
