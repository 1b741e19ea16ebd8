"""Text from a model: one byte after another."""
# SPDX-License-Identifier: Apache-2.0

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from experiments.state import Blueprint
from experiments.vocabulary import Vocabulary


def sample(
  params: dict[str, Array],
  balance: dict[str, Array],
  key: Array,
  *,
  blueprint: Blueprint,
  vocabulary: Vocabulary,
  prompt: str,
  num_bytes: int,
  temperature: float = 0.7,
) -> str:
  """The prompt and what the model makes of it, up to the end of a document.

  Every byte costs a pass over the whole text: enough for a look at a small model.
  """
  start = vocabulary.encode(prompt.encode())[:-1].tolist()
  tokens = np.zeros((1, len(start) + num_bytes), np.int32)
  tokens[0, : len(start)] = start
  tokens = _continue(
    params,
    balance,
    jnp.asarray(tokens),
    jnp.int32(len(start)),
    key,
    blueprint=blueprint,
    temperature=temperature,
  )
  return prompt + vocabulary.decode(np.asarray(tokens)[0, len(start) :].tolist())


@functools.partial(jax.jit, static_argnames=("blueprint", "temperature"))
def _continue(params, balance, tokens_1S, start, key, *, blueprint, temperature):
  model = blueprint.model(params, balance)

  def write(place, tokens_1S):
    # What is not yet written is padding.
    segment_1S = (jnp.arange(tokens_1S.shape[1]) < place).astype(jnp.int32)[None]
    logits_1SV, _ = model(tokens_1S, segment_1S)
    logits_V = jax.lax.dynamic_index_in_dim(logits_1SV[0], place - 1, keepdims=False)
    drawn = jax.random.categorical(
      jax.random.fold_in(key, place), logits_V / temperature
    )
    return tokens_1S.at[0, place].set(drawn.astype(tokens_1S.dtype))

  return jax.lax.fori_loop(start, tokens_1S.shape[1], write, tokens_1S)
