"""The values that travel through a sparse layer, and the legend of shape letters.

A routing is a sparse matrix, tokens by experts, in coordinate form.  `assign` queues
it by column and cuts each column at capacity; `dispatch` gathers rows in that order;
`combine` is the transposed product.

Letters, the same everywhere in the repository:

  B batch   S sequence   T tokens (B*S)   D d_model   F d_ff   E experts
  K choices per token    C capacity       N assignments (T*K for token choice)
  R rows of the expert buffer             G routing groups

Glossary.  *Gate*: the learned map from a token to logits.  *Router*: the selection.
*Group*: a routing group, tokens that compete for the same slots (`expert group` is
always two words).  *Load*: demand before capacity.  *Axis*: a mesh axis.  *Dropped*:
an assignment that found no slot or buffer row.  *Valid*: not padding.
"""
# SPDX-License-Identifier: Apache-2.0

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, TypeVar, dataclass_transform

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jmoe import _spelling

Params = Mapping[str, Any]
_T = TypeVar("_T")


def static(*, default: Any = None) -> Any:
  """A field that is part of the tree's structure: hashed and compared, not traced."""
  return dataclasses.field(default=default, metadata={"static": True})


@dataclass_transform(frozen_default=True, field_specifiers=(static, dataclasses.field))
def pytree(cls: type[_T]) -> type[_T]:
  """Class decorator: a frozen dataclass that jax sees as a tree of its fields.

  An unknown field is answered with the nearest one that there is.
  """
  cls = dataclasses.dataclass(frozen=True)(cls)
  fields = dataclasses.fields(cls)  # type: ignore[arg-type]
  init = cls.__init__

  @functools.wraps(init)
  def checked(self: Any, *args: Any, **keywords: Any) -> None:
    try:
      init(self, *args, **keywords)
    except TypeError:  # only then, for jax makes these values all the time
      _spelling.known(cls.__name__, keywords, [f.name for f in fields])
      raise

  cls.__init__ = checked
  meta = [f.name for f in fields if f.metadata.get("static")]
  data = [f.name for f in fields if f.name not in meta]
  jax.tree_util.register_dataclass(cls, data_fields=data, meta_fields=meta)
  return cls


@pytree
class Context:
  """What stages may need beside activations; every field is optional.

  Arrays have one entry per token.  The shells also take them shaped like the
  activations without their last dimension (`[B, S]`) and flatten them.
  """

  valid: Array | None = None  # bool[T]  False for padding
  row: Array | None = None  # i32[T]   sequence or image a token belongs to
  segment: Array | None = None  # i32[T]   document, unique over the batch
  position: Array | None = None  # i32[T]   global token index; random keys fold it
  token_id: Array | None = None  # i32[T]   vocabulary id
  domain_id: Array | None = None  # i32[T]
  task_id: Array | None = None  # i32[T]
  modality: Array | None = None  # i32[T]
  layer: Array | None = None  # i32[]    layer index under scan
  table: Array | None = None  # i32[V] or i32[L,V]  fixed map for hashed routing
  # rows; each is the next T // num_rows tokens if `row` is None
  num_rows: int | None = static(default=None)
  num_segments: int | None = static(default=None)
  # documents that the layer has room for in a row: `segment` counts them row by row
  row_segments: int | None = static(default=None)
  group_size: int | None = static(default=None)  # tokens per routing group; None: all


@pytree
class Routing:
  """A sparse T x E matrix in coordinate form, one entry per assignment."""

  token: Array  # i32[N]   row of each entry
  expert: Array  # i32[N]   column of each entry
  weight: Array  # f32[N]   value of each entry; differentiable
  live: Array  # bool[N]  may run: not padding, not skipped, not outside the mask
  queues: Array  # bool[N]  takes a place in the queue, as GShard's skipped choices do
  probs: Array  # f32[T,E] every score, for losses and analysis
  logits: Array  # f32[T,E] before scoring
  noisy_logits: Array | None = None  # f32[T,E] what was scored, when noise was drawn
  chosen: Array | None = None  # bool[N]  live, or chosen and then skipped; None: live
  masked: Array | None = None  # bool[N]  asked for, but outside the restriction
  # N == T*k, token-major; None if tokens differ in how many choices they have
  k: int | None = static(default=None)
  scale: float = static(default=1.0)  # what renormalised weights sum to
  group_size: int | None = static(default=None)  # tokens per routing group; None: all
  capacity: int | None = static(default=None)  # of routers whose choice it is

  @property
  def num_tokens(self) -> int:
    return self.probs.shape[0]

  @property
  def num_experts(self) -> int:
    return self.probs.shape[1]

  @property
  def num_groups(self) -> int:
    return num_groups(self.num_tokens, self.group_size)


@pytree
class Plan:
  """The same matrix, queued by column and cut at capacity."""

  routing: Routing
  order: Array  # i32[N]   entries by (group, expert, priority); idle entries last
  slot: Array  # i32[N]   place in the expert's queue, per group
  kept: Array  # bool[N]  live, and slot < rows of its queue
  load: Array  # i32[G,E] demand before capacity
  rows: Array  # i32[G,E] slots taken: min(load, capacity)
  first: Array  # i32[G,E] where each queue begins in `order`
  cause: str = static(default="capacity")  # why an entry that is not kept was dropped
  capacity: int | tuple[int, ...] | None = static(default=None)  # slots; None: dropless
  max_rows: int | None = static(default=None)  # bound of a dropless buffer


@pytree
class Mixing:
  """The dense routing of Soft MoE: every slot reads, and feeds, every token."""

  dispatch: Array  # f32[G,S,E,C]  over S it sums to one
  combine: Array  # f32[G,S,E,C]  over E and C it sums to one


@pytree
class Groups:
  """How the rows of a buffer belong to experts: what a grouped matmul reads.

  Rows of expert e start at `start[e]`, a multiple of `block`; `rows[e]` of them are
  real, those up to the next multiple of `block` are zero, and anything after the last
  expert's rows is undefined.
  """

  start: Array  # i32[E]
  rows: Array  # i32[E]
  block: int = static(default=1)
  capacity: int | None = static(default=None)  # rows between starts; None: ragged


@pytree
class Layout:
  """Where every assignment lies in the expert buffer, and the way back."""

  token: Array  # i32[R]  row -> token; T for a padding row
  entry: Array  # i32[R]  row -> assignment; N for a padding row
  row: Array  # i32[N]  assignment -> row; R for a dropped one
  groups: Groups
  num_tokens: int = static(default=0)
  k: int | None = static(default=None)

  @property
  def num_rows(self) -> int:
    return self.token.shape[0]


@pytree
class Rows:
  """All that an expert function sees: `gathered()` rows, grouped by expert."""

  x: Array  # [R,D]; or when `layout` is given tokens [T,D], anything where it has none
  groups: Groups
  layout: Layout | None = None  # lazy: row r is x[layout.token[r]]
  scale: Array | None = None  # f32[R] multiplies the expert's INPUT
  weight: Array | None = None  # f32[R] multiplies its OUTPUT; given to who `weighs`
  sums: bool = static(default=False)  # [T,D] is asked for; of who `sums`
  travels: bool = static(default=False)  # to other devices: x's gradient, when made

  def gathered(self) -> Array:
    """The rows as an array `[R,D]`; padding rows are zero."""
    from jmoe.dispatch import carry

    x_RD = self.x if self.layout is None else carry.out(self.x, self.layout)
    if self.scale is None:
      return x_RD
    return (x_RD.astype(self.scale.dtype) * self.scale[:, None]).astype(x_RD.dtype)


@pytree
class Home:
  """How rows come home: a coefficient per assignment, summed per token or not."""

  weight: Array  # f32[N]  zero for dropped assignments
  input_scale: Array | None = None  # f32[N]  multiplies the expert's input
  sums: bool = static(default=True)  # True: y_TD; False: y_TKD


@pytree
class State:
  """What is not learned by gradient: goes in as an argument, comes back updated."""

  bias: Array | None = None  # f32[E]  added to scores for selection only
  gate: Mapping[str, Array] = dataclasses.field(default_factory=dict)  # gate buffers
  table: Array | None = None  # i32[V]  hashed routing
  # of a loss that gathers over the batches of one update:
  counted: Array | None = None  # i32[E]  choices in the earlier ones
  batches: Array | None = None  # i32[]  how many those are


@pytree
class Info:
  """What a layer reports beside its output."""

  losses: Mapping[str, Array]  # f32[] each, unweighted, the scope in the name
  load: Array  # i32[E]  demand before capacity, summed over groups
  dropped: Mapping[str, Array]  # f32[] each: fraction of valid assignments, by cause
  entropy: Array  # f32[]  mean entropy of a valid token's scores, nats
  state: State
  plan: Any = None  # Plan or Mixing, only on request


def wide(*arrays: Any) -> Any:
  """The dtype that routing and sums are formed in: the arrays', at least float32.

  NumPy's rule: jax's own refuses float32 with bfloat16 under strict promotion.
  """
  return np.result_type(np.float32, *(a.dtype for a in arrays))


def num_groups(num_tokens: int, group_size: int | None) -> int:
  """How many routing groups there are; the last one may be partly empty."""
  return 1 if group_size is None else max(1, -(-num_tokens // group_size))


def group_of(token: Array, group_size: int | None) -> Array:
  """i32[...] routing group of each token index."""
  return jnp.zeros_like(token) if group_size is None else token // group_size


def valid_or_all(context: Context, num_tokens: int) -> Array:
  """bool[T] which tokens are not padding."""
  if context.valid is None:
    return jnp.ones(num_tokens, bool)
  return context.valid
