"""How a process finds the others of its job, before anything asks jax for devices."""
# SPDX-License-Identifier: Apache-2.0

import contextlib
import dataclasses
import os
import sys
import threading
from collections.abc import Iterator

from experiments import handshake, hosts
from experiments.errors import PeerFailed, Unreachable

_REMEDY = (
  "give --coordinator HOST:PORT --processes N --process I, and start all of them"
)


@dataclasses.dataclass(frozen=True)
class Job:
  """How processes find each other; all None: from SLURM, JobSet or the TPU's metadata.

  Raises:
    ValueError: parts of an address, or a process that is not among them.
  """

  coordinator: str | None = None  # HOST:PORT of process 0
  processes: int | None = None
  process: int | None = None
  wait: int = hosts.PATIENCE  # seconds, of the first ones for the last

  def __post_init__(self):
    if self.wait < 1:
      raise ValueError(f"--wait {self.wait} is no time to wait; give seconds, from 1.")
    given = [self.coordinator, self.processes, self.process]
    if None in given:
      if given != [None] * 3:
        raise ValueError(
          "--coordinator, --processes and --process go together; give all three, or "
          "none where the cluster tells them."
        )
      return
    host, _, port = str(self.coordinator).rpartition(":")
    if not host or not port.isdecimal():
      raise ValueError(
        f"--coordinator {self.coordinator} is not HOST:PORT; write it as in "
        "10.0.0.1:1234."
      )
    if not 1 <= int(port) <= 65535:
      raise ValueError(
        f"--coordinator {self.coordinator}: there is no port {port}; give one of 1 to "
        "65535."
      )
    assert self.processes is not None and self.process is not None
    if self.processes < 1:
      raise ValueError(
        f"--processes {self.processes}: give how many there are, from 1."
      )
    if not 0 <= self.process < self.processes:
      raise ValueError(
        f"--process {self.process} is none of --processes {self.processes}; give 0 to "
        f"{self.processes - 1}."
      )


def start(job: Job) -> None:
  """Joins the processes of a job.

  Raises:
    Unreachable: the others did not come, or nothing tells who they are.
    PeerFailed: their counts or numbers do not go together, or some did not come.
  """
  if job.coordinator and job.processes and job.process is not None:  # else they agree
    handshake.agree(job.coordinator, job.processes, job.process, job.wait)
  import jax  # slow, and of no use to those that end before

  jax.config.update("jax_cpu_collectives_implementation", "gloo")
  try:
    with _in_time(job, job.wait):
      jax.distributed.initialize(
        job.coordinator,
        job.processes,
        job.process,
        initialization_timeout=2 * job.wait,
      )
  except (RuntimeError, ValueError) as error:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
    raise Unreachable(
      f"--distributed: the processes of the job cannot be joined ({reason}); {_REMEDY}."
    ) from error
  hosts.joined(jax.process_index(), jax.process_count())
  with hosts.together("number of processes"):
    if job.processes not in (None, jax.process_count()):
      raise PeerFailed(
        f"--processes {job.processes}, but the job has {jax.process_count()}; give "
        "every process the same number."
      )


@contextlib.contextmanager
def _in_time(job: Job, seconds: float) -> Iterator[None]:
  """Ends this process by one line if the others have not come.

  jax's own time limit aborts it from a thread of C++, with a page of addresses.
  """

  def ended() -> None:
    them = "the job" if job.processes is None else f"--processes {job.processes}"
    at = "" if job.coordinator is None else f" to --coordinator {job.coordinator}"
    said = f"not all of {them} came{at} in {seconds:.0f} s; {_REMEDY}."
    print(f"error: --distributed: {said}", file=sys.stderr, flush=True)
    os._exit(2)

  late = threading.Timer(seconds, ended)
  late.daemon = True  # a process that is told to end does
  late.start()
  try:
    yield
  finally:
    late.cancel()
