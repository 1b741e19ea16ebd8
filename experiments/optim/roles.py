"""What each parameter of a `Decoder` is for, from its dotted name alone."""
# SPDX-License-Identifier: Apache-2.0

from typing import Any

ROLES = ("gate", "shared", "expert", "norm", "embedding", "matrix")
MATRICES = ("shared", "expert", "matrix")  # roles that may be matrices of a layer
# A join and an aggregation score tokens, as a gate does: all go by the name of gate.
_SECTIONS = {
  "gate": "gate",
  "join": "gate",
  "aggregate": "gate",
  "shared": "shared",
  "experts": "expert",
}
_NORMS = ("norm", "attention_norm", "ff_norm")


def role(name: str) -> str:
  """What a parameter is for: one of `ROLES`.

  "embedding" is the table of tokens at either end of the model, "matrix" any other
  matrix outside a sparse layer; biases belong to what they are added to.

  >>> role("segments.0.1.moe.gate.kernel_DE"), role("segments.0.1.attention_norm.scale")
  ('gate', 'norm')

  Raises:
    ValueError: a name that no `Decoder` gives.
  """
  parts = name.split(".")
  block = parts[3:] if parts[0] == "segments" else parts
  match block:
    case ["moe", section, _, *_] if section in _SECTIONS:
      return _SECTIONS[section]
    case [norm, "scale" | "bias"] if norm in _NORMS:
      return "norm"
    case ["embed", "embedding"] | ["unembed", "kernel" | "bias"]:
      return "embedding"
    case ["attention", "query_norm" | "key_norm", "scale"]:
      return "norm"
    case ["attention" | "ff", _, "kernel" | "bias"]:
      return "matrix"
  raise ValueError(
    f"parameter {name!r} has no role; name it in experiments/optim/roles.py."
  )


def stacked(name: str) -> int:
  """Over how many leading dims a parameter is a stack of parameters.

  The layers of a segment are one, the experts of a layer another; so is the single
  shared one.

  >>> stacked("segments.0.1.moe.experts.up_EDF"), stacked("unembed.kernel")
  (2, 0)
  """
  layers = name.startswith("segments.")
  return int(layers) + (role(name) in ("expert", "shared"))


def is_matrix(name: str, param: Any) -> bool:
  """Whether a parameter is a stack of matrices that tokens are multiplied by.

  Biases of experts, `[L,E,F]`, look like one but are a stack of vectors.
  """
  return role(name) in MATRICES and len(param.shape) - stacked(name) == 2
