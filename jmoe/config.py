"""What a layer, a block and a model are, as frozen data; one field per stage.

A run is a Python function returning such data; a change of a run is a change of that
function, or `dataclasses.replace`.  Everything is checked when it is built.
"""
# SPDX-License-Identifier: Apache-2.0

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jmoe import (
  checks,
  combine,
  dispatch,
  experts,
  gates,
  join,
  losses as loss,
  routers,
  score,
)
from jmoe.assign import (
  capacity as capacities,
  priority as priorities,
  renormalise as renormalises,
)
from jmoe.parallel.rules import Rules
from jmoe.use import Use, shown, use


@checks.named
@dataclasses.dataclass(frozen=True)
class MoEConfig:
  """One sparse layer: a function, with its keywords, for each stage of the flow.

  Fields are in the order in which a token meets them.  `None` leaves a stage out;
  `capacity=None` is dropless.

  Raises:
    ValueError, TypeError: at construction, naming the field, its value and the remedy.
  """

  d_model: int
  num_experts: int
  input_noise: Use | None = None  # on a copy of x that only the gate sees
  gate: Use = use(gates.linear)
  logit_noise: Use | None = None  # on what is scored, and so on the weights
  score: Use = use(score.softmax)
  select_noise: Use | None = None  # on a copy of the logits that only selects
  restrict: tuple[Use, ...] = ()
  rescore: bool = False  # score anew within the restriction (EMO, extraction)
  router: Use = use(routers.top_k, k=2)
  group_size: int | str | None = None  # tokens, "row", or None: all tokens together
  priority: Use = use(priorities.by_choice_rank)
  capacity: Use | None = None
  max_rows: float | None = None  # dropless buffer bound, in multiples of T*k
  renormalise: Use = use(renormalises.never)
  dispatch: Use = use(dispatch.sort)
  experts: Use = dataclasses.field(default=None)  # type: ignore[assignment]
  scale: str = "output"  # the weight multiplies the expert's "output" or its "input"
  combine: Use = use(combine.weighted_sum)
  aggregate: Use | None = None
  shared: Use | None = None  # an expert every token takes, with its own d_ff
  join: Use = use(join.add)  # how the shared expert's output joins the sparse one
  losses: tuple[Use, ...] = (use(loss.load_balance), use(loss.router_z))
  balance: Use | None = None  # bias update, e.g. use(balance.update, rate=1e-3)
  param_dtype: Any = "float32"
  # What is split over which axis of the mesh that `jax.set_mesh` made current; None, or
  # no mesh: one device, or however XLA splits it.
  sharding: Rules | None = None

  def __post_init__(self):
    for name in ("d_model", "num_experts", "group_size", "max_rows"):
      value = getattr(self, name)
      if isinstance(value, np.generic):
        object.__setattr__(self, name, value.item())
    checks.positive("d_model", self.d_model)
    if self.experts is None:
      object.__setattr__(self, "experts", use(experts.glu, d_ff=4 * self.d_model))
    checks.layer_config(self)
    object.__setattr__(self, "param_dtype", jnp.dtype(self.param_dtype).name)

  @property
  def k(self) -> int | None:
    """Choices per token; None for routers without a fixed number."""
    return self.router.function.choices(self.num_experts, **self.router.kwargs)


@checks.named_like(
  MoEConfig,
  router=("k",),
  experts=("d_ff", "activation", "gated", "bias"),
  capacity=("capacity_factor", "eval_capacity_factor"),
  shared=("shared_d_ff",),
)
def simple(
  d_model: int,
  d_ff: int,
  *,
  num_experts: int,
  k: int = 2,
  capacity_factor: float | None = None,
  eval_capacity_factor: float | None = None,
  activation: Callable[..., Any] = jax.nn.silu,
  gated: bool = True,
  bias: bool = False,
  shared_d_ff: int | None = None,
  **fields: Any,
) -> MoEConfig:
  """The usual layer from plain keywords: softmax top-k of GLU experts.

  Args:
    d_model: width of the activations.
    d_ff: width of one expert.
    num_experts: E.
    k: choices per token.
    capacity_factor: slots per expert are `ceil(k*T*factor/E)`; None is dropless.
    eval_capacity_factor: the same outside training; None: as in training.
    activation: of the experts.
    gated: three matrices (GLU) instead of two.
    bias: biases in the experts.
    shared_d_ff: width of an expert that every token takes; None: there is none.
    **fields: any other field of `MoEConfig`.  `router=` stands in place of k, which
      weights are renormalised by; `experts=` cannot be given.

  Raises:
    TypeError: a field that `MoEConfig` does not have, with the nearest one it has; or
      a field beside the keywords that it is made of.
  """
  checks.positive("d_ff", d_ff)
  checks.positive("k", k)
  if shared_d_ff is not None:
    checks.positive("shared_d_ff", shared_d_ff)
  for name, factor in (
    ("capacity_factor", capacity_factor),
    ("eval_capacity_factor", eval_capacity_factor),
  ):
    if factor is not None:
      checks.finite_positive(name, factor, ", or None for a dropless layer")
  if not isinstance(gated, bool):
    raise ValueError(f"gated={shown(gated)} must be True or False.")
  expert = experts.glu if gated else experts.mlp
  limited = capacity_factor is not None
  if eval_capacity_factor is not None and not limited:
    raise ValueError(
      f"eval_capacity_factor={eval_capacity_factor} without capacity_factor: the layer "
      "is dropless; give both, or neither."
    )
  router = fields.get("router", use(routers.top_k, k=k))
  several = _choices(router, num_experts) not in (1, None)
  chosen: dict[str, Any] = dict(
    router=router,
    experts=use(expert, d_ff=d_ff, activation=activation, bias=bias),
    renormalise=use(renormalises.before_dropping if several else renormalises.never),
    dispatch=use(dispatch.buckets if limited else dispatch.sort),
  )
  if limited:
    chosen["capacity"] = use(
      capacities.by_factor, factor=capacity_factor, eval_factor=eval_capacity_factor
    )
  if shared_d_ff is not None:
    chosen["shared"] = use(expert, d_ff=shared_d_ff, activation=activation, bias=bias)
  return MoEConfig(d_model, num_experts, **{**chosen, **fields})


def _choices(router: Any, num_experts: int) -> int | None:
  """k of a router that no check has seen yet; None if it has no fixed one."""
  choices = checks.fact(router, "choices") if isinstance(router, Use) else None
  return None if choices is None else choices(num_experts, **router.kwargs)


def resolve(
  config: MoEConfig | int, d_ff: int | None, keywords: dict[str, Any]
) -> MoEConfig:
  """What a shell was given, as a configuration: one as it is, or plain keywords."""
  if isinstance(config, MoEConfig):
    if d_ff is not None or keywords:
      given = ", ".join([*(["d_ff"] if d_ff is not None else []), *keywords])
      raise TypeError(
        f"MoE: {given} beside a MoEConfig; use dataclasses.replace(config, ...)."
      )
    return config
  checks.known_fields(MoEConfig, keywords, also=simple, where="MoE")
  if d_ff is None or "num_experts" not in keywords:
    raise TypeError(
      f"MoE({shown(config)}, ...): give a MoEConfig, or d_model, d_ff and num_experts, "
      "as in MoE(512, 2048, num_experts=8, k=2)."
    )
  return simple(config, d_ff, **keywords)


@checks.named
@dataclasses.dataclass(frozen=True)
class Attention:
  """Grouped-query attention with rotary positions."""

  num_heads: int
  num_kv_heads: int | None = None  # None: as many as num_heads
  head_dim: int | None = None  # None: d_model // num_heads
  rope_theta: float = 10_000.0
  causal: bool = True
  implementation: str | None = None  # "xla", "cudnn"; None: see `models.attention`
  qk_norm: str | None = None  # norm of queries and keys: "all" heads, or each "head"


@checks.named
@dataclasses.dataclass(frozen=True)
class Dense:
  """A feed-forward block without experts."""

  d_ff: int
  gated: bool = True
  activation: Any = jax.nn.silu


@checks.named
@dataclasses.dataclass(frozen=True)
class BlockConfig:
  """One transformer block: attention and a dense or sparse feed-forward."""

  attention: Attention
  ff: Dense | MoEConfig
  norm: str = "rms"  # or "layer"


@checks.named
@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """A decoder: an embedding, segments of blocks, a norm and the logits.

  `segments = ((blocks, repeat), ...)`: each tuple of blocks is repeated and scanned
  over, so first-k-dense is `(((dense,), 3), ((sparse,), 58))` and every-second is
  `(((dense, sparse), 12),)`.

  Where attention is causal a sparse layer may not look ahead either: routers that do
  are refused, and so is a limit (`capacity` with a priority other than choice rank, or
  `max_rows`) by which a later token displaces an earlier one, unless `future_drops`.
  One exception is usual and stands: with a capacity and k > 1 a later token's first
  choice comes before an earlier token's second one.
  """

  vocab_size: int
  d_model: int
  segments: tuple[tuple[tuple[BlockConfig, ...], int], ...]
  norm: str = "rms"
  tied: bool = True
  # A block keeps its input alone, or all, or its input and these (`jmoe.keeping`).
  remat: bool | tuple[str, ...] = True
  dtype: str = "float32"  # of activations; parameters are float32
  future_drops: bool = False  # whether later tokens may decide who is dropped
  # How activations and the loss are split over the mesh that `jax.set_mesh` made
  # current; sparse layers have a table each.
  sharding: Rules | None = None

  def __post_init__(self):
    checks.model_config(self)

  @property
  def num_layers(self) -> int:
    return sum(len(blocks) * repeat for blocks, repeat in self.segments)
