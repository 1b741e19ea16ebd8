"""What the processes of a job tell each other before jax joins them.

jaxlib aborts a process whose number it does not expect, or that has waited too long,
and nothing of jax stops it.  So each says first who it is, at the coordinator's
address, where process 0 listens until it gives all of them one answer; the port is
then free for jax.  Every wait has an end.
"""
# SPDX-License-Identifier: Apache-2.0

import asyncio
import contextlib
import errno
import importlib
import os
import re
import time
import uuid

from experiments.errors import PeerFailed, Unreachable

GRACE = 3.0  # seconds in which those that come late still hear why others ended
_CALL = 30.0  # seconds that one try to reach process 0 takes at most
_HELLO = re.compile(rb"jmoe (\d+) of (\d+), (\w+)\n")  # the last tells twins apart
_ANSWER = b"jmoe: "
_BEGUN = "its job has begun without this process, or another program has the port"


def agree(address: str, count: int, index: int, seconds: float) -> None:
  """Returns once all processes of a job have come, each with a number of its own.

  Args:
    address: HOST:PORT of process 0.
    count: of processes.
    index: of this one.
    seconds: that the first ones wait for the last.

  Raises:
    PeerFailed: their counts or numbers do not go together, or some did not come.
    Unreachable: process 0 does not answer, or cannot listen.
  """
  if answer := asyncio.run(_agreed(address, count, index, seconds)):
    raise PeerFailed(f"--distributed: {answer}")


async def _agreed(address: str, count: int, index: int, seconds: float) -> str:
  ours, server = _Guests(count, address, seconds), None
  hello = f"jmoe {index} of {count}, {uuid.uuid4().hex}\n"
  end, why = time.monotonic() + seconds, ""
  while True:
    if index == 0 and server is None:
      server = await _listening(ours, address)
    try:
      answer = await _asked(address, hello, end - time.monotonic(), seconds)
      why = _BEGUN
      end = min(end, time.monotonic() + GRACE)  # a former job may be about to end
    except (OSError, EOFError) as error:  # what stands between may accept, and close
      answer, why = None, why if why == _BEGUN else str(error) or type(error).__name__
    if answer is not None:
      break
    if time.monotonic() >= end:
      raise Unreachable(
        f"--distributed: no process 0 waits at --coordinator {address} ({why}); start "
        "all of the job, or give a longer --wait."
      )
    await asyncio.sleep(0.1)
  if server is not None:
    end = time.monotonic() + GRACE
    while time.monotonic() < end and (answer or ours.here):
      await asyncio.sleep(0.01)
    if not answer:  # slow, and so before another process 0 can take the port
      importlib.import_module("jax")
    server.close()
  return answer


class _Guests:
  """Who has come to process 0, itself included."""

  def __init__(self, count: int, address: str, seconds: float):
    self.here: dict[bytes, tuple[int, int, asyncio.StreamWriter]] = {}
    self._count, self._address, self._seconds = count, address, seconds
    self._answer: str | None = None
    self._heard: set[bytes] = set()  # those whom the answer is for
    asyncio.get_running_loop().call_later(seconds, self._look, True)

  async def greet(
    self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
  ) -> None:
    """Keeps a connection until its guest closes it, or says nothing to the point."""
    strange = OSError, ValueError, asyncio.CancelledError  # lost, too long, silent
    with contextlib.closing(writer), contextlib.suppress(*strange):
      if said := _HELLO.fullmatch(await reader.readline()):
        self.here[said[3]] = guest = int(said[1]), int(said[2]), writer
        if self._answer is None:
          self._look()
        else:
          self._tell(said[3])
        await reader.read()
        if self.here.get(said[3]) is guest:  # it may have come again
          del self.here[said[3]]

  def _look(self, late: bool = False) -> None:
    """Answers everyone, once there is an answer."""
    if self._answer is None and (found := self._found(late)) is not None:
      self._answer, self._heard = found, set(self.here)
      for guest in self.here:
        self._tell(guest)

  def _tell(self, guest: bytes) -> None:
    said = self._answer or ""
    if not said and guest not in self._heard:
      said = (
        f"the job at --coordinator {self._address} has begun without this process; "
        "give each its own number, and all the same --processes."
      )
    self.here[guest][2].write(_ANSWER + said.encode() + b"\n")

  def _found(self, late: bool) -> str | None:
    numbers = [number for number, _, _ in self.here.values()]
    missing = [str(n) for n in range(self._count) if n not in numbers]
    for number, count, _ in self.here.values():
      if count != self._count:
        return (
          f"--processes {count} of process {number} is not --processes {self._count} "
          "of process 0; give every process the same number."
        )
      if numbers.count(number) > 1:
        return (
          f"--process {number} was given to {numbers.count(number)} processes; give "
          f"each its own, 0 to {count - 1}."
        )
    if late and missing:
      more = f" and {len(missing) - 8} more" if len(missing) > 8 else ""
      return (
        f"process {', '.join(missing[:8])}{more} of {self._count} did not come to "
        f"--coordinator {self._address} in {self._seconds:.0f} s; start all of them, "
        "or give a longer --wait."
      )
    return None if missing else ""


async def _listening(ours: _Guests, address: str) -> asyncio.Server | None:
  """Where jax will listen; None if another has the port, and this one is a guest."""
  port = address.rpartition(":")[2]
  place = os.environ.get("JAX_COORDINATOR_BIND_ADDRESS", f"[::]:{port}")
  host, _, port = place.rpartition(":")
  host = None if host == "[::]" else host.strip("[]")
  try:
    return await asyncio.start_server(ours.greet, host, int(port), backlog=1024)
  except OSError as error:
    if error.errno == errno.EADDRINUSE:
      return None
    raise Unreachable(
      f"--coordinator {address}: process 0 cannot listen at {place} "
      f"({error.strerror}); give an address and a free port of its host."
    ) from error


async def _asked(address: str, hello: str, rest: float, wait: float) -> str | None:
  """What process 0 answers: nothing, if all may go on; None if another program does."""
  host, _, port = address.rpartition(":")
  async with asyncio.timeout(min(max(rest, 1), _CALL)):
    reader, writer = await asyncio.open_connection(host.strip("[]"), int(port))
  with contextlib.closing(writer):
    if writer.get_extra_info("sockname") == writer.get_extra_info("peername"):
      raise OSError("nobody listens")  # TCP lets one call oneself
    writer.write(hello.encode())
    async with asyncio.timeout(wait + 2 * GRACE):  # process 0 may have come later
      if await reader.readexactly(len(_ANSWER)) != _ANSWER:
        return None
      return (await reader.readuntil()).decode().strip()
