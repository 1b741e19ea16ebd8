"""Which mesh axes split what: tables as data, and the specs that follow from them.

A table maps logical axes to mesh axes.  Parameters say their logical axes themselves,
by the letters that end their names: `gate_EDF` is experts by d_model by d_ff.
"""
# SPDX-License-Identifier: Apache-2.0

import dataclasses
import math
import numbers
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jmoe._spelling import spelt_fields
from jmoe.use import shown

Axes = tuple[str, ...]
# Letters at the end of a parameter's name, and the logical axis of each.
_LETTERS = {"E": "expert", "D": "d_model", "F": "d_ff"}
# Parts of a layer whose matrices are split; the others are small, and whole everywhere.
_SPLIT = {"experts": "EDF", "shared": "DF"}
_IN, _OUT = ("d_model", "heads"), ("heads", "d_model")
# Dimensions of one matrix, each of which needs axes of its own.
_TOGETHER = (
  ("expert", "d_model"),
  ("expert", "d_ff"),
  ("d_model", "d_ff"),
  ("d_model", "heads"),
  ("d_model", "vocab"),
)
# The other parameters of a model: module, name -> the logical axes of the last
# dimensions.  What is not listed, norms and gates, is whole everywhere.
_MODEL: dict[tuple[str, ...], tuple[str, str]] = {
  ("embed", "embedding"): ("vocab", "d_model"),
  ("unembed", "kernel"): ("d_model", "vocab"),
  ("query", "kernel"): _IN,
  ("key", "kernel"): _IN,
  ("value", "kernel"): _IN,
  ("out", "kernel"): _OUT,
  ("gate", "kernel"): ("d_model", "d_ff"),
  ("up", "kernel"): ("d_model", "d_ff"),
  ("down", "kernel"): ("d_ff", "d_model"),
}


@spelt_fields
@dataclasses.dataclass(frozen=True)
class Rules:
  """A table: for each logical axis the mesh axes that split it.

  Mesh axes that a mesh does not have, or that have size 1, count as not listed, so one
  table serves meshes of many shapes.

  Where a mesh axis splits a matrix and the tokens too, the matrix is gathered before it
  is used and its gradient is summed and split again (FSDP).  Matrices of experts rest
  as whole experts where these divide (`split_dims`): parts of d_model would come in
  another order than kernels read, and be copied each time.  Where it splits d_ff but
  not the tokens, each device has a part of the hidden layer, and the outputs are summed
  (tensor parallelism).
  """

  tokens: Axes = ()  # the first dimension of activations; rows, or single tokens
  sequence: Axes = ()  # the sequence dimension of activations
  expert: Axes = ()  # whole experts
  d_model: Axes = ()  # of the matrices of experts and of the dense layers
  d_ff: Axes = ()  # of experts' hidden layers
  heads: Axes = ()  # of attention, in a model
  vocab: Axes = ()  # of the embedding, in a model
  # The expert that each slot of the expert axis holds, if some are there twice: from
  # `experts.layout`.  Matrices then rest split over d_model instead of by experts.  On
  # a mesh without expert axes each expert is there once.
  placement: tuple[int, ...] | None = None

  def __post_init__(self):
    for field in dataclasses.fields(self)[:-1]:
      axes = getattr(self, field.name)
      axes = (axes,) if isinstance(axes, str) else axes
      if not isinstance(axes, tuple) or not all(isinstance(a, str) for a in axes):
        raise TypeError(
          f"Rules: {field.name}={shown(axes)} must be a tuple of names of mesh axes."
        )
      if len(set(axes)) != len(axes):
        raise ValueError(
          f"Rules: {field.name}={axes} lists an axis twice; give each axis once."
        )
      object.__setattr__(self, field.name, axes)
    if both := set(self.tokens) & set(self.sequence):
      raise ValueError(
        f"Rules: {sorted(both)[0]!r} splits tokens and sequence; leave it in one."
      )
    for one, other in _TOGETHER:
      if both := set(getattr(self, one)) & set(getattr(self, other)):
        raise ValueError(
          f"Rules: {sorted(both)[0]!r} splits {one} and {other}, which are dimensions "
          "of one matrix; leave it in one."
        )
    if (slots := self.placement) is not None:
      if not (isinstance(slots, tuple | list) and all(map(_number, slots))):
        raise TypeError(
          f"Rules: placement={shown(slots)} must be a tuple of numbers of experts; "
          "make it with experts.layout.replicate."
        )
      object.__setattr__(self, "placement", tuple(map(int, slots)))

  @property
  def named(self) -> Axes:
    """Every mesh axis that the table names."""
    fields = [field.name for field in dataclasses.fields(self)[:-1]]
    return tuple(dict.fromkeys(axis for name in fields for axis in getattr(self, name)))

  def axes(self, name: str, sizes: Mapping[str, int]) -> Axes:
    """The axes of a mesh that split a logical axis in more than one."""
    return tuple(a for a in getattr(self, name) if sizes.get(a, 1) > 1)


DATA = Rules(tokens=("data",))
FSDP = Rules(tokens=("data", "fsdp"), sequence=("context",), d_model=("fsdp",))
EXPERT = Rules(tokens=("data", "expert"), expert=("expert",))
EXPERT_FSDP = Rules(
  tokens=("data", "fsdp", "expert"),
  sequence=("context",),
  expert=("expert",),
  d_model=("fsdp",),
)
EXPERT_TENSOR = Rules(
  tokens=("data", "fsdp", "expert"),
  sequence=("context",),
  expert=("expert",),
  d_model=("fsdp",),
  d_ff=("tensor",),
  heads=("tensor",),
  vocab=("tensor",),
)
TABLES = {
  "data": DATA,
  "fsdp": FSDP,
  "expert": EXPERT,
  "expert_fsdp": EXPERT_FSDP,
  "expert_tensor": EXPERT_TENSOR,
}


def _number(value: Any) -> bool:
  return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def product(axes: Sequence[str], sizes: Mapping[str, int]) -> int:
  """How many parts some mesh axes make."""
  return math.prod(sizes.get(a, 1) for a in axes)


def spec(*dims: Axes) -> PartitionSpec:
  """A PartitionSpec from the mesh axes of each dimension."""
  return PartitionSpec(*(None if not a else a[0] if len(a) == 1 else a for a in dims))


def letters(name: str) -> str:
  """The dimensions that a parameter's name says: "EDF" of `gate_EDF`."""
  return name.rpartition("_")[2]


def split_dims(
  part: str,
  name: str,
  shape: Sequence[int],
  rules: Rules,
  sizes: Mapping[str, int],
) -> dict[int, Axes]:
  """Dimension, counted from the end, -> the mesh axes that split it.

  Axes of d_model split experts instead, after their own axes, where all of them
  together divide the experts: what is gathered then lies as kernels read it.

  Args:
    part: "experts", "shared", or another part of a layer, which is whole everywhere.
    name: of the parameter.
    shape: of the whole parameter.
    rules: the table.
    sizes: of the mesh.
  """
  dims, of = letters(name), _SPLIT.get(part, "")
  found: dict[int, Axes] = {}
  for i, letter in enumerate(dims):
    if letter not in of:
      continue
    axes = rules.axes(_LETTERS[letter], sizes)
    if letter == "D" and "F" not in dims:
      continue  # a bias: small, and whole but for its experts
    if rules.placement is not None and part == "experts":
      if letter == "E":
        continue
      if letter == "D":
        axes += rules.axes("expert", sizes)
    if axes:
      found[i - len(dims)] = axes
  at_E, at_D = (dims.find(letter) - len(dims) for letter in "ED")
  if part == "experts" and rules.placement is None and at_D in found:
    axes = found.get(at_E, ()) + found[at_D]
    if shape[at_E] % product(axes, sizes) == 0:
      del found[at_D]
      found[at_E] = axes
  return found


def param_specs(params: Any, rules: Rules, sizes: Mapping[str, int]) -> Any:
  """The PartitionSpec of every parameter of a layer or of a model.

  Args:
    params: the tree of `moe_init`, or of a model that holds such trees, arrays or
      shapes; dimensions before those that names tell (stacked layers) are not split.
    rules: the table.
    sizes: mesh axis -> size, as `mesh.shape`.

  Returns:
    A tree of the same structure.
  """

  def one(path: Any, leaf: Any) -> PartitionSpec:
    names = [str(step.key) for step in path if hasattr(step, "key")]
    dims: list[Axes] = [()] * len(leaf.shape)
    part = next((name for name in reversed(names) if name in _SPLIT), "")
    split = split_dims(part, names[-1], leaf.shape, rules, sizes)
    for i, name in enumerate(logical := _MODEL.get(tuple(names[-2:]), ())):
      split[i - len(logical)] = rules.axes(name, sizes)
    for at, axes in split.items():
      dims[at] = axes
    return spec(*dims)

  return jax.tree_util.tree_map_with_path(one, params)


def activation_spec(rank: int, rules: Rules, sizes: Mapping[str, int]) -> PartitionSpec:
  """The spec of activations `[T,D]`, or `[B,...,S,D]` of rank 3 and more."""
  tokens, sequence = rules.axes("tokens", sizes), rules.axes("sequence", sizes)
  if rank == 2:
    return spec(tokens + sequence)
  return spec(tokens, *[()] * (rank - 3), sequence)


def bytes_per_device(
  shape: Sequence[int], itemsize: int, at: PartitionSpec, sizes: Mapping[str, int]
) -> int:
  """Bytes of one device's share of an array."""
  total = math.prod(shape) * itemsize
  for axes in at:
    names = () if axes is None else (axes,) if isinstance(axes, str) else axes
    total //= product(names, sizes)
  return total


def shard_params(params: Any, rules: Rules, mesh: Mesh) -> Any:
  """The parameters of a layer, laid out over a mesh as its table says.

  On axes of one type a jitted step that returns them need not be told their shardings
  to be compiled once; if it is, by each parameter's own `.sharding`, as `param_specs`
  spells the same otherwise.

  Args:
    params: the tree of `moe_init`.
    rules: the table.
    mesh: of devices.

  Raises:
    ValueError: axes do not divide a dimension of a parameter.
  """
  specs = param_specs(params, rules, mesh.shape)
  jax.tree_util.tree_map_with_path(
    lambda path, leaf, at: _divisible(path, leaf.shape, at, mesh.shape), params, specs
  )

  typed = AxisType.Explicit in mesh.axis_types

  def placed(leaf: Any, at: PartitionSpec) -> Any:
    at = at if typed else _as_given_back(at)
    return jax.device_put(leaf, NamedSharding(mesh, at))

  return jax.tree.map(placed, params, specs)


def _as_given_back(at: PartitionSpec) -> PartitionSpec:
  """A spec as jax spells that of a result that XLA placed.

  A step whose parameters come back spelt otherwise is compiled a second time.
  """
  dims = list(at)
  while dims and dims[-1] is None:
    dims.pop()
  return PartitionSpec(*dims)


def _divisible(
  path: Any, shape: Sequence[int], at: PartitionSpec, sizes: Mapping[str, int]
) -> None:
  """Raises where axes do not divide a dimension of a parameter."""
  for dim, axes in enumerate(at):
    names = () if axes is None else (axes,) if isinstance(axes, str) else axes
    n = product(names, sizes)
    if shape[dim] % n:
      from jmoe._mesh_checks import near  # which reads tables

      said = ", ".join(f"{a}={sizes[a]}" for a in names)
      raise ValueError(
        f"params{jax.tree_util.keystr(path)} has shape {tuple(shape)}, of which "
        f"{shape[dim]} is not divisible by the axes {said}; use {near(shape[dim], n)} "
        "there, or other sizes of the mesh."
      )
