"""Processes that do not agree end with one line each, before jax hears of them."""
# SPDX-License-Identifier: Apache-2.0

import concurrent.futures
import contextlib
import socket

import pytest

from experiments import handshake
from experiments.errors import Unreachable
from tests.training.processes import Process

# What each of the processes (count, number) says.
DISAGREEING = {
  "another count": (
    [(2, 0), (3, 2)],
    "--processes 3 of process 2 is not --processes 2 of process 0",
  ),
  "a number twice": ([(3, 0), (3, 1), (3, 1)], "--process 1 was given to 2 processes"),
  "the first one twice": ([(3, 0), (3, 0)], "--process 0 was given to 2 processes"),
  "one that never comes": ([(3, 0), (3, 1)], "process 2 of 3 did not come to"),
}


def free_port():
  with socket.socket() as some:
    some.bind(("localhost", 0))
    return some.getsockname()[1]


@contextlib.contextmanager
def agreeing(port, *processes: tuple[int, int], seconds=60.0):
  """Calls for processes (count, number), that begin together."""
  with concurrent.futures.ThreadPoolExecutor() as threads:
    address = f"localhost:{port}"
    yield [threads.submit(handshake.agree, address, *p, seconds) for p in processes]


@pytest.mark.slow
def test_processes_that_disagree_end_with_one_line_each(tmp_path):
  started = {}  # all of them at once: they only wait
  for case, (processes, _) in DISAGREEING.items():
    place = ["--mesh", "data=2", "--distributed", "--coordinator"]
    place += [f"localhost:{free_port()}", "--wait", "5" if "never" in case else "60"]
    started[case] = [
      Process(tmp_path, tmp_path, *place, "--processes", str(n), "--process", str(i))
      for n, i in processes
    ]
  for case, (_, said) in DISAGREEING.items():
    for process in started[case]:
      code, output = process.ended()
      assert code == 2 and output.count("\n") == 1, (case, output)
      assert output.startswith("error: --distributed: ") and said in output
  assert not list(tmp_path.iterdir())


def test_those_that_agree_go_on_whoever_else_comes_and_leave_the_port_free():
  port = free_port()
  with agreeing(port, (3, 0), (3, 2)) as both:
    while True:
      with contextlib.suppress(ConnectionRefusedError):
        silent = socket.create_connection(("localhost", port))
        break
    for text in (b"", b"GET / HTTP/1.1\r\n\r\n", b"x" * 99999):
      with socket.create_connection(("localhost", port)) as stranger:
        with contextlib.suppress(OSError):  # it is sent away
          stranger.sendall(text)
    with silent, agreeing(port, (3, 1)) as last:
      assert [call.result() for call in (*both, *last)] == [None] * 3
  with socket.create_server(("localhost", port)):
    pass


def test_another_program_at_the_port_and_nobody_are_one_line(monkeypatch):
  monkeypatch.setattr(handshake, "GRACE", 0.1)
  with socket.create_server(("localhost", port := free_port())) as other:
    other.settimeout(0.05)
    with agreeing(port, (2, 0)) as (first,):
      while not first.done():
        with contextlib.suppress(TimeoutError):
          other.accept()[0].sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
    with pytest.raises(Unreachable, match="another program has the port"):
      first.result()
  with agreeing(port, (2, 1), seconds=0.2) as (second,), pytest.raises(Unreachable):
    second.result()
