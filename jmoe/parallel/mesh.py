"""The one place that builds meshes.

A mesh is devices in a grid whose axes have names.  Which arrays an axis splits is said
by `jmoe.parallel.rules`; a layer finds the mesh that `jax.set_mesh` made current.
"""
# SPDX-License-Identifier: Apache-2.0

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax import Array
from jax.interpreters import pxla
from jax.sharding import AbstractMesh, AxisType, Mesh, PartitionSpec

from jmoe.use import nearest, shown

# Copies of the model, slices of its matrices, experts, slices of an expert's hidden
# layer, slices of a sequence.
AXES = ("data", "fsdp", "expert", "tensor", "context")

# Where jax keeps the mesh of a `with mesh:` block; it says so nowhere else.
with warnings.catch_warnings():
  warnings.simplefilter("ignore", DeprecationWarning)
  _RESOURCES: Any = getattr(pxla, "thread_resources", None)


def make(
  sizes: str | Mapping[str, int],
  *,
  axes: Sequence[str] = AXES,
  devices: Sequence[Any] | None = None,
  explicit: bool = False,
) -> Mesh:
  """A mesh of all devices.

  >>> dict(make("data=1,expert=1", devices=jax.devices()[:1]).shape)
  {'data': 1, 'expert': 1}

  Args:
    sizes: "data=2,expert=4", or a mapping; slowest axis first.  An axis may be left out
      or have size 1.
    axes: the names that are known; give others to rename them.
    devices: what the mesh is made of; None: all of this job's.
    explicit: axis types of `jax.sharding.AxisType.Explicit`; else Auto.

  Returns:
    A mesh for `jax.set_mesh`.  One made with `jax.make_mesh` does as well.

  Raises:
    ValueError: a name that is not known or stands twice, a size that is no positive
      whole number, or another product than there are devices.
    TypeError: sizes that are neither.
  """
  sizes = parse(sizes, axes=axes)
  devices = list(jax.devices()) if devices is None else list(devices)
  if not devices:
    raise ValueError("mesh: devices=[] holds none; give some, as jax.devices().")
  check_product(sizes, len(devices))
  kind = AxisType.Explicit if explicit else AxisType.Auto
  return jax.make_mesh(
    tuple(sizes.values()), tuple(sizes), (kind,) * len(sizes), devices=devices
  )


def parse(
  sizes: str | Mapping[str, int], *, axes: Sequence[str] = AXES
) -> dict[str, int]:
  """The size of each axis, in the order given.

  >>> parse("data=2, expert=4")
  {'data': 2, 'expert': 4}

  Raises:
    ValueError: as `make`, but for the number of devices.
  """
  if not isinstance(sizes, str | Mapping):
    raise TypeError(
      f"mesh: {shown(sizes)} is no text and no mapping; write 'data=2,expert=4'."
    )
  pairs = _split(sizes) if isinstance(sizes, str) else list(sizes.items())
  found: dict[str, int] = {}
  for name, size in pairs:
    if name not in axes:
      raise ValueError(f"mesh: unknown axis {name!r}; {nearest(name, axes)}")
    if name in found:
      raise ValueError(f"mesh: axis {name!r} is listed twice; give each axis once.")
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
      raise ValueError(
        f"mesh: {name}={shown(size)} must be a whole number of at least 1."
      )
    found[name] = size
  if not found:
    raise ValueError(f"mesh: {shown(sizes)} names no axis; write 'data=8'.")
  return found


def sizes_of(
  sizes: str | Mapping[str, int] | Mesh | AbstractMesh, axes: Sequence[str]
) -> dict[str, int]:
  """The size of each axis of a mesh, or of a text or mapping as `parse` takes them."""
  if isinstance(sizes, Mesh | AbstractMesh):
    return dict(sizes.shape)
  return parse(sizes, axes=axes)


def _split(text: str) -> list[tuple[str, Any]]:
  pairs = []
  for part in filter(None, (part.strip() for part in text.split(","))):
    name, equals, size = (piece.strip() for piece in part.partition("="))
    if not equals:
      raise ValueError(f"mesh: {part!r} has no size; write '{name}=2'.")
    pairs.append((name, int(size) if size.isdecimal() else size))
  return pairs


def check_product(sizes: Mapping[str, int], num_devices: int) -> None:
  """Raises unless the sizes multiply to a number of devices."""
  product = math.prod(sizes.values())
  if product == num_devices:
    return
  text = ",".join(f"{name}={size}" for name, size in sizes.items())
  fits = []
  for name, size in sizes.items():  # one size changed
    rest = product // size
    if num_devices % rest == 0:
      fits.append(f"{name}={num_devices // rest}")
  remedy = f"{' or '.join(fits)} would do" if fits else f"give sizes of {num_devices}"
  raise ValueError(
    f"mesh: {text} is {product} devices, but there are {num_devices}; {remedy}."
  )


def current() -> AbstractMesh | None:
  """The mesh that `jax.set_mesh` made current; None if there is none."""
  mesh = jax.sharding.get_abstract_mesh()
  return None if mesh is None or mesh.empty else mesh


def refuse_entered(rules: Any) -> None:
  """Raises in a `with mesh:` block, where a table would be passed over in silence.

  The block is older than `jax.set_mesh` and makes no mesh current; to be called where
  `current()` is None.
  """
  entered = getattr(_RESOURCES, "env", None)
  if entered is not None and entered.physical_mesh.size > 1:
    names = entered.physical_mesh.axis_names
    raise ValueError(
      f"sharding={shown(rules)} in `with mesh:` of axes {names}: a layer does not see "
      "that mesh; write `with jax.set_mesh(mesh):`, or use sharding=None."
    )


def manual_axes(mesh: AbstractMesh) -> tuple[str, ...]:
  """The axes over which the code at hand already runs inside `shard_map`."""
  kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
  return tuple(name for name, kind in kinds if kind == AxisType.Manual)


def has_explicit(mesh: AbstractMesh) -> bool:
  """Whether arrays carry their shardings in their types."""
  return AxisType.Explicit in mesh.axis_types


def is_explicit(axis: str) -> bool:
  """Whether arrays carry in their types what this axis of the current mesh splits."""
  mesh = current()
  kinds = (
    {} if mesh is None else dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
  )
  return kinds.get(axis) == AxisType.Explicit


def of_types(at: PartitionSpec) -> PartitionSpec:
  """What a spec says of such axes: a mesh may have axes of both types."""

  def kept(axes: Any) -> Any:
    names = () if axes is None else (axes,) if isinstance(axes, str) else axes
    names = tuple(filter(is_explicit, names))
    return names[0] if len(names) == 1 else names or None

  return PartitionSpec(*map(kept, at))


def typed_like(y: Array, x: Array) -> Array:
  """An output that has the input's shape, with the sharding of the input's type."""
  if y.shape != x.shape:
    return y
  return jax.sharding.reshard(y, jax.typeof(x).sharding.spec)
