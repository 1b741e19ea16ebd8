"""The training loop: dispatches step n, then reads the metrics of step n-1.

So the device always has a step to do while the host packs, prints and writes.
"""
# SPDX-License-Identifier: Apache-2.0

import collections
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from etils import epath
from tqdm import tqdm

from experiments import hosts, metrics, routing
from experiments.alarms import Alarms
from experiments.config import Run, sparse_layers
from experiments.data import Batch
from experiments.errors import Diverged
from experiments.signals import Stop
from experiments.state import TrainState

MOST_KEPT = 100  # batches that were skipped: no disk fills with them

Step = Callable[[TrainState, Batch], tuple[TrainState, dict[str, Any], Any]]


def train(
  state: TrainState,
  batches: Iterator[Batch],
  *,
  train_step: Step,
  steps: int,
  save_every: int,
  save: Callable[[TrainState], None],
  report: Callable[[int, Batch, dict[str, Any], Any], None],
  stop: Stop,
  profile: "Profile | None" = None,
) -> TrainState:
  """The state after `steps` steps.

  Args:
    state: of a new or a restored run; its buffers may be donated by `train_step`.
    batches: positioned where the state is.
    train_step: jitted.
    steps: to be done since the beginning of the run.
    save_every: steps between two saves; the last state is saved in any case.
    save: called after all metrics up to its step were reported.
    report: takes a step, counted from one, its batch, metrics and routing.
    stop: asked after each step.
    profile: which steps to trace.

  Raises:
    Diverged: too many steps in a row were skipped; their state is that before them.
    Stopped: a signal came; the state was saved.
  """
  waiting: tuple[int, Batch, dict[str, Any], Any] | None = None
  for step in range(steps_of(state) + 1, steps + 1):
    if profile is not None:
      profile.before(step)
    batch = next(batches)
    state, values, found = train_step(state, batch)
    if profile is not None:
      profile.after(step, state)
    if waiting is not None:
      report(*waiting)
    waiting = (step, batch, values, found)
    stopping = stop.asked(step)  # once: a signal may come at any moment
    if step % save_every == 0 or step == steps or stopping:
      report(*waiting)
      waiting = None
      save(state)
    if stopping:
      stop.check(step)
  return state


def steps_of(state: TrainState) -> int:
  """Steps done; of several seeds at once, which have all done as many."""
  return int(np.ravel(state.step)[0])


class Profile:
  """An xprof trace of the steps first to last, both included.

  Args:
    folder: where TensorBoard's profile plugin, or xprof, looks for it.
    first: step, counted from one.
    last: at least `first`.
    done: steps done before; what of them was to be traced is not, and said so.
  """

  def __init__(self, folder: epath.Path, first: int, last: int, *, done: int):
    self._folder, self._first, self._last = folder, max(first, done + 1), last
    self._running = False
    if first <= done:
      traced = f"from {done + 1} on" if done < last else "none"
      print(
        f"--profile {first}:{last}: {done} steps were done before; {traced} is traced.",
        file=sys.stderr,
      )

  def before(self, step: int) -> None:
    if step == self._first <= self._last:
      jax.profiler.start_trace(str(self._folder))
      self._running = True

  def after(self, step: int, state: TrainState) -> None:
    if self._running and step >= self._last:
      jax.block_until_ready(state)
      self.close()

  def close(self) -> None:
    """Writes what was traced so far."""
    if self._running:
      self._running = False
      jax.profiler.stop_trace()


class Report:
  """What a step did: to files, to alarms, and as one line on the terminal.

  Of several processes the first one writes; the others count, and raise as it does.

  Args:
    run: what is trained.
    folder: of the run.
    step: where the run starts; what the files hold of later steps is dropped.
    shown: whether a bar shows how far it is.

  `step` is the last that was reported, `skipped` how many changed nothing, `speeds` the
  tokens a second of each, and `alarms` what was to be said.
  """

  def __init__(self, run: Run, folder: epath.Path, *, step: int, shown: bool = True):
    self._run, self._folder = run, folder
    self.alarms = Alarms()
    self.skipped = self._skipped_in_a_row = 0
    self.speeds: list[float] = []  # tokens a second, of each step
    self._lines = self._routing = self._board = None
    if hosts.is_first():
      self._open(folder, step)
    counts = hosts.share("skipped steps", [self.skipped, self._skipped_in_a_row])
    self.skipped, self._skipped_in_a_row = counts
    shown = shown and hosts.is_first()
    # Seldom if the line cannot rewrite itself, as in a log.
    self._bar = tqdm(
      total=run.steps,
      initial=step,
      desc=run.name,
      unit="step",
      dynamic_ncols=True,
      disable=not shown,
    )
    if shown and not self._bar.fp.isatty():
      self._bar.mininterval = self._bar.maxinterval = 10.0
    self._times: collections.deque[float] = collections.deque(maxlen=20)
    self.step = step

  def _open(self, folder: epath.Path, step: int) -> None:
    """Reads what there is, and goes on with it."""
    lines = metrics.kept(folder / "metrics.jsonl", step)
    for record in lines:
      self._counted(record["step"], record)
    self._lines = metrics.Lines(folder / "metrics.jsonl", lines)
    if sparse_layers(self._run.model):
      watched = metrics.kept(folder / "routing.jsonl", step)
      for record in watched:
        self.alarms.routing(record["step"], record["layers"])
      self._routing = metrics.Lines(folder / "routing.jsonl", watched)
    self._board = metrics.Board(folder / "tensorboard", step)

  def __call__(
    self, step: int, batch: Batch, metrics_: Mapping[str, Any], found: Any
  ) -> None:
    """Waits for the metrics of a step and shows them.

    Raises:
      Diverged: too many steps in a row were skipped.
    """
    # One transfer for all of them.
    values = {name: float(value) for name, value in jax.device_get(metrics_).items()}
    self.step = step
    self._times.append(time.perf_counter())
    if len(self._times) > 1:
      seconds = self._times[-1] - self._times[0]
      tokens = self._run.data.batch * self._run.data.seq
      values["tokens_per_second"] = tokens * (len(self._times) - 1) / seconds
    if self._lines is not None and self._board is not None:
      self._lines.add({"step": step} | values)
      self._board.add(step, values)
    said = self._counted(step, values)
    watched = step % self._run.watch_every == 0 or step == 1
    if self._routing is not None and watched:
      layers = routing.layers(self._run.model, found)
      self._routing.add({"step": step, "layers": layers})
      said += self.alarms.routing(step, layers)
    for message in said if hosts.is_first() else []:
      self._bar.write(f"alarm: {message}", file=sys.stderr)
    self._bar.set_postfix_str(_shown(values), refresh=False)
    self._bar.update()
    if values["skipped"] and self.skipped <= MOST_KEPT and hosts.is_first():
      metrics.keep_batch(self._folder / "skipped", step, batch, key=self._key(step))
    if self._skipped_in_a_row > self._run.max_skipped:
      raise Diverged(
        f"step {step}: loss or gradient not finite for {self._skipped_in_a_row} steps "
        "in a row; lower optim.learning_rate in a run of another folder (start_from= "
        "gives it this one's model), or look at the batches in "
        f"{self._folder / 'skipped'}."
      )

  def close(self) -> None:
    """Leaves the bar as it is and closes the files."""
    self._bar.close()
    for file in (self._lines, self._routing, self._board):
      if file is not None:
        file.close()

  def _counted(self, step: int, values: Mapping[str, float]) -> list[str]:
    """Takes a line into account; returns new alarms."""
    skipped = bool(values.get("skipped"))
    self.skipped += skipped
    self._skipped_in_a_row = self._skipped_in_a_row + 1 if skipped else 0
    if "tokens_per_second" in values:
      self.speeds.append(values["tokens_per_second"])
    return self.alarms.metrics(step, values)

  def _key(self, step: int) -> jax.Array:
    """What `train_step` draws from in this step."""
    return jax.random.fold_in(jax.random.key(self._run.seed), step - 1)


def _shown(values: Mapping[str, float]) -> str:
  shown = [f"{values['bits_per_byte']:.3f} bits/byte"]
  if "tokens_per_second" in values:
    shown.append(f"{values['tokens_per_second'] / 1000:.1f}k tokens/s")
  if "skew" in values:
    shown += [f"drops {values['dropped']:.1%}", f"skew {values['skew']:.2f}"]
  return ", ".join(shown)
