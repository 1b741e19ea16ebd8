"""The training loop: dispatches step n, then reads the metrics of step n-1.

So the device always has a step to do while the host packs, prints and writes.
"""
# SPDX-License-Identifier: Apache-2.0

import collections
import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from experiments.data import Batch
from experiments.errors import Diverged
from experiments.state import TrainState
from experiments.workdir import write_text


def train(
  state: TrainState,
  batches: Iterator[Batch],
  *,
  train_step: Callable[[TrainState, Batch], tuple[TrainState, dict[str, Any]]],
  steps: int,
  save_every: int,
  save: Callable[[TrainState], None],
  report: Callable[[int, dict[str, Any]], None],
) -> TrainState:
  """The state after `steps` steps.

  Args:
    state: of a new or a restored run; its buffers may be donated by `train_step`.
    batches: positioned where the state is.
    train_step: jitted.
    steps: to be done since the beginning of the run.
    save_every: steps between two saves; the last state is saved in any case.
    save: called after all metrics up to its step were reported.
    report: takes a step, counted from one, and its metrics.

  Raises:
    Diverged: the loss of a step is not finite; the state is not saved.
  """
  waiting: tuple[int, dict[str, Any]] | None = None
  for step in range(int(state.step) + 1, steps + 1):
    state, metrics = train_step(state, next(batches))
    if waiting is not None:
      report(*waiting)
    waiting = (step, metrics)
    if step % save_every == 0 or step == steps:
      report(*waiting)
      waiting = None
      save(state)
  return state


class Report:
  """Metrics as JSON lines in a file, and one line on the terminal that follows them.

  Args:
    path: of the file; lines of steps after `step` are dropped, so that a resumed run
      lists no step twice.
    name: shown before the bar.
    step: where the run starts.
    steps: where it will end.
    tokens: trained on in a step.
  """

  def __init__(self, path: Path, *, name: str, step: int, steps: int, tokens: int):
    _rewind(path, step)
    self._file = path.open("a", encoding="utf-8")
    # Seldom if the line cannot rewrite itself, as in a log.
    self._bar = tqdm(
      total=steps, initial=step, desc=name, unit="step", dynamic_ncols=True
    )
    if not self._bar.fp.isatty():
      self._bar.mininterval = self._bar.maxinterval = 10.0
    self._tokens = tokens
    self._times: collections.deque[float] = collections.deque(maxlen=20)

  def __call__(self, step: int, metrics: dict[str, Any]) -> None:
    """Waits for the metrics of a step and shows them.

    Raises:
      Diverged: the loss is not finite.
    """
    values = {name: float(np.asarray(value)) for name, value in metrics.items()}
    self._times.append(time.perf_counter())
    if len(self._times) > 1:
      seconds = self._times[-1] - self._times[0]
      values["tokens_per_second"] = self._tokens * (len(self._times) - 1) / seconds
    self._file.write(json.dumps({"step": step} | values) + "\n")
    self._file.flush()
    if not math.isfinite(values["loss"]):
      raise Diverged(
        f"step {step}: the loss is {values['loss']}; lower optim.learning_rate."
      )
    self._bar.set_postfix_str(_shown(values), refresh=False)
    self._bar.update()

  def close(self) -> None:
    """Leaves the bar as it is and closes the file."""
    self._bar.close()
    self._file.close()


def _shown(values: dict[str, float]) -> str:
  shown = [f"{values['bits_per_byte']:.3f} bits/byte"]
  if "tokens_per_second" in values:
    shown.append(f"{values['tokens_per_second'] / 1000:.1f}k tokens/s")
  if "skew" in values:
    shown += [f"drops {values['dropped']:.1%}", f"skew {values['skew']:.2f}"]
  return ", ".join(shown)


def _rewind(path: Path, step: int) -> None:
  """Keeps whole lines of steps up to `step`; a kill may have cut the last one."""
  if not path.exists():
    return
  kept = []
  for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
    try:
      known = json.loads(line)["step"] <= step
    except (json.JSONDecodeError, KeyError, TypeError):
      known = False
    if known and line.endswith("\n"):
      kept.append(line)
  write_text(path, "".join(kept))
