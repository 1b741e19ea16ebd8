"""What the one call runs: commands of `mesh` and `mesh_train`, in order of wish."""
# SPDX-License-Identifier: Apache-2.0

import os
from pathlib import Path

from experiments.benchmarks.mesh_all.together import Part

LAYER, TRAIN = "experiments.benchmarks.mesh", "experiments.benchmarks.mesh_train"
SHAPES = ("qwen3", "mixtral", "olmoe", "dsv3", "dsv3-256")
_EXCHANGES = (
  "all_gather,all_to_all,ragged_all_to_all,hierarchical,deduplicated"
  ",all_gather own first,all_to_all own first"
)
_PEER_TOKENS = 8192  # of a GPU, as in the chart of liger-cute-kernels


def parts(
  gpus: int, folder: Path, *, dry: bool = False, liger_site: Path | None = None
) -> list[Part]:
  """The commands, in the order in which they are measured.

  Seconds are those of their figures; all parts compile at once.

  Args:
    gpus: of the host, a power of two.
    folder: for results and locks.
    dry: on host devices.
    liger_site: as `mesh` takes it; None: without that peer.
  """
  made: list[Part] = []

  def add(name: str, seconds: float, module: str, *words: str) -> None:
    given = (module, "--gpus", str(gpus), *words, *["--dry"] * dry)
    files = ("--turn", str(folder / f"{name}.turn"), "--out", str(folder / name))
    made.append(Part(name, (*given, *files[:-1], f"{files[-1]}.json"), seconds))

  def layers(name: str, seconds: float, *words: str) -> None:
    threads = ("--threads", str(max(2, (os.cpu_count() or 1) // 8)))
    spent = ("--limit", "400", "--measuring", str(seconds), "--rounds", "3", *threads)
    if dry:  # all that is asked for, however long a CPU takes
      spent = ("--limit", "3600", "--rounds", "1")
    add(name, seconds, LAYER, *words, *spent)

  def training(name: str, seconds: float, model: str, *words: str) -> None:
    rounds = ("--rounds", "1" if dry else "3", "--limit", "300")
    # Layers apart are faster, but all parts compile at once, and they for minutes.
    add(name, seconds, TRAIN, "--model", model, "--loop", *words, *rounds)

  whole, steps = f"fsdp={gpus}", ("--checkpoint-layers", "0")
  tokens = ("--tokens", str(32 * gpus)) if dry else ()  # some for each of all
  layers("links", 35, "--shape", "qwen3", "--parts", "links")
  for shape in SHAPES:
    words = ("--parts", "layer", "--no-all", "--strategies", f"{_EXCHANGES},gather")
    layers(f"each-{shape}", 38, "--shape", shape, *words)
  large = ("--rows", "4", *steps)
  if gpus < 8 and not dry:  # as many on a GPU as of all its 48 layers over eight
    large += ("--layers", str(6 * gpus))
  training("qwen3-fsdp", 27, "qwen3-30b-a3b", "--mesh", whole, *large)
  if gpus > 2:
    mixed = ("--mesh", f"fsdp={gpus // 2},expert=2", "--strategy", "deduplicated")
    training("qwen3-mixed", 27, "qwen3-30b-a3b", *mixed, *large)
  training("olmoe-fsdp", 20, "olmoe-1b-7b", "--mesh", whole, *steps)
  training("olmoe-expert", 20, "olmoe-1b-7b", "--strategy", "deduplicated", *steps)
  for shape in SHAPES:
    words = ("--routings", "skewed", "--overlaps", "1", "--strategies", _EXCHANGES)
    layers(
      f"all-{shape}", 20, "--shape", shape, "--total", "--parts", "layer", *words,
      *tokens,
    )  # fmt: skip
  one = ("--layers", "1", "--checkpoint-layers", "1")
  training("checkpoint", 80, "olmoe-1b-7b", "--strategy", "deduplicated", *one)
  # Layers apart hide what parameters send, and compile for minutes: last of all.
  apart = ("--mesh", whole, "--no-loop", "--keep", "most", *steps)
  if not dry:
    rows = "6" if gpus >= 8 else "8"  # those of all 48 layers take twice the room
    training("qwen3-apart", 40, "qwen3-30b-a3b", *apart, *large, "--rows", rows)
  for shape in SHAPES if liger_site else ():
    words = ("--parts", "layer,liger", "--liger-site", str(liger_site), "--only-all",
             "--strategies", f"{_EXCHANGES},gather")  # fmt: skip
    layers(
      f"liger-{shape}", 12, "--shape", shape, *words, "--routings", "balanced",
      "--overlaps", "1", "--no-all", "--tokens", str(64 if dry else _PEER_TOKENS),
    )  # fmt: skip
  return made
