"""Who measures waits for who measures already."""
# SPDX-License-Identifier: Apache-2.0

import threading

from experiments.benchmarks.turns import turn


def test_one_at_a_time_and_the_wait_is_told(tmp_path):
  file, order, inside = tmp_path / "turn", [], threading.Event()

  def second():
    inside.wait(5)
    with turn(file) as waited:
      order.append(("second", waited > 0.1))

  thread = threading.Thread(target=second)
  thread.start()
  with turn(file) as waited:
    assert waited < 0.1
    inside.set()
    thread.join(0.3)
    order.append(("first", thread.is_alive()))
  thread.join(5)
  assert order == [("first", True), ("second", True)]
  with turn(None) as waited:
    assert waited == 0
