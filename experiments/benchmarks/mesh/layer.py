"""jmoe's layer from given choices over several devices, as functions of arrays.

As in `peers.ours` the gate's product and the selection are not part of it.
"""
# SPDX-License-Identifier: Apache-2.0

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

import jmoe
from experiments.benchmarks import shapes
from experiments.benchmarks.peers import ours
from experiments.benchmarks.shapes import Shape
from jmoe import combine, dispatch
from jmoe._carrying import Experts
from jmoe.assign import assign, capacity
from jmoe.kernels.varying import over
from jmoe.parallel import mesh as meshes
from jmoe.types import Context
from jmoe.use import use

AXES = ("node", "expert")  # `hierarchical` takes a host for two nodes
SPLIT = P(AXES)
SHAPES = {
  **shapes.SHAPES,
  "dsv3-256": Shape(7168, 2048, 256, 8, 8192),  # DeepSeek-V3's whole layer
}
BY_EXCHANGE = "all_gather by all_to_all"
BY_PLACE = "all_gather by ragged"
BUCKETS_BY_PLACE = "all_to_all by ragged"
OWN_FIRST = " own first"
# They need a capacity, and may drop.
BUCKETS = (
  *("all_to_all", BUCKETS_BY_PLACE, "all_to_all" + OWN_FIRST, "hierarchical"),
  "einsum",
)
DROPLESS = (
  *("all_gather", BY_EXCHANGE, BY_PLACE, "all_gather" + OWN_FIRST),
  *("ragged_all_to_all", "deduplicated", "gather"),
)
ROUTINGS = ("balanced", "skewed")
GROUP = 1024  # tokens that share slots by `einsum`, whose masks are T S k f numbers


@dataclasses.dataclass(frozen=True)
class Way:
  """How a layer runs over devices.

  Args:
    strategy: of `jmoe.dispatch`; "gather": matrices come to the tokens; `BY_EXCHANGE`:
      all_gather's way by exchanges of equal parts.
    overlap: chunks, of a strategy with buckets.
    factor: slots over the mean rows of an expert, of a strategy with buckets.
    room: rows that a device's buffer holds, over the mean of a device; None: all that
      could come.
    copies: whether exchanges of equal parts go by the GPUs' copy engines, as those of
      `OWN_FIRST` always do.
  """

  strategy: str
  overlap: int = 1
  factor: float | None = None
  room: float | None = None
  copies: bool = False

  def __str__(self) -> str:
    said = [self.strategy]
    if self.factor is not None:
      said.append(f"capacity {self.factor:g}")
    if self.overlap > 1:
      said.append(f"overlap {self.overlap}")
    if self.room is not None:
      said.append(f"room {self.room:g}")
    if self.copies:
      said.append("copy engines")
    return ", ".join(said)

  @property
  def by_copies(self) -> bool:
    """Whether XLA is told to leave exchanges to the copy engines."""
    return self.copies or self.strategy.endswith(OWN_FIRST)

  def unfit(self, n: int) -> str | None:
    """Why it makes no sense over n devices, if it does not."""
    if self.strategy == "hierarchical" and n < 4:
      return f"of {n} devices no two nodes of several can be made"
    return None


def mesh_of(n: int) -> Mesh:
  """The first n devices; from four on two nodes of them."""
  nodes = 2 if n >= 4 else 1
  sizes = {"node": nodes, "expert": n // nodes}
  return meshes.make(sizes, axes=AXES, devices=jax.devices()[:n])


def sharded(
  shape: Shape, way: Way, mesh: Mesh
) -> Callable[[Any, Array, Array, Array], tuple[Array, Array]]:
  """`(params, x_TD, weight_TK, expert_TK) -> (y_TD, f32[n] share of what was dropped)`.

  Args:
    shape: of the layer; its tokens are those of one device.
    way: how rows travel.
    mesh: of `mesh_of`; experts and tokens are split over it.
  """
  gathers = way.strategy == "gather"
  given: dict[str, Any] = {} if gathers else dict(axis=AXES)
  limit = None
  if way.strategy in BUCKETS:
    limit = use(capacity.by_factor, factor=way.factor, multiple_of=way.overlap)
    given["overlap"] = way.overlap
  carry: Any = dispatch.sort
  if not gathers:
    name, _, by = way.strategy.removesuffix(OWN_FIRST).partition(" by ")
    carry = getattr(dispatch, name)
    if by:
      given["by"] = by
    if way.strategy.endswith(OWN_FIRST):
      given["own_first"] = True
  experts = use(jmoe.experts.glu, d_ff=shape.d_ff)
  if way.strategy == "einsum":
    return _by_xla(shape, experts, limit, mesh)
  bound = None if way.room is None else int(way.room * shape.tokens * shape.k)

  def local(params, x_TD, weight_TK, expert_TK):
    if gathers:
      params = jax.tree.map(lambda w: lax.all_gather(w, AXES, tiled=True), params)
    plan = assign(
      ours.routing(shape, weight_TK, expert_TK),
      Context(),
      capacity=limit,
      max_rows=bound,
      axes=() if gathers else AXES,
    )
    dropped = 1.0 - jnp.mean(plan.kept, dtype=jnp.float32)
    home = combine.weighted_sum(plan)
    x_TD, plan, home = jax.tree.map(lambda a: over(a, AXES), (x_TD, plan, home))
    y_TD = carry(x_TD, plan, Experts(experts, params), home, **given)
    return y_TD, over(dropped, AXES)[None]

  return jax.shard_map(
    local, mesh=mesh, in_specs=(SPLIT,) * 4, out_specs=(SPLIT, SPLIT), check_vma=True
  )


def _by_xla(
  shape: Shape, experts: Any, limit: Any, mesh: Mesh
) -> Callable[..., tuple[Array, Array]]:
  """GShard's layer of whole arrays, which XLA splits; slots are shared in groups."""

  def split(tree):
    return jax.tree.map(lambda a: lax.with_sharding_constraint(a, SPLIT), tree)

  def whole(params, x_TD, *choices):
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
      y_TD, dropped = layer(*split((params, x_TD)), *choices)
      return split(y_TD), dropped

  def layer(params, x_TD, weight_TK, expert_TK):
    routing = dataclasses.replace(
      ours.routing(shape, weight_TK, expert_TK), group_size=min(GROUP, shape.tokens)
    )
    plan = assign(routing, Context(), capacity=limit)
    home = combine.weighted_sum(plan)
    y_TD = dispatch.einsum(x_TD, plan, Experts(experts, params), home, axis=AXES)
    return y_TD, 1.0 - jnp.mean(plan.kept, dtype=jnp.float32)[None]

  return whole


def alone(shape: Shape) -> Callable[..., tuple[Array, Array]]:
  """The dropless layer of one device, as `sharded` gives it."""
  layer = ours.layer(shape)

  def call(*given: Any) -> tuple[Array, Array]:
    return layer(*given), jnp.zeros(1, jnp.float32)

  return call


def step(layer: Callable[..., tuple[Array, Array]]) -> Callable[..., Any]:
  """Output, dropped share and the gradients of params, tokens and weights."""

  def call(params, x_TD, weight_TK, dy_TD, expert_TK):
    def forward(params, x_TD, weight_TK):
      return layer(params, x_TD, weight_TK, expert_TK)

    y_TD, pull, dropped = jax.vjp(forward, params, x_TD, weight_TK, has_aux=True)
    y_TD, dy_TD = jax.lax.optimization_barrier((y_TD, dy_TD))  # as in `peers.jax_rows`
    return y_TD, dropped, pull(dy_TD)

  return call


@dataclasses.dataclass(eq=False)
class Operands:
  """Of a layer over n devices: random arrays in their places, drawn when asked for.

  Args:
    shape: of the layer, with the tokens of all devices.
    where: the sharding of all of them.
    others: operands whose matrices these share.
  """

  shape: Shape
  where: Any
  others: "Operands | None" = None

  @functools.cached_property
  def drawing(self) -> tuple[Any, Any]:
    """Compiled: what draws the matrices, None if they are shared; and the tokens."""

    def matrices():
      return ours.operands(self.shape)[0]

    def tokens():
      x_TD = ours.operands(self.shape)[1]
      return x_TD, jax.random.normal(jax.random.key(9), x_TD.shape, x_TD.dtype)

    def compiled(function: Any) -> Any:
      return jax.jit(function, out_shardings=self.where).lower().compile()

    return None if self.others else compiled(matrices), compiled(tokens)

  @functools.cached_property
  def params(self) -> Any:
    return self.drawing[0]() if self.others is None else self.others.params

  @functools.cached_property
  def _tokens(self) -> tuple[Array, Array]:
    return self.drawing[1]()

  def routed(self, kind: str) -> tuple[Any, Any]:
    """(f32[T,K] weights, i32[T,K] experts), on the host; drawn once."""
    return _routed(self.shape, kind)

  def arguments(self, weight_TK: Any, expert_TK: Any) -> tuple[Any, ...]:
    """Of a function from `step`."""
    weight, expert = jax.device_put((weight_TK, expert_TK), self.where)
    x_TD, dy_TD = self._tokens
    return self.params, x_TD, weight, dy_TD, expert

  @property
  def like(self) -> tuple[Any, ...]:
    """Shapes of `arguments`, with shardings: what a compiler needs."""
    params, x_TD = jax.eval_shape(lambda: ours.operands(self.shape)[:2])
    choices = (self.shape.tokens, self.shape.k)
    weight, expert = (jax.ShapeDtypeStruct(choices, t) for t in ("float32", "int32"))
    return jax.tree.map(
      lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=self.where),
      (params, x_TD, weight, x_TD, expert),
    )

  def prepare(self, kinds: tuple[str, ...]) -> None:
    """Whatever takes long and no memory of devices."""
    _ = self.drawing
    for kind in kinds:
      self.routed(kind)

  def forget(self) -> None:
    """Lets the arrays go."""
    for name in ("params", "_tokens"):
      self.__dict__.pop(name, None)


@functools.lru_cache(maxsize=32)
def _routed(shape: Shape, kind: str) -> tuple[Any, Any]:
  made = shapes.balanced if kind == "balanced" else shapes.routing
  expert_TK, weight_TK = made(shape)
  return weight_TK, expert_TK


def operands(
  shape: Shape,
  tokens: int,
  mesh: Mesh | None,
  *,
  others: Operands | None = None,
  device: int = 0,
) -> Operands:
  """Operands.

  Args:
    shape: of the layer.
    tokens: of all devices.
    mesh: of the devices; None: one device alone.
    others: whose matrices are shared.
    device: which one, without a mesh.
  """
  where: Any = jax.sharding.SingleDeviceSharding(jax.devices()[device])
  if mesh is not None:
    where = NamedSharding(mesh, SPLIT)
  return Operands(dataclasses.replace(shape, tokens=tokens), where, others)
