"""What a traced step is divided into."""
# SPDX-License-Identifier: Apache-2.0

from experiments.benchmarks import parts, step

TEXT = """
ENTRY %main (x: f32[8]) -> f32[8] {
  %x = f32[8]{0} parameter(0)
  %a = f32[8]{0} add(%x, %x), metadata={op_name="jit(f)/vmap(jit(_moe))/gate/dot"}
  %b = f32[8]{0} sort(%a), metadata={op_name="jit(f)/vmap(jit(_moe))/assign/sort"}
  %c = f32[8]{0} add(%b, %b), metadata={op_name="jit(f)/jit(_moe)/aggregate/add"}
  ROOT %d = f32[8]{0} add(%c, %c), metadata={op_name="jit(f)/attention/add"}
}
"""


def test_routing_is_what_a_dense_layer_has_not():
  launched = {"a": (1.0, 1), "b": (2.0, 3), "c": (4.0, 1), "d": (8.0, 1), "e": (1.0, 1)}
  spent = step.divided(TEXT, launched)
  some = {name: ms for name, ms in spent.items() if ms}
  assert some == {"gate": 1.0, "front": 2.0, "messages": 4.0, "other": 9.0}
  assert tuple(spent) == parts.ALL
  arms = [dict(arm="dag=1", ms=20.0, parts=spent)]
  arms.append(dict(arm="cpu", ms=1.0, parts=step.divided(TEXT, {})))
  _, row, untraced = step._by_parts(arms)
  assert row.split()[:3] == ["dag=1", "20.0", "16.0"]
  assert row.split()[-2:] == ["3.00", "18.8%"]
  assert untraced.endswith("no trace")
