"""The same step in transformers, in a process that shares no memory with jax.

  compiled      torch.compile, grouped_mm experts
  eager         grouped_mm experts
  checkpointed  eager, each layer's activations computed again
  sonic         torch.compile, sonic-moe's experts, where that package is installed

bfloat16 parameters and moments, sdpa attention, fused AdamW.  Sonic-moe reads gate and
up columns interleaved, which of random matrices makes another random model.
"""
# SPDX-License-Identifier: Apache-2.0

import argparse
import importlib
import json
import math
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from experiments.benchmarks.olmoe_step.size import STEPS, Size

SETTINGS = ("compiled", "eager", "checkpointed", "sonic")


def main() -> int:
  """Measures one setting, or with `--parity` writes a small model and its logits."""
  parser = argparse.ArgumentParser()
  add = parser.add_argument
  add("--setting", choices=SETTINGS, default="eager")
  add("--size", required=True)
  add("--rounds", type=int, default=5)
  add("--out", type=Path, required=True)
  add("--parity", action="store_true")
  arguments = parser.parse_args()
  size = Size(**json.loads(arguments.size))
  if arguments.parity:
    _parity(size, arguments.out)
    return 0
  found = _measured(size, arguments.setting, arguments.rounds)
  arguments.out.write_text(json.dumps(found))
  return 0


def _measured(size: Size, setting: str, rounds: int) -> dict[str, Any]:
  torch, transformers = _module("torch"), _module("transformers")

  device = "cuda" if torch.cuda.is_available() else "cpu"
  torch.manual_seed(0)
  torch.set_float32_matmul_precision("high")
  model = _model(size, torch.bfloat16, device)
  _choose_experts(model, "sonic" if setting == "sonic" else "grouped_mm")
  model.train()
  if setting == "checkpointed":
    model.gradient_checkpointing_enable()
  params = sum(p.numel() for p in model.parameters())
  optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=device == "cuda")
  forward = torch.compile(model) if setting in ("compiled", "sonic") else model
  ids = torch.randint(0, size.vocab, (size.rows, size.seq), device=device)

  def step():
    loss = forward(input_ids=ids, labels=ids).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.detach()

  def wait():
    if device == "cuda":
      torch.cuda.synchronize()

  begin = time.perf_counter()
  losses = [step()]
  wait()
  first = time.perf_counter() - begin
  losses.append(step())
  wait()
  if device == "cuda":
    torch.cuda.reset_peak_memory_stats()
  losses.append(step())
  wait()
  peak = torch.cuda.max_memory_allocated() if device == "cuda" else 0

  side = 8192 if device == "cuda" else 512
  a, b = (torch.randn(side, side, device=device).bfloat16() for _ in range(2))

  def seconds(call, count):
    call()
    wait()
    begin = time.perf_counter()
    for _ in range(count):
      call()
    wait()
    return (time.perf_counter() - begin) / count

  ceilings, times = [], []
  for _ in range(rounds):
    ceilings.append(2 * side**3 / seconds(lambda: a @ b, 10))
    begin = time.perf_counter()
    losses += [step() for _ in range(STEPS)]
    wait()
    times.append((time.perf_counter() - begin) / STEPS)
  losses = [float(loss) for loss in losses]
  return {
    "what": f"transformers {setting}",
    "params": params,
    "ms": 1e3 * statistics.median(times),
    "ms_all": [1e3 * t for t in times],
    "ceilings_tflops": [c / 1e12 for c in ceilings],
    "peak_gb": peak / 1e9,
    "first_step_s": first,
    "losses": losses,
    "right": all(map(math.isfinite, losses)) and params == size.params,
    "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
    "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
  }


def _model(size: Size, dtype: Any, device: str) -> Any:
  """Made where it will be, in the dtype it will have."""
  torch, transformers = _module("torch"), _module("transformers")
  config = transformers.OlmoeConfig(
    vocab_size=size.vocab,
    hidden_size=size.d_model,
    intermediate_size=size.d_ff,
    num_hidden_layers=size.layers,
    num_attention_heads=size.heads,
    num_key_value_heads=size.heads,
    num_experts=size.experts,
    num_experts_per_tok=size.k,
    max_position_embeddings=size.seq,
    rms_norm_eps=1e-6,  # as flax has it, so that logits can be compared
    use_cache=False,
    output_router_logits=False,
    pad_token_id=1,
    attn_implementation="sdpa",
  )
  torch.set_default_dtype(dtype)
  try:
    with torch.device(device):
      return transformers.OlmoeForCausalLM(config)
  finally:
    torch.set_default_dtype(torch.float32)


def _choose_experts(model: Any, name: str) -> None:
  """Sets the experts' implementation; sonic-moe's is registered under its name."""
  if name == "sonic":
    known = _module("transformers.integrations.moe").ALL_EXPERTS_FUNCTIONS
    known.register("sonic", _sonic())
  try:
    model.set_experts_implementation(name)
  except (AttributeError, ValueError):  # names that only the registry knows
    for module in model.modules():
      if getattr(module, "config", None) is not None:
        module.config._experts_implementation = name


def _sonic() -> Any:
  """Experts by the package `sonicmoe`, in the form that transformers calls.

  Tiles are those found for these experts: searching them anew takes ten minutes.
  """
  from experiments.benchmarks.peers import sonic

  torch = _module("torch")
  sonic.give_tiles("olmoe")
  activation = _module("sonicmoe.enums").ActivationType.SWIGLU
  experts = _module("sonicmoe.functional").moe_general_routing_inputs

  @torch.compiler.disable
  def forward(self, hidden_states, top_k_index, top_k_weights):
    T, K = top_k_index.shape
    token = torch.arange(T, device=hidden_states.device, dtype=torch.int32)
    y, _ = experts(
      hidden_states,
      top_k_weights.reshape(-1).float(),
      token.repeat_interleave(K),
      top_k_index.reshape(-1).int(),
      self.gate_up_proj.permute(1, 2, 0),
      None,
      self.down_proj.permute(1, 2, 0),
      None,
      self.gate_up_proj.shape[0],
      torch.cuda.current_stream().cuda_stream,
      activation,
      False,
    )
    return y

  return forward


def _parity(size: Size, out: Path) -> None:
  """Writes tokens, float32 weights by jmoe's names, logits and the loss of a model."""
  import numpy as np

  torch = _module("torch")
  torch.manual_seed(0)
  model = _model(size, torch.float32, "cpu").eval()
  model.set_experts_implementation("eager")
  with torch.no_grad():
    for parameter in model.parameters():  # norms are ones, and would hide a mistake
      if parameter.ndim == 1:
        parameter.add_(0.1 * torch.randn_like(parameter))
  ids = torch.randint(0, size.vocab, (size.rows, size.seq))
  with torch.no_grad():
    said = model(input_ids=ids, labels=ids)
  found = {"tokens": ids.numpy(), "logits": said.logits.numpy()}
  found["loss"] = said.loss.numpy()
  for name, value in model.state_dict().items():
    found |= {f"params/{to}": x for to, x in _renamed(name, value.numpy())}
  np.savez(out, **found)


def _renamed(name: str, value: Any) -> list[tuple[str, Any]]:
  """A parameter of theirs under the names and with the dimensions of ours."""
  ends = {
    "model.embed_tokens.weight": ("embed.embedding", value),
    "model.norm.weight": ("norm.scale", value),
    "lm_head.weight": ("unembed.kernel", value.T),
  }
  if name in ends:
    return [ends[name]]
  _, _, layer, *rest = name.split(".")
  rest = ".".join(rest)
  prefix = f"segments.{layer}.0."
  for theirs, ours in {"q": "query", "k": "key", "v": "value", "o": "out"}.items():
    if rest == f"self_attn.{theirs}_proj.weight":
      return [(f"{prefix}attention.{ours}.kernel", value.T)]
    if rest == f"self_attn.{theirs}_norm.weight":
      return [(f"{prefix}attention.{ours}_norm.scale", value)]
  if rest == "mlp.experts.gate_up_proj":  # [E, 2 F, D]
    gate, up = (half.transpose(0, 2, 1) for half in _halves(value))
    experts = f"{prefix}moe.experts."
    return [(f"{experts}gate_EDF", gate), (f"{experts}up_EDF", up)]
  others = {
    "mlp.experts.down_proj": ("moe.experts.down_EFD", (0, 2, 1)),
    "mlp.gate.weight": ("moe.gate.kernel_DE", (1, 0)),
    "input_layernorm.weight": ("attention_norm.scale", (0,)),
    "post_attention_layernorm.weight": ("ff_norm.scale", (0,)),
  }
  to, order = others[rest]
  return [(f"{prefix}{to}", value.transpose(order))]


def _module(name: str) -> Any:
  """A module of no extra of this project: whoever compares has it."""
  return importlib.import_module(name)


def _halves(value: Any) -> tuple[Any, Any]:
  middle = value.shape[1] // 2
  return value[:, :middle], value[:, middle:]


if __name__ == "__main__":
  sys.exit(main())
