"""Every parameter of every model has the role that its name says."""
# SPDX-License-Identifier: Apache-2.0

import pytest

from experiments import optim, state as states
from experiments.optim import roles
from jmoe import gates, presets, use
from jmoe.config import Attention, BlockConfig, Dense, ModelConfig, simple
from tests.presets_test import TABLE

# Every parameter that a `Decoder` can have: its role, and whether it is a matrix.
EXPECTED = {
  "embed.embedding": ("embedding", False),
  "unembed.kernel": ("embedding", False),
  "norm.scale": ("norm", False),
  "norm.bias": ("norm", False),
  "attention_norm.scale": ("norm", False),
  "attention_norm.bias": ("norm", False),
  "ff_norm.scale": ("norm", False),
  "ff_norm.bias": ("norm", False),
  "attention.query.kernel": ("matrix", True),
  "attention.key.kernel": ("matrix", True),
  "attention.value.kernel": ("matrix", True),
  "attention.out.kernel": ("matrix", True),
  "ff.gate.kernel": ("matrix", True),
  "ff.up.kernel": ("matrix", True),
  "ff.down.kernel": ("matrix", True),
  "moe.gate.kernel_DE": ("gate", False),
  "moe.gate.bias_E": ("gate", False),
  "moe.gate.hidden_DH": ("gate", False),
  "moe.gate.out_HE": ("gate", False),
  "moe.gate.previous_EE": ("gate", False),
  "moe.gate.slot_DEC": ("gate", False),
  "moe.gate.scale": ("gate", False),
  "moe.gate.project_DP": ("gate", False),
  "moe.gate.bias_P": ("gate", False),
  "moe.gate.centre_PE": ("gate", False),
  "moe.gate.log_scale": ("gate", False),
  "moe.aggregate.kernel_MDE": ("gate", False),
  "moe.aggregate.scale_LD": ("gate", False),
  "moe.aggregate.down_LDM": ("gate", False),
  "moe.aggregate.mix_LMPM": ("gate", False),
  "moe.aggregate.up_LMD": ("gate", False),
  "moe.join.gate_D": ("gate", False),
  "moe.join.kernel_D2": ("gate", False),
  "moe.join.bias_2": ("gate", False),
  "moe.shared.gate_EDF": ("shared", True),
  "moe.shared.up_EDF": ("shared", True),
  "moe.shared.down_EFD": ("shared", True),
  "moe.shared.up_bias_EF": ("shared", False),
  "moe.shared.down_bias_ED": ("shared", False),
  "moe.experts.gate_EDF": ("expert", True),
  "moe.experts.up_EDF": ("expert", True),
  "moe.experts.down_EFD": ("expert", True),
  "moe.experts.gate_up_EDF": ("expert", True),
  "moe.experts.up_bias_EF": ("expert", False),
  "moe.experts.gate_up_bias_EF": ("expert", False),
  "moe.experts.down_bias_ED": ("expert", False),
  "moe.experts.base.gate_EDF": ("expert", True),
  "moe.experts.base.up_EDF": ("expert", True),
  "moe.experts.base.down_EFD": ("expert", True),
  "moe.experts.mix_CD2": ("expert", True),
  "moe.experts.constant_CD": ("expert", False),
}


def published():
  for name, sizes in TABLE.items():
    module, _, function = name.partition(".")
    yield getattr(getattr(presets, module), function)(**sizes)
  yield simple(16, 8, num_experts=4, gate=use(gates.cosine))


def test_every_parameter_of_every_model_has_its_role():
  attention = Attention(num_heads=2, causal=False)
  blocks = [BlockConfig(attention, ff, norm="layer") for ff in published()]
  blocks.append(BlockConfig(attention, Dense(d_ff=8)))
  segments = tuple(((block,), 3) for block in blocks)
  model = ModelConfig(11, 16, segments, norm="layer", tied=False)
  found = set()
  for name, shape in states.blueprint(model)[1].items():
    inside = name.startswith("segments.")
    local = ".".join(name.split(".")[3:]) if inside else name
    assert (optim.role(name), roles.is_matrix(name, shape)) == EXPECTED[local], name
    stack = shape.shape[: roles.stacked(name)]
    experts = optim.role(name) in ("expert", "shared")
    assert len(stack) == inside + experts and stack[:1] == (3,) * inside, name
    found.add(local)
  assert found == set(EXPECTED)
  assert {role for role, _ in EXPECTED.values()} == set(optim.ROLES)


def test_a_parameter_of_no_known_model_has_no_role():
  for name in ("head.kernel", "segments.0.0.moe.gates.kernel_DE", "segments.0.0.ff"):
    with pytest.raises(ValueError, match=f"parameter '{name}' has no role"):
      optim.role(name)
