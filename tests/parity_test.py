"""The library equals the oracle: router x priority x capacity rule x dispatch.

Output, kept set, queue, load, weights, losses and drops are compared.  Most rows run
operation by operation, which compiles each operation once for all rows; others run
compiled, as users do, on contents that hypothesis draws.
"""
# SPDX-License-Identifier: Apache-2.0

import dataclasses
import zlib

import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np
import pytest

from jmoe import dispatch, gates, losses, routers
from jmoe.config import MoEConfig
from jmoe.kernels.grouped_matmul import reference
from jmoe.layer import moe
from jmoe.use import use
from tests import _cases as cases, _matrix as matrix, oracle
from tests._expected import expect, expert_fn
from tests.tolerance import assert_close


def check(row, config, drawn, *, num_rows=None, group=None) -> None:
  """One layer on one case, by the library and by the oracle."""
  y, info = cases.run(config, drawn, num_rows=num_rows)
  expected = expect(row, config, drawn, info, group)
  plan, routing = info.plan, info.plan.routing
  T, E = routing.probs.shape
  valid, note = drawn.valid_or_all, f"{row} seed={drawn.seed}"

  logits = np.float32(drawn.scale) * drawn.x[:, :E]
  np.testing.assert_array_equal(routing.logits[valid], logits[valid], note)
  assert_close(np.asarray(routing.probs)[valid], expected.scores[valid], note)

  entries, kept = expected.entries, expected.kept
  if routing.k is None:  # unused picks differ in number: compare the matrices
    _same_matrix(expected, plan, note)
  else:
    for name in ("live", "queues"):
      flags = [getattr(entry, name) for entry in entries]
      np.testing.assert_array_equal(getattr(routing, name), flags, f"{name} {note}")
    live = np.array([entry.live for entry in entries])
    chosen = np.array([entry.expert for entry in entries])
    np.testing.assert_array_equal(routing.expert[live], chosen[live], note)
    queues = expected.slot >= 0
    np.testing.assert_array_equal(plan.slot[queues], expected.slot[queues], note)
    np.testing.assert_array_equal(plan.kept, kept, note)
    assert_close(
      np.where(kept, routing.weight, 0), np.where(kept, expected.weights, 0), note
    )
  np.testing.assert_array_equal(plan.load, expected.load, note)
  np.testing.assert_array_equal(info.load, expected.load.sum(0), note)
  assert info.load.dtype == jnp.int32
  assert_close(y, expected.y, note)

  assert set(info.losses) == set(expected.losses)
  for name, value in expected.losses.items():
    assert_close(info.losses[name], value, f"{name} {note}")
  assert set(info.dropped) == set(expected.dropped)
  for name, value in expected.dropped.items():
    assert_close(info.dropped[name], value, f"{name} {note}")
  assert_close(info.entropy, expected.entropy, note)


def _same_matrix(expected, plan, note) -> None:
  routing, kept = plan.routing, np.asarray(plan.kept)
  T, E = routing.probs.shape
  mine = [
    oracle.Entry(int(t), int(e), float(w), bool(live), bool(live))
    for t, e, w, live in zip(
      routing.token, routing.expert, routing.weight, routing.live, strict=True
    )
  ]
  for of_mine, of_oracle in (
    ([e.live for e in mine], [e.live for e in expected.entries]),
    (kept, expected.kept),
    (kept * np.asarray(routing.weight), expected.kept * expected.weights),
    (kept * np.asarray(plan.slot), expected.kept * expected.slot),
  ):
    one, other = (
      oracle.as_matrix(entries, values, T, E)
      for entries, values in ((mine, of_mine), (expected.entries, of_oracle))
    )
    assert_close(one.astype(np.float32), other, note)


# -- the matrix, operation by operation ------------------------------------------------

T, E = 13, 7  # both prime
ROWS = matrix.covering(matrix.FACTORS)
DENSE = cases.expert(matmul=reference)  # loops would compile anew for every row


def run_rows(rows) -> None:
  """Every row on its own content; a row's seed depends on the row alone."""
  with cases.by_operation():
    for row in rows:
      seed = zlib.crc32(repr(sorted(row.items(), key=str)).encode()) % 10_000
      drawn = cases.draw(row["kind"], T, E, seed, mask=bool(seed % 2))
      check(row, cases.config_of(row, E, experts=DENSE), drawn)


FAMILIES = {  # routers that share operations: each test compiles its own once
  "one choice": ("top_k 1", "hashed"),
  "two choices": ("top_k 2", "noisy_top_k"),
  "top 2": ("top_2",),
  "all experts": ("top_k E", "every_expert"),
  "expert choice": ("expert_choice",),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_pair_of_stages_equals_the_oracle(family):
  rows = [row for row in ROWS if row["router"].startswith(FAMILIES[family])]
  assert {row["dispatch"] for row in rows} >= {"einsum", "buckets"}
  run_rows(rows)


@pytest.mark.full
@pytest.mark.parametrize("slots", cases.CAPACITIES)
@pytest.mark.parametrize("router", cases.ROUTERS)
def test_every_combination_of_stages_equals_the_oracle(router, slots):
  rows = matrix.product("priority", "dispatch", "kind", router=router, capacity=slots)
  turn = {name: len(values) for name, values in matrix.FACTORS.items()}
  for i, row in enumerate(rows):
    if not matrix.fits(row):
      continue
    for j, name in enumerate(("renormalise", "group_size", "extra", "restrict")):
      value = matrix.FACTORS[name][(i * (j + 1) + j) % turn[name]]
      row[name] = (
        value if matrix.fits({**row, name: value}) else matrix.FACTORS[name][0]
      )
    run_rows([row])


def test_the_array_holds_every_pair_that_fits():
  starts = tuple(s for family in FAMILIES.values() for s in family)
  assert all(router.startswith(starts) for router in cases.ROUTERS)
  got = {
    (a, row[a], b, row[b]) for row in ROWS for a in row for b in row if a != b
  }  # fmt: skip
  for a, b in (
    ("router", "capacity"),
    ("router", "dispatch"),
    ("priority", "capacity"),
    ("router", "priority"),
    ("router", "kind"),
    ("capacity", "kind"),
  ):
    for row in matrix.product(a, b):
      possible = any(
        matrix.fits({**row, "dispatch": d}) for d in cases.DISPATCHES
      )  # expert choice never meets `sort`
      assert not possible or (a, row[a], b, row[b]) in got, row


# -- compiled, as users run it ---------------------------------------------------------

# (router, capacity, priority, dispatch, renormalise, group, extra, restrict), T, E
COMPILED = [
  ("top_k 1", "ceil", "by_choice_rank", "einsum", "never", 5, "", "", 13, 7),
  ("top_k 1", "one", "by_weight", "buckets", "after_dropping", None, "", "", 13, 1),
  ("top_k 1", "dropless", "by_confidence", "sort", "never", None, "input", "", 13, 3),
  ("top_k 2, bias, scale", "ceil", "by_confidence", "buckets", "before_dropping", "row",
   "shared", "", 24, 8),
  ("top_k 2, bias, scale", "bounded", "by_weight", "sort", "before_dropping", None,
   "input, shared", "domain", 13, 7),
  ("top_k 2 of relu", "per expert", "random", "buckets", "over_chosen", None, "", "",
   13, 3),
  ("top_k E", "fairseq", "by_choice_rank", "buckets", "over_chosen", None, "", "", 13,
   3),
  ("top_k E", "dropless", "random", "sort", "before_dropping", None, "", "", 13, 1),
  ("noisy_top_k", "vmoe", "by_confidence", "einsum", "never", 5, "input", "", 24, 8),
  ("noisy_top_k", "bounded", "random", "sort", "after_dropping", None, "", "", 13, 3),
  ("top_2 random, holds", "lingvo", "by_choice_rank", "buckets", "before_dropping", 5,
   "", "", 13, 7),
  ("top_2 random, raw", "fairseq", "by_choice_rank", "einsum", "after_dropping", None,
   "", "", 13, 3),
  ("top_2 random, holds", "bounded", "by_weight", "sort", "before_dropping", None, "",
   "", 24, 8),
  ("top_2 sampling", "deepspeed", "random", "buckets", "after_dropping", "row", "", "",
   24, 8),
  ("top_2 threshold, holds", "dropless", "by_weight", "sort", "before_dropping", None,
   "", "domain", 13, 7),
  ("hashed", "ceil", "by_choice_rank", "buckets", "never", None, "", "domain", 13, 7),
  ("hashed", "dropless", "by_choice_rank", "sort", "never", None, "shared", "", 24, 8),
  ("every_expert", "none", "by_weight", "buckets", "after_dropping", None, "", "", 13,
   3),
  ("every_expert", "dropless", "by_weight", "sort", "over_chosen", None, "", "", 13, 7),
  ("expert_choice", "own", "by_choice_rank", "buckets", "never", 5, "", "", 13, 7),
  ("expert_choice 1.5", "own", "by_weight", "einsum", "never", "row", "", "domain", 24,
   7),
]  # fmt: skip
NAMES = ("router", "capacity", "priority", "dispatch", "renormalise", "group_size")
NAMES += ("extra", "restrict")


@st.composite
def contents(draw, T: int, E: int):
  """Logits and padding drawn freely: quarters tie, and any scale may come."""
  quarters = draw(hnp.arrays(np.int8, (T, cases.D), elements=st.integers(-8, 8)))
  base = cases.draw("random", T, E, draw(st.integers(0, 1000)))
  x = quarters / np.float32(4) + (base.x if draw(st.booleans()) else 0)
  scale = draw(st.sampled_from([1.0, 1.0, 1e4, 1e-30, 0.0]))
  valid = draw(hnp.arrays(bool, T))
  return dataclasses.replace(base, x=x.astype(np.float32), valid=valid, scale=scale)


@pytest.mark.parametrize("entry", COMPILED, ids=lambda e: "-".join(map(str, e[:4])))
def test_compiled_layers_equal_the_oracle(entry):
  *values, T, E = entry
  row = dict(zip(NAMES, values, strict=True))
  more = [use(losses.load)] if row["router"] == "noisy_top_k" else []
  config = cases.config_of(row, E)
  config = dataclasses.replace(config, losses=(*config.losses, *more))
  by_row = row["group_size"] == "row"
  given = dict(num_rows=4 if by_row else None, group=6 if by_row else None)
  for kind in cases.KINDS:
    check(row | {"kind": kind}, config, cases.draw(kind, T, E, seed=3), **given)

  @hypothesis.given(contents(T, E))
  def drawn_freely(drawn):
    check(row, config, drawn, **given)

  drawn_freely()


# -- the dense case, and evaluation ----------------------------------------------------


@pytest.mark.parametrize(
  "E, C, kind", [(1, 3, "random"), (3, 1, "rows"), (7, 2, "rows")]
)
def test_soft_routing_equals_the_oracle(E, C, kind):
  config = MoEConfig(
    cases.D,
    E,
    gate=use(gates.slots, slots_per_expert=C),
    router=use(routers.soft),
    dispatch=use(dispatch.mix),
    experts=cases.expert(),
    losses=(),
  )
  params = cases.params_of(config)
  r = np.random.default_rng(0)
  params["gate"] = {
    "slot_DEC": r.normal(size=(cases.D, E, C)).astype(np.float32),
    "scale": np.float32(3),
  }
  for seed in range(4):
    drawn = cases.draw(kind if seed < 3 else "all padding", 24, E, seed)
    context = drawn.context(num_rows=4)
    y, info = moe(params, jnp.asarray(drawn.x), config, context=context, with_plan=True)
    logits = gates.slots(params["gate"], jnp.asarray(drawn.x), context)
    send, gather = oracle.soft(logits, drawn.valid_or_all.reshape(4, 6))
    assert_close(info.plan.dispatch, send)
    assert_close(info.plan.combine, gather)
    fns = [expert_fn(params["experts"], e) for e in range(E)]
    expected = oracle.soft_forward(drawn.x.reshape(4, 6, -1), send, gather, fns)
    assert_close(y, expected.reshape(24, -1))
    assert info.load.tolist() == [4 * C] * E and not info.dropped and not info.losses


def test_all_tokens_to_one_expert_keep_the_first_of_each_group():
  row = dict(router="top_k 1", capacity="one", dispatch="buckets", group_size=5)
  drawn = cases.draw("one expert", T, E, 11)
  _, info = cases.run(cases.config_of(row, E), drawn)
  assert np.flatnonzero(info.plan.kept).tolist() == [0, 5, 10]
  assert sorted(info.load.tolist()) == [0] * (E - 1) + [T]
  assert_close(info.dropped["capacity"], 10 / 13)
