"""A fixed map from token id to expert: hash layers, PanGu-Sigma's level two."""
# SPDX-License-Identifier: Apache-2.0

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jmoe.routers.token_choice import token_choice
from jmoe.types import Context, Routing
from jmoe.use import marked


def hash_table(
  key: Array, vocab_size: int, num_experts: int, *, frequency: np.ndarray | None = None
) -> Array:
  """i32[V] a fixed map from token id to expert; draw one per layer.

  Roller et al. 2021 (arXiv 2106.04426), section 3.1.  Without `frequency` every expert
  gets equally many ids, in random order; with it, ids go from the most frequent to the
  lightest expert so far, so that the heaviest exceeds the mean by at most the most
  frequent id.

  Args:
    key: of the draw.
    vocab_size: V.
    num_experts: E.
    frequency: [V] how often each id occurs, on the host.
  """
  if frequency is None:
    even = jnp.arange(vocab_size, dtype=jnp.int32) % num_experts
    return jax.random.permutation(key, even)
  table, load = np.zeros(vocab_size, np.int32), np.zeros(num_experts)
  for token_id in np.argsort(-np.asarray(frequency), kind="stable"):
    table[token_id] = lightest = int(np.argmin(load))
    load[lightest] += frequency[token_id]
  return jnp.asarray(table)


@marked(
  choices=lambda num_experts, **_: 1,
  needs=("token_id",),
  reads=(),
  fixed=True,
  table=lambda key, num_experts, vocab_size, **_: hash_table(
    key, vocab_size, num_experts
  ),
)
def hashed(
  logits: Array,
  scores: Array,
  select: Array,
  *,
  vocab_size: int,
  mask: Array | None = None,
  context: Context = Context(),
  forced: Array | None = None,
) -> Routing:
  """Token id v of layer l goes to expert `table[l, v]`, with weight 1.

  Hash layers (arXiv 2106.04426); with a domain restriction it is PanGu-Sigma's random
  routed experts (arXiv 2303.10845): the table's entry, modulo the number of experts
  allowed, counts through those.  Depends on layer, domain and token id alone.

  Args:
    logits, scores, select: f32[T,E], for reports; the choice does not read them.
    vocab_size: V, the length of the table that `init_state` draws.
    mask: bool[T,E] allowed experts.
    context: `token_id`; `table` i32[V], or i32[L,V] with `layer`.  A token whose id or
      entry is out of range counts as outside the mask.
    forced: i32[T,1] recorded choices to replay.

  Returns:
    Routing with T entries of weight 1.
  """
  del select, vocab_size
  table, token_id = context.table, context.token_id
  assert table is not None and token_id is not None
  if table.ndim == 2:
    table = table[context.layer]
  expert_T, E = table[token_id], scores.shape[1]
  known_T = (token_id >= 0) & (token_id < table.shape[0])
  known_T &= (expert_T >= 0) & (expert_T < E)
  expert_T = jnp.clip(expert_T, 0, E - 1)
  if mask is not None:
    # the (entry mod n)-th of the n allowed experts
    place_TE = jnp.cumsum(mask, axis=1, dtype=jnp.int32) - 1
    n_T = jnp.maximum(place_TE[:, -1] + 1, 1)
    wanted_TE = mask & (place_TE == (expert_T % n_T)[:, None])
    expert_T = jnp.argmax(wanted_TE, axis=1).astype(jnp.int32)
  known_TE = jnp.broadcast_to(known_T[:, None], scores.shape)
  return token_choice(
    expert_T[:, None],
    logits=logits,
    scores=scores,
    context=context,
    mask=known_TE if mask is None else mask & known_TE,
    forced=forced,
    weight_TK=jnp.ones((expert_T.shape[0], 1), scores.dtype),
  )
