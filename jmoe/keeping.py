"""What a block may keep for the backward pass instead of computing it again.

`ModelConfig(remat=("attention", "hidden"))` keeps each block's input and what carries
these names:

  projected  queries, keys and values as they leave their matrices
  attention  what attention gave, before its output matrix; cuDNN's statistics of it
  residual   the sum after attention, which the feed-forward reads
  routing    the router's logits, the plan and the layout of rows
  hidden     what the activation of a feed-forward takes, for each row of an expert
"""
# SPDX-License-Identifier: Apache-2.0

from collections.abc import Callable
from typing import Any, TypeVar

import jax
from jax.ad_checkpoint import checkpoint_name

NAMES = ("projected", "attention", "residual", "routing", "hidden")
# jax's own forward rule for cuDNN, whose statistics cannot be named from outside.
_CUDNN = "dot_product_attention_fwd_wrapper"

_T = TypeVar("_T")


def named(tree: _T, name: str) -> _T:
  """The same arrays, under a name of `NAMES`."""
  return jax.tree.map(lambda x: checkpoint_name(x, name), tree)


def policy(names: tuple[str, ...]) -> Callable[..., Any]:
  """What `jax.checkpoint(..., policy=)` takes to keep arrays of these names alone."""
  by_name = jax.checkpoint_policies.save_only_these_names(*names)

  def keeps(primitive: Any, *avals: Any, **params: Any) -> Any:
    if "attention" in names and primitive.name == _CUDNN:
      return True
    return by_name(primitive, *avals, **params)

  return keeps
