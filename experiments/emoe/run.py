"""The jobs of the experiment, one after the other; what was done is not done again."""
# SPDX-License-Identifier: Apache-2.0

import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from experiments.emoe.jobs import FILE, Job, Plan, done, trains
from experiments.emoe.material import Material
from experiments.emoe.work import Ahead, Work


def run(
  material: Callable[[], Material],
  out: Path,
  plan: Plan,
  wanted: Sequence[Job],
  *,
  begin: float,
  seconds: float,
  ahead: int = 1,
) -> int:
  """Does what is left to do; returns the number of jobs that are then left.

  Args:
    material: that is read if anything is left to do.
    out: folder of results.jsonl.
    plan: common settings.
    wanted: jobs.
    begin: when the command did, by `time.perf_counter`.
    seconds: from then on; no job begins later, less what the longest one took.
    ahead: programs that compile at a time, for later jobs too; they are found again in
      the compilation cache.
  """
  out.mkdir(parents=True, exist_ok=True)
  before = done(out / FILE, plan)
  left = [job for job in wanted if job not in before]
  print(f"{len(left)} of {len(wanted)} jobs to do", file=sys.stderr)
  if not left:
    return 0
  work = Work(material(), plan)
  for job in left:  # groups that do not fit are refused before anything is trained
    work.form(job)
    if not job.groups:  # it is cut when it is trained
      work.form(job._replace(arm="emoe", groups=plan.groups, k=plan.k))
  with Ahead(work, left, ahead) as compiled:
    return _each(work, left, compiled, out / FILE, begin, seconds)


def _each(
  work: Work,
  left: Sequence[Job],
  compiled: Ahead,
  path: Path,
  begin: float,
  seconds: float,
) -> int:
  longest = 0.0
  for n, job in enumerate(left):
    now = time.perf_counter() - begin
    if now + longest > seconds:
      print(f"{now:.0f} s: {len(left) - n} jobs are left", file=sys.stderr)
      return len(left) - n
    compiled.wait(job)
    records = work.do(job)
    with path.open("a") as lines:
      lines.writelines(json.dumps(record) + "\n" for record in records)
    took = time.perf_counter() - begin - now
    longest = max(longest, took)
    domain = trains(job.task)[0]
    mean = np.mean([record[work.measure][domain] for record in records])
    print(
      f"{now + took:.0f} s: {n + 1}/{len(left)} {' '.join(map(str, job))}, "
      f"{took:.1f} s, {work.measure} on {domain} {mean:.4f}",
      file=sys.stderr,
      flush=True,
    )
  return 0
