"""Names of losses, and their weighted sum: what a training step adds to the task's."""
# SPDX-License-Identifier: Apache-2.0

import inspect
from collections.abc import Iterable, Mapping

import jax.numpy as jnp
from jax import Array

from jmoe.types import Info
from jmoe.use import Use, nearest


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


def total_loss(
  infos: Info | Iterable[Info], weights: Mapping[str, float | Array]
) -> Array:
  """f32[]: the sum over layers of weight * loss; what no weight names is left out.

  Args:
    infos: of one layer or several; under a scan over layers each loss is `[L]`.
    weights: by the names in `Info.losses`; a weight may be traced (a schedule).

  Raises:
    ValueError: no infos, or a weight whose name no info has.
  """
  infos = [infos] if isinstance(infos, Info) else list(infos)
  if not infos:
    raise ValueError("total_loss: no infos; pass what the sparse layers returned.")
  known = {name for info in infos for name in info.losses}
  for name in weights:
    if name not in known:
      raise ValueError(
        f"total_loss: weight for {name!r}, which no layer reports; "
        + (nearest(name, known) if known else "the layers have losses=().")
      )
  total = jnp.zeros((), jnp.float32)
  for info in infos:
    for name, weight in weights.items():
      if name in info.losses:
        value = jnp.sum(info.losses[name])
        total = total.astype(value.dtype) + jnp.asarray(weight, value.dtype) * value
  return total
