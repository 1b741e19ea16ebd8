"""Names of losses, and their weighted sum: what a training step adds to the task's."""
# SPDX-License-Identifier: Apache-2.0

import inspect
import math
import numbers
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jmoe.types import Info
from jmoe.use import Use, nearest, shown


def loss_name(loss: Use) -> str:
  """The key of a loss in `Info.losses`: the function, its scope and its modality.

  The scope is left out where it is the function's default.

  >>> from jmoe import losses, use
  >>> loss_name(use(losses.load_balance)), loss_name(use(losses.router_z, over="mesh"))
  ('load_balance', 'router_z_mesh')
  >>> loss_name(use(losses.entropy_local, modality=1))
  'entropy_local_m1'
  """
  name = loss.name
  default = inspect.signature(loss.function).parameters.get("over")
  over = loss.kwargs.get("over")
  if over is not None and (default is None or over != default.default):
    name += f"_{over}"
  modality = loss.kwargs.get("modality")
  return name if modality is None else f"{name}_m{modality}"


def batches_of_update(losses: Iterable[Use]) -> int:
  """How many batches a layer's losses gather choices over; 1 if none does."""
  return max([1, *(loss.kwargs.get("accumulate", 1) for loss in losses)])


def total_loss(
  infos: Info | Iterable[Info], weights: Mapping[str, float | Array]
) -> Array:
  """f32[]: the sum over layers of weight * loss; what no weight names is left out.

  Args:
    infos: of one layer or several; under a scan over layers each loss is `[L]`.
    weights: by the names in `Info.losses`, finite; one may be traced (a schedule).

  Raises:
    TypeError: an info or a weight of another kind.
    ValueError: no infos, a weight whose name no info has, or one that is not finite.
  """
  infos = _infos(infos)
  if not isinstance(weights, Mapping):
    raise TypeError(
      f"total_loss: weights={shown(weights)} is no dict; give one by the names in "
      "Info.losses, as {'load_balance': 0.01}."
    )
  known = {name for info in infos for name in info.losses}
  for name in weights:
    if name not in known:
      raise ValueError(
        f"total_loss: weight for {name!r}, which no layer reports; "
        + (nearest(str(name), known) if known else "the layers have losses=().")
      )
    _weight(name, weights[name])
  total = jnp.zeros((), jnp.float32)
  for info in infos:
    for name, weight in weights.items():
      if name in info.losses:
        value = jnp.sum(info.losses[name])
        total = total.astype(value.dtype) + jnp.asarray(weight, value.dtype) * value
  return total


def _infos(infos: Any) -> list[Info]:
  if isinstance(infos, Info):
    return [infos]
  remedy = "pass the Info, or a list of those, that the sparse layers returned"
  if isinstance(infos, str | Mapping) or not isinstance(infos, Iterable):
    raise TypeError(f"total_loss: infos={shown(infos)} is no Info; {remedy}.")
  infos = list(infos)
  for i, info in enumerate(infos):
    if not isinstance(info, Info):
      raise TypeError(f"total_loss: infos[{i}]={shown(info)} is no Info; {remedy}.")
  if not infos:
    raise ValueError(f"total_loss: no infos; {remedy}.")
  return infos


def _weight(name: str, weight: Any) -> None:
  array = isinstance(weight, Array | np.ndarray | np.generic)
  if array and (weight.shape != () or not jnp.issubdtype(weight.dtype, jnp.number)):
    raise ValueError(
      f"total_loss: weight for {name!r} has shape {weight.shape} and dtype "
      f"{weight.dtype}; give one number."
    )
  if not array and (isinstance(weight, bool) or not isinstance(weight, numbers.Real)):
    raise TypeError(
      f"total_loss: weight for {name!r} is {shown(weight)}; give a number."
    )
  # An array on a device is not read: a training step would wait for it.
  if not isinstance(weight, jax.Array) and not math.isfinite(weight):
    raise ValueError(
      f"total_loss: weight for {name!r} is {weight}; give a finite number."
    )
