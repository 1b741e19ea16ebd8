"""How a run keeps and moves its numbers, in words: for its summary."""
# SPDX-License-Identifier: Apache-2.0

from experiments.config import Run


def policy(run: Run) -> dict[str, str]:
  """What is kept in which precision, and what moves it."""
  optim = run.optim
  narrow = run.param_dtype != "float32"
  parameters = "float32"
  if narrow:
    parameters = (
      f"{run.param_dtype}, gates and norms float32; float32 copies of the "
      f"{run.param_dtype} ones in the optimizer's state"
    )
  kinds = {
    "adamw": f"AdamW, b1={optim.b1}, b2={optim.b2}",
    "adafactor": "Adafactor without momentum, factored within each matrix of each "
    "expert and layer, relative to its size; gates not factored",
    "muon": "Muon for each matrix of each expert and layer, momentum 0.95; AdamW, "
    f"b1={optim.b1}, b2={optim.b2}, for gates, norms, biases and embeddings",
  }
  words = [
    kinds[optim.kind],
    f"{optim.schedule} learning rate of {optim.learning_rate:g} after "
    f"{optim.warmup_steps} batches of warm-up"
    + ("" if optim.schedule == "constant" else f", to {optim.end_fraction:g} of it"),
    f"gradient norm clipped at {optim.clip:g}" if optim.clip else "no clipping",
    f"weight decay {optim.weight_decay:g} on matrices",
  ]
  if optim.accumulate > 1:
    words.append(f"mean gradient of {optim.accumulate} batches an update")
  words += [
    f"{role} at {f:g} times the learning rate" for role, f in optim.role_factors
  ]
  if optim.freeze:
    words.append(f"frozen: {', '.join(optim.freeze)}")
  return {
    "parameters": parameters,
    "activations": f"{run.model.dtype}; norms and logits float32",
    "moments": "float32, as is all arithmetic of the update",
    "router": "float32 logits, scores, weights and losses; products at full precision",
    "optimizer": "; ".join(words),
  }
