"""Arrays of a changed model, laid out over the mesh of those they come from."""
# SPDX-License-Identifier: Apache-2.0

from collections.abc import Mapping
from typing import Any

import jax
from jax.core import Tracer
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jmoe.parallel.rules import product


def laid_out(made: Mapping[str, Any], like: Mapping[str, Any]) -> dict[str, Any]:
  """The arrays, split over the mesh as those of their names were.

  Args:
    made: arrays by dotted name, as of `surgery.Model`.
    like: those that they come from.  Where no array of a name is there, the first of
      the same name below its block says how it lies.

  Returns:
    `made` as it is if `like` is of NumPy or on one device.  Otherwise arrays over the
    mesh of `like`: of the same spec, but for dimensions that their axes do not divide
    any more, which are whole on every device, as arrays of new names are.
  """
  known = {name: x.sharding for name, x in like.items() if _is_split(x)}
  if not known:
    return dict(made)
  by_tail: dict[str, NamedSharding] = {}
  for name, at in known.items():
    by_tail.setdefault(_tail(name), at)
  mesh = next(iter(known.values())).mesh
  none = NamedSharding(mesh, PartitionSpec())
  return {
    name: jax.device_put(
      x, _fitting(known.get(name) or by_tail.get(_tail(name)) or none, x.shape)
    )
    for name, x in made.items()
  }


def _is_split(x: Any) -> bool:
  # Within a trace there is no layout to read; the compiler chooses it.
  if not isinstance(x, jax.Array) or isinstance(x, Tracer):
    return False
  if not isinstance(x.sharding, NamedSharding):
    return False
  return isinstance(x.sharding.mesh, Mesh) and x.sharding.mesh.size > 1


def _tail(name: str) -> str:
  """What comes after segments.N.N., of which a changed model may have others."""
  parts = name.split(".")
  return ".".join(parts[3:] if parts[0] == "segments" else parts)


def _fitting(at: NamedSharding, shape: tuple[int, ...]) -> NamedSharding:
  """The same sharding, of dimensions that can still be split so."""
  dims = []
  for size, axes in zip(shape, at.spec, strict=False):
    names = () if axes is None else (axes,) if isinstance(axes, str) else axes
    dims.append(None if size % product(names, at.mesh.shape) else axes)
  return NamedSharding(at.mesh, PartitionSpec(*dims))
