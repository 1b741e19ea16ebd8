"""New experts beside those of a trained model, for text that it has not seen."""
# SPDX-License-Identifier: Apache-2.0

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jmoe.surgery.columns import check, take, together
from jmoe.surgery.frame import Layer, Model, layers, on_layers
from jmoe.surgery.receipt import Sample
from jmoe.surgery.walk import Seen, walk

_START = 0.02  # standard deviation of a new gate column


def grow(
  model: Model,
  number: int,
  *,
  copied: bool = True,
  columns: Sequence[np.ndarray] | None = None,
  bias: float | None = None,
  noise: float = 0.0,
  seed: int = 0,
) -> Model:
  """A model with `number` more experts in each sparse layer; old ones stay as they are.

  What is new starts as copies of old experts, in turn, or with an output matrix of
  zero: it says nothing yet.  `freeze` names what to hold while it learns.

  Args:
    model: with sparse layers under gates.linear.
    number: of new experts, 1 or more.
    copied: start as copies of the old experts, else with nothing to say.
    columns: f[D] of each sparse layer, to length 1 the gate columns of all its new
      experts, as `inputs` on new text; None: drawn with deviation 0.02.
    bias: of the new experts' logits, beside 0 for the old ones; the lower, the less the
      old outputs move, and at -1e9 they do not.  None: the gate gets no bias.
    noise: added to copies, as a share of their standard deviation.
    seed: of what is drawn.

  Raises:
    ValueError: less than one, or a gate of another kind.
  """
  if number < 1 or noise < 0:
    raise ValueError(f"grow: number={number}, noise={noise}; give >= 1 and >= 0.")
  random = np.random.default_rng(seed)

  def change(n: int, layer: Layer) -> Layer:
    check(layer.config)
    if layer.config.gate.name != "linear":
      raise ValueError(
        f"grow: gate={layer.config.gate!r}; new columns are made for gates.linear."
      )
    if bias is not None:
      layer = _with_bias(layer)
    E = layer.config.num_experts
    new = take(layer, [e % E for e in range(number)])
    if new.state.bias is not None:
      new = new._replace(state=dataclasses.replace(new.state, bias=new.state.bias * 0))
    params = {**new.params, "experts": _experts(new.params["experts"], random)}
    gate: dict[str, Any] = dict(params["gate"])
    kernel_DE = np.asarray(gate["kernel_DE"])
    if columns is None:
      drawn = _START * random.standard_normal(kernel_DE.shape)
    else:
      column_D = np.asarray(columns[n], np.float64)
      drawn = np.tile((column_D / np.linalg.norm(column_D))[:, None], (1, number))
    gate["kernel_DE"] = drawn.astype(kernel_DE.dtype)
    if bias is not None:
      gate["bias_E"] = np.full(number, bias, kernel_DE.dtype)
    return together([layer, new._replace(params={**params, "gate": gate})])

  def _experts(stacks: Any, random: np.random.Generator) -> dict[str, Any]:
    made = {}
    for name, x in stacks.items():
      x = np.asarray(x)
      if not copied and name.startswith("down"):
        x = np.zeros_like(x)
      if copied and noise:
        x = (x + noise * x.std() * random.standard_normal(x.shape)).astype(x.dtype)
      made[name] = x
    return made

  return on_layers(model, change)


def silent(model: Model, number: int, *, bias: bool = False) -> Model:
  """The model with `number` more experts whose arrays are all zero, as their moments.

  Args:
    model: as for `grow`; or moments by the parameters' names, for `surgery.moments`.
    number: of new experts.
    bias: whether gates get one, as `grow` with `bias=` gives them.
  """

  def change(_: int, layer: Layer) -> Layer:
    layer = _with_bias(layer) if bias else layer
    new = take(layer, [e % layer.config.num_experts for e in range(number)])
    zero = jax.tree.map(np.zeros_like, (new.params, new.state))
    return together([layer, Layer(new.config, *zero)])

  return on_layers(model, change)


def inputs(model: Model, samples: Sequence[Sample]) -> list[np.ndarray]:
  """f64[D] of each sparse layer: its mean input over the tokens of some samples.

  Raises:
    ValueError: no samples.
  """
  _, sums = walk(model, samples, _input)
  return [each[:-1] / max(each[-1], 1) for each in sums]


def _input(seen: Seen) -> Array:
  """f32[D+1] the sum over tokens of what the layer is given, and their number."""
  valid_T1 = seen.valid_T[:, None]
  total_D = jnp.where(valid_T1, seen.x_TD.astype(jnp.float32), 0).sum(0)
  return jnp.append(total_D, valid_T1.sum(dtype=jnp.float32))


def freeze(before: Model) -> tuple[str, ...]:
  """For `Optim.freeze` of the grown model: all but its new experts and its gates.

  Args:
    before: the model that `grow` was given.

  Raises:
    ValueError: layers with unequal numbers of experts, which `freeze` cannot name.
  """
  sizes = {layer.config.num_experts for layer in layers(before)}
  if len(sizes) != 1:
    raise ValueError(
      f"freeze: layers of {sorted(sizes)} experts; a run freezes the same numbers in "
      "all of them, so grow a model whose layers have as many each."
    )
  shared = any(".moe.shared." in name for name in before.params)
  old = ",".join(str(e) for e in range(sizes.pop()))
  roles = ("embedding", "matrix", "norm", *(["shared"] if shared else []))
  return (*roles, f"experts:{old}")


def _with_bias(layer: Layer) -> Layer:
  """The same layer with a bias for each logit; 0 if it had none."""
  gate = dict(layer.params["gate"])
  if "bias_E" in gate:
    return layer
  gate["bias_E"] = np.zeros(
    layer.config.num_experts, np.asarray(gate["kernel_DE"]).dtype
  )
  config = dataclasses.replace(layer.config, gate=layer.config.gate.replace(bias=True))
  return Layer(config, {**layer.params, "gate": gate}, layer.state)
