"""PyTorch's grouped product in a plain layer, eager and compiled; transformers' too."""
# SPDX-License-Identifier: Apache-2.0

import importlib.util
from typing import Any

import torch  # pyright: ignore[reportMissingImports]
from torch.nn import functional  # pyright: ignore[reportMissingImports]

from experiments.benchmarks.peers.torch_rows import Layer, Operands


def missing(name: str) -> str | None:
  """Why it cannot run here; None: it can."""
  if name.startswith("transformers") and not importlib.util.find_spec("transformers"):
    return "transformers is not installed"
  if not hasattr(functional, "grouped_mm"):
    return f"torch {torch.__version__} has no torch.nn.functional.grouped_mm"
  return None


def plain(x_TD: Any, up_END: Any, down_EDF: Any, weight_TK: Any, expert_TK: Any) -> Any:
  """Sort, two grouped products, sort back; nothing in it waits for the device."""
  T, K = expert_TK.shape
  E = up_END.shape[0]
  sorted_N, order = torch.sort(expert_TK.reshape(-1), stable=True)
  each_E = torch.arange(E, device=sorted_N.device)
  end_E = torch.searchsorted(sorted_N, each_E, right=True).to(torch.int32)
  x_ND = x_TD[order // K]
  both = functional.grouped_mm(x_ND, up_END.transpose(1, 2), offs=end_E)
  gate, up = both.chunk(2, dim=-1)
  y_ND = functional.grouped_mm(
    functional.silu(gate) * up, down_EDF.transpose(1, 2), offs=end_E
  )
  back = torch.empty_like(order)
  back[order] = torch.arange(T * K, device=order.device)
  y_TKD = y_ND[back].view(T, K, -1)
  return (y_TKD * weight_TK[..., None].to(y_TKD.dtype)).sum(dim=1)


def eager(given: Operands) -> Layer:
  return _of(plain, given)


def compiled(given: Operands) -> Layer:
  return _of(torch.compile(plain, dynamic=False, fullgraph=True), given)


def _of(layer: Any, given: Operands) -> Layer:
  return Layer(lambda *leaves: layer(*leaves, given.expert_TK))


def transformers(given: Operands) -> Layer:
  """The experts of its Qwen3, by the implementation that it takes by itself."""
  from transformers.models.qwen3_moe import (  # pyright: ignore[reportMissingImports]
    configuration_qwen3_moe as configuration,
    modeling_qwen3_moe as modeling,
  )

  shape = given.shape
  config = configuration.Qwen3MoeConfig(
    hidden_size=shape.d_model,
    moe_intermediate_size=shape.d_ff,
    num_experts=shape.num_experts,
    num_experts_per_tok=shape.k,
    hidden_act="silu",
  )
  config._experts_implementation = "grouped_mm"
  with torch.device("meta"):
    experts = modeling.Qwen3MoeExperts(config)
  # Its parameters are the shared leaves themselves, so that gradients are of them.
  del experts.gate_up_proj, experts.down_proj
  experts.gate_up_proj, experts.down_proj = given.up_END, given.down_EDF

  def call(x_TD, _, __, weight_TK):
    return experts(x_TD, given.expert_TK, weight_TK.to(x_TD.dtype))

  return Layer(call)


LAYERS = {
  "torch grouped_mm": eager,
  "torch grouped_mm, compiled": compiled,
  "transformers experts": transformers,
}
