"""What a run writes about itself: JSON lines, TensorBoard events, skipped batches.

A resumed run lists no step twice: lines and events after its step are dropped first.
TensorBoard gets the scalars of metrics.jsonl and nothing else, so the number of its
tags does not grow with experts or layers; loads of experts are in routing.jsonl.
"""
# SPDX-License-Identifier: Apache-2.0

import io
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from experiments import extras
from experiments.workdir import is_local, write_text


class Lines:
  """A file of JSON lines, each with a "step".

  A local file is written line by line.  Where files cannot grow (gs://, s3://), the
  whole text is written at every `flush`, as often as the state is saved.

  Args:
    path: of the file.
    kept: records to begin with, from `kept`.
  """

  def __init__(self, path: epath.Path, kept: Sequence[Mapping[str, Any]]):
    self._path = path
    self._text = [_line(record) for record in kept]
    write_text(path, "".join(self._text))
    self._file = None
    if is_local(path):
      self._text.clear()
      self._file = path.open("a")

  def add(self, record: Mapping[str, Any]) -> None:
    """Appends a record."""
    if self._file is None:
      self._text.append(_line(record))
      return
    self._file.write(_line(record))
    self._file.flush()

  def flush(self) -> None:
    """Makes sure that all records are where they belong."""
    if self._file is None:
      write_text(self._path, "".join(self._text))

  def close(self) -> None:
    self.flush()
    if self._file is not None:
      self._file.close()


def kept(path: epath.Path, step: int) -> list[dict[str, Any]]:
  """The records of a file up to a step; a last line cut short by a kill is dropped."""
  if not path.exists():
    return []
  found = []
  for line in path.read_text().splitlines(keepends=True):
    try:
      record = json.loads(line)
      known = record["step"] <= step
    except (json.JSONDecodeError, KeyError, TypeError):
      continue
    if known and line.endswith("\n"):
      found.append(record)
  return found


class Board:
  """Scalars for TensorBoard; nothing where the folder is not local.

  Args:
    folder: of the event files.
    step: events of later steps are hidden.
  """

  def __init__(self, folder: epath.Path, step: int):
    self._writer = None
    if is_local(folder):
      tensorboardX = extras.require("tensorboardX", "train", needed_by="a run")
      self._writer = tensorboardX.SummaryWriter(str(folder), purge_step=step + 1)

  def add(self, step: int, values: Mapping[str, float]) -> None:
    if self._writer is not None:
      for name, value in values.items():
        self._writer.add_scalar(name, value, step)

  def close(self) -> None:
    if self._writer is not None:
      self._writer.close()


def keep_batch(folder: epath.Path, step: int, batch: Mapping[str, Any]) -> None:
  """Writes skipped/step-N.npz: the arrays of a batch, by name."""
  body = io.BytesIO()
  np.savez(body, **{name: np.asarray(value) for name, value in batch.items()})
  folder.mkdir(parents=True, exist_ok=True)
  (folder / f"step-{step}.npz").write_bytes(body.getvalue())


def _line(record: Mapping[str, Any]) -> str:
  return json.dumps(record) + "\n"
