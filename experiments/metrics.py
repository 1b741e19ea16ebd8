"""What a run writes about itself: JSON lines, TensorBoard events, skipped batches.

A resumed run lists no step twice: lines after its step are dropped, events are purged.
TensorBoard gets the scalars of metrics.jsonl and nothing else: loss, bits_per_byte,
gradient_norm, skipped, tokens_per_second, with sparse layers also skew, dropped and
entropy, and a mean for each routing loss.  So the number of tags does not grow with
layers or experts; what each of those does is in routing.jsonl.
"""
# SPDX-License-Identifier: Apache-2.0

import io
import json
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

from experiments import extras
from experiments.workdir import write_text


class Lines:
  """A file of JSON lines, each with a "step"; null for what is no finite number.

  Args:
    path: of the file.
    kept: records to begin with, from `kept`.
  """

  def __init__(self, path: epath.Path, kept: Sequence[Mapping[str, Any]]):
    write_text(path, "".join(map(_line, kept)))
    self._file = path.open("a")

  def add(self, record: Mapping[str, Any]) -> None:
    """Appends a record."""
    self._file.write(_line(record))
    self._file.flush()

  def close(self) -> None:
    self._file.close()


def kept(path: epath.Path, step: int) -> list[dict[str, Any]]:
  """The records of a file up to a step; a last line cut short by a kill is dropped."""
  if not path.exists():
    return []
  found = []
  for line in path.read_bytes().split(b"\n")[:-1]:
    try:
      record = json.loads(line)
      known = record["step"] <= step
    except (ValueError, KeyError, TypeError):  # no JSON, or not even text
      continue
    if known:
      found.append(record)
  return found


class Board:
  """Scalars for TensorBoard.

  Args:
    folder: of the event files.
    step: where the run starts; TensorBoard hides events of later steps from before.
  """

  def __init__(self, folder: epath.Path, step: int):
    extras.check("tensorboardX", "train", needed_by="a run")
    # The writer itself: the queue that is usually before it loses what a kill finds
    # there, and cannot be emptied.
    from tensorboardX import event_file_writer
    from tensorboardX.proto import event_pb2, summary_pb2

    folder.mkdir(parents=True, exist_ok=True)
    self._file = event_file_writer.EventsWriter(str(folder / "events"), f".{step}")
    events: Any = event_pb2  # its names are made when it is imported
    summaries: Any = summary_pb2
    self._event, self._summary = events.Event, summaries.Summary
    log = events.SessionLog
    self._write(step + 1, session_log=log(status=log.START))

  def add(self, step: int, values: Mapping[str, float]) -> None:
    value = self._summary.Value
    found = [value(tag=name, simple_value=x) for name, x in values.items()]
    self._write(step, summary=self._summary(value=found))

  def close(self) -> None:
    self._file.close()

  def _write(self, step: int, **what: Any) -> None:
    self._file.write_event(self._event(wall_time=time.time(), step=step, **what))
    self._file.flush()


def keep_batch(
  folder: epath.Path, step: int, batch: Mapping[str, Any], *, key: Any
) -> None:
  """Writes step-N.npz: the arrays of a batch by name, and the step's random key.

  Args:
    folder: made if missing.
    step: counted from one.
    batch: of the step.
    key: the random key that the step used.
  """
  body = io.BytesIO()
  arrays: dict[str, Any] = {name: np.asarray(value) for name, value in batch.items()}
  np.savez(body, **arrays, key=np.asarray(jax.random.key_data(key)))
  folder.mkdir(parents=True, exist_ok=True)
  (folder / f"step-{step}.npz").write_bytes(body.getvalue())


def _line(record: Mapping[str, Any]) -> str:
  return json.dumps(_plain(record), allow_nan=False) + "\n"


def _plain(value: Any) -> Any:
  """JSON knows no NaN; readers other than Python's refuse it."""
  if isinstance(value, Mapping):
    return {name: _plain(part) for name, part in value.items()}
  if isinstance(value, list):
    return [_plain(part) for part in value]
  return None if isinstance(value, float) and not math.isfinite(value) else value
