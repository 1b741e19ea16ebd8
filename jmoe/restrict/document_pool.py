"""Experts that a document's own tokens like most: the training mask of EMO."""
# SPDX-License-Identifier: Apache-2.0

import itertools
import math

import jax
import jax.numpy as jnp
from jax import Array

from jmoe._value_checks import whole
from jmoe.parallel.shards import Shards
from jmoe.types import Context, valid_or_all
from jmoe.use import Use, marked, shown

_MOST_LISTED = 1000


def _check(
  config,
  *,
  least: int,
  most: int | None = None,
  same_in_layers: bool = False,
  max_documents: int | None = None,
  evaluation: int | None = None,
) -> None:
  E, k = config.num_experts, config.k or 1
  top = E if most is None else most
  if not (whole(least) and whole(top) and least <= top <= E):
    raise ValueError(
      f"document_pool: least={shown(least)}, most={shown(most)}; use 1 <= least <= "
      f"most <= num_experts={E}."
    )
  if least < k:
    raise ValueError(
      f"document_pool: least={least} experts are fewer than k={k}; use {k} or more."
    )
  if not isinstance(same_in_layers, bool):
    raise ValueError(
      f"document_pool: same_in_layers={shown(same_in_layers)} must be True or False."
    )
  if evaluation is not None and not (whole(evaluation) and k <= evaluation <= E):
    raise ValueError(
      f"document_pool: evaluation={shown(evaluation)} must be None, or experts of a "
      f"pool, of k={k} to num_experts={E}."
    )
  if max_documents is not None and not whole(max_documents):
    raise ValueError(
      f"document_pool: max_documents={shown(max_documents)} must be a whole number of "
      "at least 1, or None."
    )


def _leaves(
  allowed: frozenset[int],
  num_experts: int,
  *,
  least: int,
  evaluation: int | None = None,
  **_,
) -> list[frozenset[int]]:
  """Every smallest pool; of very many, one that is spread over all experts."""
  del num_experts
  experts = sorted(allowed)
  least = min(least, evaluation or least, len(experts))
  if math.comb(len(experts), least) > _MOST_LISTED:
    return [frozenset(experts[n * len(experts) // least] for n in range(least))]
  return [frozenset(some) for some in itertools.combinations(experts, least)]


def _cut(use: Use, num_experts: int, kept: tuple[int, ...]) -> Use:
  """The same pools, of what is left at most."""
  del num_experts
  given = use.kwargs
  limited = ("least", "most", "evaluation")
  return use.replace(
    **{n: min(given[n], len(kept)) for n in limited if given.get(n) is not None}
  )


def _resized(use: Use, num_experts: int, k_before: int, k: int) -> Use:
  """Pools as many times as large as a token's choices are."""
  given = use.kwargs
  limited = ("least", "most", "evaluation")
  new = {
    name: min(num_experts, max(k, given[name] * k // k_before))
    for name in limited
    if given.get(name) is not None
  }
  return use.replace(**new)


@marked(
  check=_check,
  within=True,
  leaves=_leaves,
  needs_in_training=("segment",),
  cut=_cut,
  resized=_resized,
  random=lambda train, least, most=None, **_: train and least != most,
  same_in_layers=lambda same_in_layers=False, **_: same_in_layers,
  ahead=lambda evaluation=None, **_: evaluation is not None,
)
def document_pool(
  select_TE: Array,
  context: Context,
  *,
  least: int,
  most: int | None = None,
  same_in_layers: bool = False,
  max_documents: int | None = None,
  evaluation: int | None = None,
  mask: Array | None = None,
  key: Array | None = None,
  train: bool = False,
  axes: tuple[str, ...] | None = None,
) -> Array:
  """In training a document's tokens may use the experts that they like most on average.

  EMO (Wang, Bhagia, Min 2026, arXiv 2605.06663): the pool of a document holds the d
  experts of the highest mean routing probability over its own tokens, with d drawn from
  least..most; outside training there is no pool, unless `evaluation` asks for one.  As
  in the authors' code d is drawn anew in each layer.  The choice of the pool has no
  gradient.  With
  `MoEConfig(rescore=True)` scores, losses and weights are those within the pool, as in
  EMO.

  The mean is over the whole document, so that in training a token's experts depend on
  later tokens: report likelihoods from evaluation, where nothing does.  A document that
  a row cuts is two documents.

  A token's scores are floored at zero and divided by their sum, and added as integers
  of 20 to 30 bits: exact in any order, so that a recomputed layer, and any mesh, makes
  the same pool.  Ties go to the lower index.

  Args:
    select_TE: f32[T,E] selection scores.
    context: `segment` names a token's document; `valid` tokens count.  Inside a
      `shard_map` of one's own a document must lie on one shard.
    least: experts of a pool, at least.
    most: at most; None: all experts.  Equal to `least`: every pool has as many.
    same_in_layers: draw a document's d once for all layers.
    evaluation: experts of every pool outside training, as the authors' training code
      evaluates with 32; likelihoods are then of tokens that know of later ones, and no
      text can be generated.  None: no pools.  (`restrict.subset` is one pool for all.)
    max_documents: of a row, where segments are shaped like the rows, padding before or
      between documents counted as one; memory and sorting are of so many pools.  Later
      documents of a row share the pool of the last.  None: as many as tokens.
    mask: bool[T,E] what the other restrictions allow; the pool is of these.
    key: d is drawn from it and the document's number.
    train: whether pools are those of training.
    axes: of a layer over a mesh; documents that lie on several shards are summed.

  Returns:
    bool[T,E].

  Raises:
    ValueError: `max_documents`, but segments are not shaped like rows; `evaluation`
      without segments.
  """
  T, E = select_TE.shape
  if not train and evaluation is None:
    return jnp.ones((T, E), bool)
  if context.segment is None:
    raise ValueError(
      f"document_pool: evaluation={evaluation} needs context.segment; pass "
      "Context(segment=...)."
    )
  place_T, number_M, longest, split = _documents(context, T, max_documents, axes)
  keep_TE = valid_or_all(context, T)[:, None]
  keep_TE = keep_TE if mask is None else keep_TE & mask
  sums = _sums(_shares(select_TE, keep_TE), keep_TE, place_T, len(number_M), longest)
  liked_ME = _joined(jax.lax.psum(sums, split) if split else sums, longest)
  rank_ME = jnp.argsort(jnp.argsort(-liked_ME, axis=1), axis=1)
  most = E if most is None else most
  if not train and evaluation is not None:
    least = most = evaluation
  pool_ME = rank_ME < _sizes(key, number_M, least, most)
  return pool_ME[place_T]


def _documents(
  context: Context, T: int, most: int | None, axes: tuple[str, ...] | None
) -> tuple[Array, Array, int, tuple[str, ...]]:
  """(place of each token's document, their numbers, longest, axes that split them).

  Places are those of the documents on this shard and on others with parts of them;
  numbers are of the whole call.
  """
  assert context.segment is not None
  row = context.row_segments
  own = axes if isinstance(axes, Shards) else Shards()
  split = tuple(own) if row is None else own.rows
  tokens = T * jax.lax.psum(1, split) if split else T
  segment_T = context.segment
  if row is None:
    if most is not None:
      raise ValueError(
        f"document_pool: max_documents={most} of a row, but context.segment is not "
        "shaped like rows [..., S]; shape it so, or use max_documents=None."
      )
    count = tokens if context.num_segments is None else context.num_segments
    return segment_T, jnp.arange(count, dtype=jnp.int32), tokens, split
  first = jnp.min(segment_T)  # where the first row begins to count
  first = jax.lax.pmin(first, split) if split else first
  most = row if most is None else min(most, row)
  row_T, run_T = jnp.divmod(segment_T - first, jnp.int32(row))
  place_T = row_T * most + jnp.minimum(run_T, most - 1)
  row_M, run_M = jnp.divmod(
    jnp.arange(tokens // row * most, dtype=jnp.int32), jnp.int32(most)
  )
  return place_T, first + row_M * row + run_M, row, split


def _shares(select_TE: Array, keep_TE: Array) -> Array:
  """f32[T,E] scores that sum to one over the experts that count; else zero."""
  select_TE = jax.lax.stop_gradient(select_TE).astype(jnp.float32)
  some_TE = jnp.where(keep_TE, jnp.maximum(select_TE, 0), 0)
  total_T1 = jnp.sum(some_TE, axis=1, keepdims=True)
  return some_TE / jnp.where(total_T1 > 0, total_T1, 1)


def _bits(longest: int) -> int:
  """Of each of the two integers that hold a share, so that no sum overflows."""
  return max(1, min(15, 31 - longest.bit_length()))


def _sums(
  share_TE: Array, keep_TE: Array, place_T: Array, count: int, longest: int
) -> tuple[Array, Array]:
  """Shares of each document summed, in two integers i32[M,E]: (high, low)."""
  bits = _bits(longest)
  fixed_TE = jnp.round(share_TE * 2.0 ** (2 * bits)).astype(jnp.int32)
  # One at least, so that whom a document may use comes before whom it may not.
  fixed_TE = jnp.where(keep_TE, jnp.maximum(fixed_TE, 1), 0)
  high_ME, low_ME = (
    jax.ops.segment_sum(part_TE, place_T, num_segments=count)
    for part_TE in (fixed_TE >> bits, fixed_TE & (2**bits - 1))
  )
  return high_ME, low_ME


def _joined(sums: tuple[Array, Array], longest: int) -> Array:
  """f32[M,E] of sums in two parts."""
  (high_ME, low_ME), bits = sums, _bits(longest)
  high_ME += low_ME >> bits
  low_ME &= 2**bits - 1
  return high_ME.astype(jnp.float32) * 2.0**bits + low_ME.astype(jnp.float32)


def _sizes(key: Array | None, number_M: Array, least: int, most: int) -> Array:
  """i32[M,1] experts of each pool."""
  if least == most:
    return jnp.full((len(number_M), 1), least, jnp.int32)
  assert key is not None

  def draw(number: Array) -> Array:
    return jax.random.randint(jax.random.fold_in(key, number), (), least, most + 1)

  return jax.vmap(draw)(number_M)[:, None].astype(jnp.int32)
