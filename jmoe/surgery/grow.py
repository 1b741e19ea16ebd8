"""New experts beside those of a trained model, for text that it has not seen."""
# SPDX-License-Identifier: Apache-2.0

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jmoe._ranges import in_range
from jmoe._value_checks import whole
from jmoe.surgery.columns import check, take, together
from jmoe.surgery.cut import WHOLE, of_domain, taken
from jmoe.surgery.frame import Layer, Model, layers, on_layers
from jmoe.surgery.receipt import Sample
from jmoe.surgery.walk import Seen, walk
from jmoe.types import wide
from jmoe.use import shown

_START = 0.02  # standard deviation of a new gate column
_SHRUNK = 0.1  # share of the mean variance that a covariance gets more


def grow(
  model: Model,
  number: int,
  *,
  copied: bool = True,
  columns: Sequence[np.ndarray] | None = None,
  bias: float | None = None,
  directions: Sequence[tuple[np.ndarray, float]] | None = None,
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
      old outputs move, and at -1e9 those of a dropless layer do not (a capacity is
      shared with new experts).  None: the gate gets no bias.
    directions: of each sparse layer the gate columns of all its new experts, and their
      bias, as `apart` finds them; columns differ by a draw of deviation 0.02, so that
      no two experts get the same tokens.  In place of `columns` and `bias`.
    noise: added to copies, as a share of their standard deviation.
    seed: of what is drawn.

  Raises:
    ValueError: less than one, a gate of another kind, or both kinds of columns.
  """
  if not whole(number):
    raise ValueError(f"grow: number={shown(number)}; give a whole number of 1 or more.")
  noise = in_range("grow: noise", noise)
  if bias is not None:
    bias = in_range("grow: bias", bias, least=-math.inf)
  if directions is not None and (columns is not None or bias is not None):
    raise ValueError(
      f"grow: directions beside columns or bias={bias}; give one of the two."
    )
  biased = bias is not None or directions is not None
  random = np.random.default_rng(seed)

  def change(n: int, layer: Layer) -> Layer:
    check(layer.config)
    if layer.config.gate.name != "linear":
      raise ValueError(
        f"grow: gate={layer.config.gate!r}; new columns are made for gates.linear."
      )
    if biased:
      layer = _with_bias(layer)
    E = layer.config.num_experts
    new = take(layer, [e % E for e in range(number)])
    if new.state.bias is not None:
      # Scores of zero must not be chosen for the sake of a balance bias.
      level = layer.state.bias.min() if biased else 0  # type: ignore[union-attr]
      same = new.state.bias * 0 + level
      new = new._replace(state=dataclasses.replace(new.state, bias=same))
    params = {**new.params, "experts": _experts(new.params["experts"], random)}
    gate: dict[str, Any] = dict(params["gate"])
    kernel_DE = np.asarray(gate["kernel_DE"])
    drawn, own_bias = _START * random.standard_normal(kernel_DE.shape), bias
    if directions is not None:
      column_D, own_bias = directions[n]
      drawn += np.asarray(column_D)[:, None]
    elif columns is not None:
      column_D = np.asarray(columns[n], np.float64)
      drawn = np.tile((column_D / np.linalg.norm(column_D))[:, None], (1, number))
    gate["kernel_DE"] = drawn.astype(kernel_DE.dtype)
    if biased:
      gate["bias_E"] = np.full(number, own_bias, kernel_DE.dtype)
    return together([layer, new._replace(params={**params, "gate": gate})])

  def _experts(stacks: Any, random: np.random.Generator) -> dict[str, Any]:
    made = {}
    for name, x in stacks.items():
      x = np.asarray(x)
      if not copied and name.startswith("down"):
        x = np.zeros_like(x)
      if copied and noise:
        # Of bfloat16 NumPy makes sums in bfloat16, which stop growing.
        scale = noise * x.std(dtype=wide(x))
        x = (x + scale * random.standard_normal(x.shape)).astype(x.dtype)
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


def add_domain(layer: Layer, like: int) -> Layer:
  """A layer under `restrict.domain` with one more domain, whose experts are copies.

  PanGu-Sigma (Ren et al. 2023, arXiv 2303.10845) grows so: the outputs of the domains
  that were there stay as they are, to the bit.

  Args:
    layer: with `restrict.domain` among its restrictions.
    like: the domain whose experts are copied; the new one's number is the highest.

  Raises:
    ValueError: no such restriction, or no such domain.
  """
  copied, E = of_domain(layer, like), layer.config.num_experts
  rule = next(use for use in layer.config.restrict if use.name == "domain")
  shared = rule.get("shared") or 0  # these serve every domain, and stay the last
  own = copied[: len(copied) - shared]
  index = np.array([*range(E - shared), *own, *range(E - shared, E)])
  domains = rule.replace(num_domains=rule.get("num_domains") + 1)
  config = dataclasses.replace(
    layer.config,
    num_experts=len(index),
    restrict=tuple(domains if use is rule else use for use in layer.config.restrict),
  )
  params = {
    part: tree if part in WHOLE else taken(tree, index, E, part)
    for part, tree in layer.params.items()
  }
  bias, counted, batches = (
    getattr(layer.state, name) for name in ("bias", "counted", "batches")
  )
  state = dataclasses.replace(
    layer.state,
    bias=None if bias is None else bias[index],
    gate=taken(layer.state.gate, index, E, "state.gate"),
    # What is counted over the batches of an update is counted anew, as in `cut`.
    counted=None if counted is None else 0 * counted[index],
    batches=None if batches is None else 0 * batches,
  )
  return Layer(config, params, state)


def inputs(model: Model, samples: Sequence[Sample]) -> list[np.ndarray]:
  """f64[D] of each sparse layer: its mean input over the tokens of some samples.

  Raises:
    ValueError: no samples.
  """
  _, sums = walk(model, samples, _input)
  return [each[:-1] / max(each[-1], 1) for each in sums]


def apart(
  model: Model,
  new: Sequence[Sample],
  old: Sequence[Sequence[Sample]],
  *,
  margin: float = 4.0,
) -> list[tuple[np.ndarray, float]]:
  """For each sparse layer a gate column, f64[D], and a bias that tell texts apart.

  The linear discriminant of the layer's inputs (Fisher 1936), with a tenth of their
  mean variance added to each.  Minus `margin` is the logit at the mean input on that
  kind of old text where it is highest, so that old tokens, whose other logits are
  larger, go on to old experts.  At that on new text it is `margin`, or less where
  inputs hardly differ: no column is longer than that of the logarithm of the likelihood
  ratio.

  Args:
    model: any.
    new: packed rows of what new experts are for.
    old: of each kind of text that the model knows; all count alike.
    margin: M.

  Raises:
    ValueError: no samples, or a margin that is not over 0.
  """
  margin = in_range("apart: margin", margin, above=True)
  if not old:
    raise ValueError("apart: old=[] holds no kind of old text; give one or more.")
  found = []
  sums = [walk(model, some, _products)[1] for some in (new, *old)]
  for each in zip(*sums, strict=True):
    means, spreads = map(np.stack, zip(*map(_statistics, each), strict=True))
    both_DD = (spreads[0] + spreads[1:].mean(0)) / 2
    both_DD += _SHRUNK * np.trace(both_DD) / len(both_DD) * np.eye(len(both_DD))
    column_D = np.linalg.solve(both_DD, means[0] - means[1:].mean(0))
    nearest = (means[1:] @ column_D).max()
    rise = means[0] @ column_D - nearest
    if rise > 2 * margin:
      column_D, nearest = (2 * margin / rise * x for x in (column_D, nearest))
    found.append((column_D, float(-margin - nearest)))
  return found


def _statistics(products: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """(mean, covariance) of inputs, from `_products`."""
  mean_D, *_ = np.split(products[-1] / max(products[-1, -1], 1), [-1])
  second_DD = products[:-1, :-1] / max(products[-1, -1], 1)
  return mean_D, second_DD - np.outer(mean_D, mean_D)


def _products(seen: Seen) -> Array:
  """f32[D+1,D+1] sums over tokens of products of what the layer is given, and one."""
  x_TD = jnp.where(seen.valid_T[:, None], seen.x_TD.astype(jnp.float32), 0)
  square_DD = jnp.matmul(x_TD.T, x_TD, precision=jax.lax.Precision.HIGHEST)
  # Not one product of x_TD beside a column of ones: XLA 0.11 for CUDA fails to compile
  # it where a row of tokens comes from rows of a batch ("Reshape input and output").
  total_D1, count = x_TD.sum(0)[:, None], seen.valid_T.sum(dtype=jnp.float32)
  return jnp.block([[square_DD, total_D1], [total_D1.T, count[None, None]]])


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
