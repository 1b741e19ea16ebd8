"""All experts for every token: MMoE, and the dense reference."""
# SPDX-License-Identifier: Apache-2.0

import jax.numpy as jnp
from jax import Array

from jmoe.routers.token_choice import token_choice
from jmoe.types import Context, Routing
from jmoe.use import marked


@marked(choices=lambda num_experts, **_: num_experts, reads=("scores",))
def every_expert(
  logits: Array,
  scores: Array,
  select: Array,
  *,
  mask: Array | None = None,
  context: Context = Context(),
  forced: Array | None = None,
) -> Routing:
  """Entry j of a token is expert j, weighed by its score.

  Ma et al. 2018 (MMoE, KDD), equation 6.

  Args:
    logits, scores: f32[T,E].
    select: not read.
    mask: bool[T,E] allowed experts; the others do not run.
    context: `valid`, `group_size`.
    forced: i32[T,E] recorded choices to replay.

  Returns:
    Routing with T*E entries.
  """
  del select
  T, E = scores.shape
  return token_choice(
    jnp.broadcast_to(jnp.arange(E, dtype=jnp.int32), (T, E)),
    logits=logits,
    scores=scores,
    context=context,
    mask=mask,
    forced=forced,
  )
