"""The whole product of the contract, in processes, going on where it was stopped.

    python -m tests.parallel.product --workers 12 --out DIR [--limit SECONDS]

Cells that share one device's results are checked in one process, a fresh one for each
batch.  DIR/cells.jsonl gets a line for each cell: its outcome (passed, refused,
failed), seconds, jax's version, and of a failure what was raised.  A cell that passed,
or was refused as it must be, under this jax is not checked again.
"""
# SPDX-License-Identifier: Apache-2.0

import argparse
import collections
import concurrent.futures
import functools
import gc
import itertools
import json
import os
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax

from tests import eight_devices
from tests.parallel import cases

Row = dict[str, Any]
AT_MOST = 36  # cells of a process: a layer over a mesh is up to 700 mappings of memory
PATIENCE = 300.0  # seconds for a cell; XLA ends a process whose devices do not meet


def name(row: Row) -> str:
  """A cell's name, also in pytest."""
  return "-".join(str(value) for value in row.values())


def every_row() -> Iterator[Row]:
  """The product, with what cannot be configured."""
  for values in itertools.product(*cases.FACTORS.values()):
    yield dict(zip(cases.FACTORS, values, strict=True))


def shared(row: Row) -> tuple[Any, ...]:
  """Of what the results of one device depend on."""
  return row["router"], row["extra"], cases.limited(row), cases.fits(row)


@functools.cache
def batches() -> Sequence[Sequence[Row]]:
  """All cells; those of one batch are compared with the same results of one device."""
  together = collections.defaultdict(list)
  for row in every_row():
    if not cases.twin(row):
      together[shared(row)].append(row)
  found = []
  for rows in together.values():
    number = -(-len(rows) // AT_MOST)
    found += [rows[n::number] for n in range(number)]
  return found


def work() -> None:
  """Checks the rows that standard input names, one JSON list; a line for each."""
  gc.freeze()
  gc.disable()  # tracing makes much garbage, and a process ends soon
  for row in json.load(sys.stdin):
    start, why = time.monotonic(), None
    outcome, check = "passed", cases.check
    if not cases.fits(row):
      outcome, check = "refused", cases.check_refused
    try:
      check(row)
    except Exception:
      outcome, why = "failed", traceback.format_exc()[-2000:]
    print(json.dumps(_record(row, outcome, time.monotonic() - start, why)), flush=True)


def _record(row: Row, outcome: str, seconds: float, why: str | None) -> Row:
  found = dict(cell=name(row), outcome=outcome, seconds=round(seconds, 2))
  return found | dict(jax=jax.__version__) | ({} if why is None else dict(why=why))


class Product:
  """What is recorded, and what is left."""

  def __init__(self, folder: Path, seconds: float):
    self.path, self.errors = folder / "cells.jsonl", folder / "errors.txt"
    self.start = time.monotonic()
    self.end = self.start + seconds
    self.lock = threading.Lock()
    self.records: dict[str, Row] = {}
    folder.mkdir(parents=True, exist_ok=True)
    if self.path.exists():
      text = self.path.read_text()
      if text and not text.endswith("\n"):
        self.path.write_text(text + "\n")
      for line in text.splitlines():
        try:
          one = json.loads(line)
        except ValueError:
          continue  # cut off while it was written
        if one["jax"] == jax.__version__:
          self.records[one["cell"]] = one
    self.before = len(self.records)

  def left(self, rows: Sequence[Row]) -> list[Row]:
    """Those without a record of success."""
    found = (self.records.get(name(row), {}).get("outcome") for row in rows)
    return [row for row, one in zip(rows, found) if one not in ("passed", "refused")]

  def add(self, record: Row) -> None:
    """Writes a cell's record."""
    with self.lock:
      self.records[record["cell"]] = record
      with self.path.open("a") as file:
        file.write(json.dumps(record) + "\n")

  def run(self, rows: list[Row]) -> None:
    """One batch, in as many processes as its crashes make."""
    if time.monotonic() >= self.end:
      return
    while rows:
      done = self._process(rows)
      if time.monotonic() >= self.end:
        return
      if done < len(rows):  # one cell ended the process
        why = "the process ended, see errors.txt"
        self.add(_record(rows[done], "failed", 0.0, why))
      rows = rows[done + 1 :]
    self.say()

  def _process(self, rows: list[Row]) -> int:
    command = [sys.executable, "-m", "tests.parallel.product", "--worker"]
    done = 0
    with self.errors.open("a") as errors:
      process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True
      )
      assert process.stdin is not None and process.stdout is not None
      with process, process.stdin:
        timer = self._timer(process)
        json.dump(rows, process.stdin)
        process.stdin.close()
        for line in process.stdout:
          timer.cancel()
          timer = self._timer(process)
          if line.startswith("{"):
            self.add(json.loads(line))
            done += 1
        timer.cancel()
    return done

  def _timer(self, process: subprocess.Popen) -> threading.Timer:
    seconds = min(PATIENCE, self.end - time.monotonic())
    timer = threading.Timer(max(seconds, 0.0), process.kill)
    timer.start()
    return timer

  def counts(self) -> collections.Counter:
    """Cells by outcome; those without a record are left."""
    rows = [row for batch in batches() for row in batch]
    found = (self.records.get(name(row), {}).get("outcome", "left") for row in rows)
    return collections.Counter(found)

  def say(self) -> None:
    """A line on how far it is."""
    with self.lock:
      counts, spent = self.counts(), time.monotonic() - self.start
      new = len(self.records) - self.before
      rest = f", {spent / new * counts['left']:.0f} s to go" if new else ""
      text = ", ".join(f"{n} {outcome}" for outcome, n in sorted(counts.items()))
      print(f"{text}; {spent:.0f} s{rest}", flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
  """0: nothing is left and nothing failed; 1: something failed; 2: some are left."""
  parser = argparse.ArgumentParser(
    description="Checks the whole product of the contract over meshes."
  )
  parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
  parser.add_argument("--out", type=Path, help="the folder for cells.jsonl")
  parser.add_argument("--limit", type=float, default=float("inf"), metavar="SECONDS")
  parser.add_argument("--every", type=int, default=1, help="of the batches, every nth")
  parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
  given = parser.parse_args(arguments)
  eight_devices.prepare()
  if given.worker:
    work()
    return 0
  if given.out is None:
    parser.error("--out: give a folder")
  os.nice(19)
  product = Product(given.out, given.limit)
  todo = [left for rows in batches()[:: given.every] if (left := product.left(rows))]
  product.say()
  with concurrent.futures.ThreadPoolExecutor(given.workers) as pool:
    list(pool.map(product.run, todo))
  product.say()
  for record in product.records.values():
    if record["outcome"] == "failed":
      print(f"failed: {record['cell']}\n  {record['why'].strip().splitlines()[-1]}")
  counts = product.counts()
  return 1 if counts["failed"] else 2 if counts["left"] else 0


if __name__ == "__main__":
  sys.exit(main())
