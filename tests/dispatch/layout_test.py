"""Row layouts: aligned, disjoint, and the inverse of themselves."""
# SPDX-License-Identifier: Apache-2.0

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jmoe import capacity, routers
from jmoe.assign import assign
from jmoe.dispatch import layout
from jmoe.types import Context
from jmoe.use import use
from tests import _cases as cases

T, E, K = 13, 5, 2


@pytest.fixture(autouse=True)
def _compiled_quickly():
  with cases.quickly():
    yield


def planned(kind: str, *, slots=None, max_rows=None, group_size=None):
  r = np.random.default_rng(0)
  logits = jnp.asarray(r.normal(size=(T, E)), jnp.float32)
  valid = np.ones(T, bool)
  if kind == "one expert":
    logits = logits.at[:, 3].add(9)
  if kind == "padding":
    valid = r.random(T) < 0.5
  if kind == "all padding":
    valid = np.zeros(T, bool)
  context = Context(valid=jnp.asarray(valid), group_size=group_size)
  routing = routers.top_k(logits, logits, logits, k=K, context=context)
  return assign(routing, context, capacity=slots, max_rows=max_rows)


PER_EXPERT = use(capacity.by_factor, factor=1.0, per_expert=(0.2, 1.0, 2.0, 1.0, 0.5))
LAYOUTS = {
  "ragged": lambda kind: (planned(kind), layout.ragged),
  "ragged, blocks of 1": lambda kind: (planned(kind), lambda p: layout.ragged(p, 1)),
  "ragged, blocks of 16": lambda kind: (planned(kind), lambda p: layout.ragged(p, 16)),
  "bounded": lambda kind: (planned(kind, max_rows=9), layout.ragged),
  "equal": lambda kind: (
    planned(kind, slots=use(capacity.fixed, slots=3)),
    layout.equal,
  ),
  "equal, in groups": lambda kind: (
    planned(kind, slots=use(capacity.fixed, slots=2), group_size=5),
    layout.equal,
  ),
  "a share per expert": lambda kind: (planned(kind, slots=PER_EXPERT), layout.equal),
  "no slots": lambda kind: (
    planned(kind, slots=use(capacity.fixed, slots=0)),
    layout.equal,
  ),
}


@pytest.mark.parametrize("kind", ["random", "one expert", "padding", "all padding"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_every_kept_assignment_has_one_row_of_its_expert(name, kind):
  plan, make = LAYOUTS[name](kind)
  made = make(plan)
  token, entry, row = (np.asarray(getattr(made, n)) for n in ("token", "entry", "row"))
  kept, N, R = np.asarray(plan.kept), T * K, made.num_rows
  assert (row[~kept] == R).all()
  assert sorted(entry[entry < N].tolist()) == np.flatnonzero(kept).tolist()
  for n in np.flatnonzero(kept):
    assert entry[row[n]] == n and token[row[n]] == n // K
  assert (token[entry == N] == T).all()

  groups = made.groups
  start, rows = np.asarray(groups.start), np.asarray(groups.rows)
  assert (start % groups.block == 0).all() and R % groups.block == 0
  end = start + -(-rows // groups.block) * groups.block
  busy = rows > 0
  assert (end[busy][:-1] <= start[busy][1:]).all() and (end[busy] <= R).all()
  for n in np.flatnonzero(kept):
    e = int(plan.routing.expert[n])
    assert start[e] <= row[n] < start[e] + rows[e]
  if groups.capacity is not None:
    assert (np.diff(start) == groups.capacity).all()


def test_the_buffer_of_a_ragged_layout_has_a_static_bound():
  # The worst case: every expert's last block holds a single row.
  for max_rows, bound in ((None, T * K), (9, 9)):
    plan = planned("random", max_rows=max_rows)
    for block in (1, 8, 16):
      made = layout.ragged(plan, block)
      most = bound + (block - 1) * min(E, bound)
      assert made.num_rows == most // block * block


def test_rows_are_gathered_without_a_scatter():
  plan = planned("padding")
  made = layout.ragged(plan)
  from jmoe.dispatch import carry
  from jmoe.types import Home

  def total(x, weight):
    rows = carry.out(x, made)
    return jnp.sum(jnp.sin(carry.home(rows, Home(weight), made)))

  x = jnp.ones((T, 4))
  text = str(jax.make_jaxpr(jax.grad(total, (0, 1)))(x, plan.routing.weight))
  assert "gather" in text and "scatter" not in text
