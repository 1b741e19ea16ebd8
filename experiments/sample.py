"""Text that goes on from prompts, many at once, by a cache of keys and values."""
# SPDX-License-Identifier: Apache-2.0

import functools
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from experiments import state as states
from experiments.drawing import draw
from experiments.errors import BadConfig
from experiments.vocabulary import Vocabulary
from jmoe import models
from jmoe.config import ModelConfig

_ROWS = 32  # prompts at a time
_LEAST = 16  # slots of a prompt


class Text(NamedTuple):
  """A prompt and what a model makes of it."""

  prompt: str
  text: str  # without the prompt
  tokens: int  # of the text
  ended: bool  # by an end of document, which is not among its tokens


def texts(
  params: Mapping[str, Any],
  balance: Mapping[str, Any],
  prompts: Sequence[str],
  *,
  model: ModelConfig,
  vocabulary: Vocabulary,
  tokens: int,
  temperature: float = 0.7,
  top_p: float = 1.0,
  seed: int = 0,
) -> list[Text]:
  """What a model makes of each prompt, up to an end of document.

  A prompt stands at the begin of a document.  Prompts are padded to a power of two
  slots, at least 16: others of that size and number are not compiled anew.  Random keys
  fold the prompt's index and the token's position in its row, so that a text does not
  depend on what is made beside it.

  Args:
    params: of the model, by name.
    balance: the rest of it, by name.
    prompts: any lengths, empty ones too.
    model: as it was trained; see `decodable`.
    vocabulary: of the tokens; others that the model may know are never drawn.
    tokens: at most, of each text.
    temperature: see `drawing.draw`, as for `top_p`.
    top_p: the share of probability that tokens are drawn from.
    seed: of the random keys.

  Raises:
    BadConfig: see `decodable`.
  """
  blueprint, _ = states.blueprint(decodable(model))
  read = [vocabulary.encode(prompt.encode())[:-1] for prompt in prompts]
  if not read or tokens < 1:
    return [Text(prompt, "", 0, False) for prompt in prompts]
  size = max(_LEAST, 1 << (max(map(len, read)) - 1).bit_length())
  rows = min(len(read), _ROWS)
  drawn = np.arange(model.vocab_size)
  drawn = (drawn < vocabulary.size) & (drawn != vocabulary.bos)
  params, balance = jax.device_put((params, balance))  # once, for all batches
  made: list[list[int]] = []
  for first in range(0, len(read), rows):
    batch = read[first : first + rows]
    tokens_BP = np.full((rows, size), vocabulary.bos, np.int32)
    start_B = np.full(rows, size - 1, np.int32)
    for b, row in enumerate(batch):
      start_B[b] = size - len(row)
      tokens_BP[b, start_B[b] :] = row
    made_BN = _continued(
      params,
      balance,
      tokens_BP,
      start_B,
      np.arange(rows) < len(batch),
      _keys(jax.random.key(seed), np.arange(first, first + rows)),
      drawn,
      np.int32(vocabulary.eos),
      np.float32(temperature),
      np.float32(top_p),
      blueprint=blueprint,
      num_new=tokens,
    )
    made += np.asarray(made_BN)[: len(batch)].tolist()
  return [_text(p, m, vocabulary) for p, m in zip(prompts, made, strict=True)]


def decodable(model: ModelConfig) -> ModelConfig:
  """The model that makes the text of a trained one: without capacities.

  With them a token's experts would depend on the prompts beside it, and on whether it
  was read or made; see `jmoe.models.dropless`.  What this changes is said on stderr.

  Raises:
    BadConfig: a layer cannot work from left to right, such as expert choice.
  """
  config = models.dropless(model)
  try:
    start_B = jax.ShapeDtypeStruct((1,), jnp.int32)
    jax.eval_shape(lambda start: models.empty_cache(config, start, size=1), start_B)
  except ValueError as error:
    raise BadConfig(f"no text can be made: {error}") from error
  if config.segments != model.segments:
    print(
      "note: text is made without the capacities of the sparse layers: every choice of "
      "an expert is kept.",
      file=sys.stderr,
    )
  return config


def _text(prompt: str, made: list[int], vocabulary: Vocabulary) -> Text:
  ended = vocabulary.eos in made
  made = made[: made.index(vocabulary.eos)] if ended else made
  return Text(prompt, vocabulary.decode(made), len(made), ended)


@jax.jit
def _keys(key: Array, number_B: Array) -> Array:
  return jax.vmap(jax.random.fold_in, (None, 0))(key, number_B)


@functools.partial(jax.jit, static_argnames=("blueprint", "num_new"))
def _continued(
  params: states.Arrays,
  balance: states.Arrays,
  tokens_BP: Array,
  start_B: Array,
  live_B: Array,
  key_B: Array,
  drawn_V: Array,
  eos: Array,
  temperature: Array,
  top_p: Array,
  *,
  blueprint: states.Blueprint,
  num_new: int,
) -> Array:
  """i32[B,num_new] what follows left-padded prompts; `eos` from the end of a row on."""
  model = blueprint.model(params, balance)
  batch, size = tokens_BP.shape
  cache = models.empty_cache(model.config, start_B, size=size + num_new)
  logits_BV, cache = models.extend(model, tokens_BP, cache)
  made_BN = jnp.full((batch, num_new), eos)

  def goes_on(carry):
    n, live_B, *_ = carry
    return (n < num_new) & jnp.any(live_B)

  def one_more(carry):
    n, live_B, made_BN, logits_BV, cache = carry
    token_B = draw(
      jnp.where(drawn_V, logits_BV, -jnp.inf),
      jax.vmap(jax.random.fold_in)(key_B, cache.used - start_B),
      temperature=temperature,
      top_p=top_p,
    )
    token_B = jnp.where(live_B, token_B, eos)
    made_BN = jax.lax.dynamic_update_slice(made_BN, token_B[:, None], (0, n))
    logits_BV, cache = models.extend(model, token_B[:, None], cache)
    return n + 1, live_B & (token_B != eos), made_BN, logits_BV, cache

  carry = (jnp.int32(0), live_B, made_BN, logits_BV, cache)
  return jax.lax.while_loop(goes_on, one_more, carry)[2]
