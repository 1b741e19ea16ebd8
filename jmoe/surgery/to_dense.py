"""Experts made one dense feed-forward again."""
# SPDX-License-Identifier: Apache-2.0

from typing import Any

from jmoe.config import Dense
from jmoe.surgery import dense
from jmoe.surgery.columns import concatenated
from jmoe.surgery.frame import Block, Layer, Model, blocks, rebuilt
from jmoe.types import wide
from jmoe.use import Use, shown


def to_dense(model: Model, *, how: str = "average") -> Model:
  """A model without sparse layers.

  What experts share comes back to the bit: an upcycled model that was not trained gives
  its parent.  A shared expert of the layer is hidden width beside that of the others.
  What chooses experts is left out, and messages among them.

  Args:
    model: with experts that are glu or mlp without biases.
    how: "average" of all experts, as wide as one; or "concatenate", all of them side by
      side, what a layer gives that weighs each of them one.

  Raises:
    ValueError: another `how`, experts that are no plain feed-forward, or a shared one
      of another kind or activation.
  """
  _check(how)
  made = [_densified(b, how) if b.sparse else b for b in blocks(model)]
  return rebuilt(model, made)


def feed_forward(layer: Layer, *, how: str = "average") -> dict[str, Any]:
  """`up`, `down` and maybe `gate`, as `upcycle.copied` takes them, of a layer.

  Arguments and errors are those of `to_dense`.
  """
  _check(how)
  config, params, _ = layer
  stacked = dense.of_experts(config, params)
  matrices: dict[str, Any] = {}
  for name, x in stacked.items():
    if how == "average":
      # Around the first one, so that equal experts give exactly themselves; in float32,
      # for NumPy adds bfloat16 in bfloat16.
      whole = x.astype(wide(x))
      matrices[name] = (whole[0] + (whole - whole[:1]).mean(0)).astype(x.dtype)
    else:
      matrices[name] = concatenated(list(x), 0 if name == "down" else 1)
  if config.shared is not None:
    if config.join.name != "add":
      raise ValueError(
        f"to_dense: join={config.join!r} weighs the shared expert by the token; only "
        "join.add can be dense."
      )
    if _unit(config.shared) != _unit(config.experts):
      raise ValueError(
        f"to_dense: shared={shown(config.shared)} beside "
        f"experts={shown(config.experts)}; one dense layer has one kind and one "
        "activation, so both must have the same."
      )
    for name, x in dense.of_experts(config, params, "shared").items():
      axis = 0 if name == "down" else 1
      matrices[name] = concatenated([matrices[name], x[0]], axis)
  return matrices


def _densified(block: Block, how: str) -> Block:
  matrices = feed_forward(block.layer, how=how)
  activation = block.layer.config.experts.get("activation")
  ff = Dense(int(matrices["up"].shape[1]), "gate" in matrices, activation)
  return dense.as_block(block, matrices, ff)


def _unit(used: Use) -> tuple[Any, ...]:
  """What each hidden unit computes, whatever their number."""
  return used.name, used.get("activation")


def _check(how: str) -> None:
  if how not in ("average", "concatenate"):
    raise ValueError(f"to_dense: how={how!r}; give 'average' or 'concatenate'.")
