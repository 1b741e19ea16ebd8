"""Peers side by side: rows in turn, processes that fail, names of what is missing."""
# SPDX-License-Identifier: Apache-2.0

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.benchmarks import shapes
from experiments.benchmarks.peers import (
  __main__ as peers,
  jax_rows,
  ours,
  remote,
  rows,
  sonic_tiles,
)

SMALL = shapes.Shape(32, 48, 4, 2, 24)
FAKE = "tests.benchmarks.fake_peer"


def fake(name, ms, fails_at=None):
  count = 0

  def timed(kind, budget):
    nonlocal count
    count += 1
    if count == fails_at:
      raise RuntimeError("illegal\naddress")
    return ms if kind == "forward" else 3 * ms

  figures = dict(error=1e-3, gradient_error=1e-3, step_gb=1.0, step_compile_s=2.0)
  return rows.Row(name, timed, figures)


def test_rows_take_turns_and_one_that_fails_says_why():
  good, bad = fake("good", 2.0), fake("bad", 2.0, fails_at=3)
  ceilings = rows.in_turn([good, bad], lambda: 1e12, rounds=4)
  assert good.ms == {"forward": [2.0] * 4, "step": [6.0] * 4}
  assert bad.why == "RuntimeError: illegal address"
  assert len(ceilings) == 8
  found = rows.summed_up(good, SMALL, bound=1e9)
  rate = SMALL.flops(backward=True) / 6e-3
  np.testing.assert_allclose(found["step_share"], rate / 1e9)
  assert "good" in rows.shown(found) and rows.wrong([found]) == []


def test_wrong_results_are_named_unless_the_row_drops():
  def entry(name, **errors):
    row = fake(name, 1.0)
    row.ms = {"forward": [1.0], "step": [1.0]}
    row.figures |= errors
    return rows.summed_up(row, SMALL, 1e9)

  found = [
    entry("right"),
    entry("output", error=0.3),
    entry("gradient", gradient_error=float("nan")),
    entry("capacity 1.25", error=0.3),
  ]
  assert rows.wrong(found) == ["output", "gradient"]


@pytest.mark.parametrize(
  ("name", "why"),
  [
    ("absent", "is not installed"),
    ("raises", "OSError: no such library"),
    ("dies", "its process ended with 3"),
    ("hangs", "no answer in 1 s"),
  ],
)
def test_a_process_that_fails_says_why(name, why):
  worker = remote.Worker(FAKE, name, "tiny")
  with pytest.raises(RuntimeError, match=why):
    worker.ask(1 if name == "hangs" else 60, do="missing")
  worker.close()


def test_a_process_answers_beside_what_libraries_print():
  worker = remote.Worker(FAKE, "here", "tiny")
  for _ in range(2):
    assert worker.ask(60, do="missing") == {"why": None}
  worker.close()


def test_every_row_is_listed(capsys):
  assert peers.main(["--shape", "tiny", "--list"]) == 0
  said = capsys.readouterr().out
  assert all(
    line.split("  ")[-1].strip().startswith(("here", "missing: "))
    for line in said.splitlines()
  )
  for name in ("jmoe dropless", "jmoe capacity 1.25", "plain, jax.lax.ragged_dot"):
    assert any(s.startswith(name) and s.endswith("here") for s in said.splitlines())
  for name in (*peers.TORCH, "tokamax", "jax's mgpu kernels"):
    assert name in said


def test_a_shape_is_asked_for_in_one_line(capsys):
  with pytest.raises(SystemExit) as caught:
    peers.main([])
  assert caught.value.code == 2
  assert capsys.readouterr().err.startswith("error: --shape is missing")


def test_a_row_is_checked_against_float32():
  row = jax_rows.row("jmoe dropless", ours.layer, SMALL)
  assert isinstance(row, rows.Row), row
  assert row.figures["error"] < 1e-2 and row.figures["gradient_error"] < 2e-2
  assert row.timed("forward", 1e-4) > 0

  def halved(shape):
    call = ours.layer(shape)
    return lambda *operands: call(*operands) / 2

  wrong = jax_rows.row("halved", halved, SMALL)
  assert isinstance(wrong, rows.Row)
  np.testing.assert_allclose(wrong.figures["error"], 0.5, atol=1e-2)
  np.testing.assert_allclose(wrong.figures["gradient_error"], 0.5, atol=2e-2)

  def broken(shape):
    raise NotImplementedError("not on this device")

  missing = jax_rows.row("broken", broken, SMALL)
  assert missing == rows.Missing("broken", "NotImplementedError: not on this device")


def test_gathers_both_ways_have_the_gradients_of_the_plain_layer():
  params, x = ours.operands(SMALL, jnp.float32)
  expert, weight = (jnp.asarray(a) for a in shapes.routing(SMALL))

  def gradients(**how):
    call = ours.plain(SMALL, jax.lax.ragged_dot, **how)
    return jax.grad(lambda *a: jnp.sum(jnp.sin(call(*a, expert))), (0, 1, 2))(
      params, x, weight
    )

  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
    gradients(both_ways=True),
    gradients(),
  )


def test_every_leg_of_every_shape_has_a_tile_that_it_can_have():
  assert set(sonic_tiles.TILES) == set(shapes.SHAPES)
  for legs in sonic_tiles.TILES.values():
    assert tuple(legs) == sonic_tiles.LEGS
    for leg, tile in legs.items():
      assert tile in sonic_tiles.candidates(leg)
  for leg in sonic_tiles.LEGS:
    for tile in sonic_tiles.candidates(leg):
      assert leg not in sonic_tiles.GATHERED or tile.cluster[1] == 1
      assert leg not in sonic_tiles.GATED or tile.cols % 32 == 0


def test_the_printed_table_is_source():
  known = {"Tile": sonic_tiles.Tile, "dict": dict, "str": str}
  exec(sonic_tiles.printed(sonic_tiles.TILES), known)
  assert known["TILES"] == sonic_tiles.TILES


def test_legs_are_told_apart_by_their_operands():
  E, D, F, N = 4, 32, 48, 96
  shape = lambda *size: jax.ShapeDtypeStruct(size, jnp.bfloat16)  # noqa: E731
  rows_of, over_rows = {"cu_seqlens_m": 1}, {"cu_seqlens_k": 1}
  cases = {
    "up": ("gemm_gated_tuned", {}),
    "dx of down": ("gemm_dgated_tuned", {}),
    "down": ("gemm_tuned", rows_of | {"A": shape(N, F), "B": shape(E, F, D)}),
    "dx of up": (
      "gemm_tuned",
      rows_of | {"A": shape(N, 2 * F), "B": shape(E, 2 * F, D)},
    ),
    "dw of up": ("gemm_tuned", over_rows | {"A": shape(D, N), "B": shape(N, 2 * F)}),
    "dw of down": ("gemm_tuned", over_rows | {"A": shape(D, N), "B": shape(N, F)}),
  }
  assert {leg: sonic_tiles.leg(*case, F) for leg, case in cases.items()} == {
    leg: leg for leg in sonic_tiles.LEGS
  }
