"""The front's share: parts by scope, and results that loops in NumPy agree with."""
# SPDX-License-Identifier: Apache-2.0

import dataclasses
import json
import os

import jax
import numpy as np
import pytest

from experiments.benchmarks import front, front_check, parts

TINY = "--tokens 300 --experts 16 --k 4 --d-model 128 --d-ff 64 --rounds 1".split()


@pytest.mark.parametrize(
  ("name", "expected"),
  [
    ("jit(step)/jvp(jit(_moe))/gate/TD,DE->TE/dot_general", "gate"),
    ("jit(step)/transpose(jvp(jit(_moe)))/route/mul", "front"),
    ("jit(f)/jit(_moe)/carry/layout/select_n", "front"),
    ("jit(f)/jit(_moe)/carry/experts/rows/spread_rows/pallas_call", "rows"),
    ("jit(f)/transpose(jvp(experts))/dot_general", "experts"),
    ("jit(f)/while/body/transpose(jvp(vmap(jit(_moe))))/aggregate/mul", "messages"),
    ("jit(f)/jit(_moe)/add", None),
  ],
)
def test_the_innermost_scope_says_the_part(name, expected):
  assert parts.part(name) == expected


def test_a_fusion_without_a_name_is_what_is_inside_it():
  text = """
%inside (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  ROOT %a = f32[8]{0} add(%p, %p), metadata={op_name="jit(f)/assign/add"}
}

ENTRY %main (x: f32[8]) -> (f32[8], s32[]) {
  %x = f32[8]{0} parameter(0)
  %one = f32[8]{0} fusion(%x), kind=kLoop, calls=%inside
  %two = (f32[8]{0}, s32[]) custom-call(%one), metadata={op_name="jit(f)/rows/call"}
  ROOT %three = f32[8]{0} get-tuple-element(%two), index=0
}
"""
  assert parts.operations(text) == ["one", "two"]
  belongs = parts.parts_of(text)
  assert (belongs["one"], belongs["two"]) == ("front", "rows")


def test_compiled_layers_have_every_part():
  """Also those of the gradient: scopes reach what is differentiated by hand."""
  config = front.ready(front.parsed(TINY))[1]["softmax, dropless"]
  given = jax.eval_shape(lambda: front.operands(config, 300))
  text = jax.jit(front.functions(config)[1]).lower(*given).compile().as_text()
  assert set(parts.PARTS) <= set(parts.parts_of(text).values())


def test_results_are_checked_and_written(tmp_path, monkeypatch, capsys):
  monkeypatch.setenv("XLA_FLAGS", os.environ.get("XLA_FLAGS", ""))
  out = tmp_path / "figures.json"
  name, ready = "sigmoid, dropless", front.ready
  assert front.main(["--score", "cosine"]) == 2
  assert "use softmax or sigmoid" in capsys.readouterr().err
  monkeypatch.setattr(
    front, "ready", lambda given: (None, {name: ready(given)[1][name]})
  )
  assert front.main([*TINY, "--score", "sigmoid", "--out", str(out)]) == 0
  found = json.loads(out.read_text())
  rows = found["rows"]
  assert [row["kind"] for row in rows] == ["forward", "step"]
  assert [row["kind"] for row in found["gate"]] == ["forward", "step"] * 2
  for row in found["gate"]:
    assert row["errors"].pop("d tokens", 0) < 1e-2  # in bfloat16
    assert 0 < max(row["errors"].values()) < 1e-6
  assert all(row["clock"] and row["ms"] > 0 and not row["wrong"] for row in rows)
  assert "by the clock" in capsys.readouterr().out


def test_parts_add_up_to_the_layer():
  text = """
ENTRY %main (x: f32[8]) -> f32[8] {
  %a = f32[8]{0} add(%x, %x), metadata={op_name="jit(f)/route/add"}
  ROOT %b = f32[8]{0} add(%a, %a), metadata={op_name="jit(f)/experts/add"}
}
"""
  row = front.divided(text, {"a": (0.5, 2), "b": (1.5, 1), "copy": (2, 1)})
  assert row["ms"] == 4
  shares = {name: figures["share"] for name, figures in row["parts"].items()}
  assert (shares["front"], shares["experts"], shares["other"]) == (0.125, 0.375, 0.5)
  assert row["parts"]["front"]["launches"] == 2


def test_a_wrong_front_is_found():
  config = front.ready(front.parsed(TINY))[1]["softmax, capacity 1.25"]
  params, x_TD, _ = front.operands(config, 300)
  y_TD, plan, layout = jax.tree.map(np.array, front_check.made(config, params, x_TD))

  def said(y_TD=y_TD, plan=plan, layout=layout):
    return front_check.wrong(config, params, x_TD, y_TD, plan, layout)

  def off(tree, field):
    """With one number that is another."""
    array = getattr(tree, field).copy()
    array[0] += 1
    return dataclasses.replace(tree, **{field: array})

  assert said() is None
  for field, reason in (
    ("expert", "chose"),
    ("weight", "weights"),
    ("probs", "scores"),
  ):
    changed = dataclasses.replace(plan, routing=off(plan.routing, field))
    assert f"{reason}" in said(plan=changed)
  assert "the queue" in said(plan=off(plan, "slot"))
  assert "numbers of" in said(plan=off(plan, "load"))
  for field in ("token", "entry", "row"):
    assert "row" in said(layout=off(layout, field))
  assert "the output of token 0" in said(y_TD=y_TD + 1)
