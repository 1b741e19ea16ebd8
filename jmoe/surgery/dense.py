"""Dense feed-forwards as experts and experts as dense feed-forwards: their arrays."""
# SPDX-License-Identifier: Apache-2.0

from collections.abc import Mapping
from typing import Any

from jmoe.config import Dense, MoEConfig
from jmoe.surgery.frame import Block
from jmoe.use import shown

# An expert's array -> the dense feed-forward's.
_NAMES = {"gate_EDF": "gate", "up_EDF": "up", "down_EFD": "down"}
_NAMES |= {"gate_bias_EF": "gate_bias", "up_bias_EF": "up_bias"}


def of_block(block: Block) -> dict[str, Any]:
  """`gate` (if it is gated) and `up`, `[D,F]`, `down`, `[F,D]`, of a dense block.

  Raises:
    ValueError: its feed-forward is sparse.
  """
  if not isinstance(block.config.ff, Dense):
    raise ValueError(
      "a feed-forward is sparse; give a dense block, or a model that `to_dense` made."
    )
  names = [n for n in ("gate", "up", "down") if f"ff.{n}.kernel" in block.params]
  return {name: block.params[f"ff.{name}.kernel"] for name in names}


def as_block(block: Block, matrices: dict[str, Any], config: Dense) -> Block:
  """The block with a dense feed-forward of these matrices."""
  rest = {
    n: x for n, x in block.params.items() if n.partition(".")[0] not in ("moe", "ff")
  }
  made = {f"ff.{name}.kernel": x for name, x in matrices.items()}
  changed = block.config.__class__(
    block.config.attention, config, norm=block.config.norm
  )
  state = {n: x for n, x in block.state.items() if not n.startswith("moe.")}
  return Block(changed, rest | made, state)


def of_experts(config: MoEConfig, params: Any, part: str = "experts") -> dict[str, Any]:
  """The same of a layer's experts: `[E,D,F]` and `[E,F,D]`.

  Raises:
    ValueError: experts that are no plain feed-forward without biases.
  """
  used = config.experts if part == "experts" else config.shared
  assert used is not None
  if used.name not in ("glu", "mlp") or used.kwargs.get("bias"):
    raise ValueError(
      f"{part}={shown(used)}: dense feed-forwards are glu or mlp without biases."
    )
  return from_experts(params[part])


def from_experts(params: Mapping[str, Any]) -> dict[str, Any]:
  """The arrays of experts under their dense names, still stacked."""
  return {_NAMES[name]: x for name, x in params.items()}


def as_experts(matrices: Mapping[str, Any]) -> dict[str, Any]:
  """Stacked matrices under the names of an expert's parameters."""
  names = {dense: expert for expert, dense in _NAMES.items()}
  return {names[name]: x for name, x in matrices.items()}
