"""LIMoE's entropies: modalities and the threshold."""
# SPDX-License-Identifier: Apache-2.0

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jmoe import losses
from tests import tolerance
from tests.losses.cases import args, draw


def test_one_expert_for_all_is_sure_but_not_spread():
  logits = np.tile([100.0, -100.0, -100.0], (12, 1))
  both = args(draw(12, 3, 1, logits=logits))
  assert losses.entropy_local(*both) == 0
  assert losses.entropy_global(*both) == 0
  tolerance.assert_close(losses.entropy_global(*both, threshold=0.7), jnp.float32(0.7))


def test_modality_without_tokens_gives_zero():
  both = args(draw(12, 3, 2))
  assert losses.entropy_local(*both, modality=9) == 0
  assert losses.entropy_global(*both, modality=9, threshold=1.0) == 0


def test_modalities_are_apart():
  case = draw(12, 3, 2, modality=np.arange(12) % 2)
  case.valid[:] = True
  ones = case.modality == 1
  other = np.where(ones[:, None], case.logits, 7 * case.logits[::-1])
  for loss in losses.entropy_local, losses.entropy_global:
    changed = args(case.replace(logits=other))
    value = loss(*args(case), modality=1)
    assert value == loss(*changed, modality=1) != loss(*args(case), modality=0)


def test_threshold_stops_the_gradient_once_spread():
  case = draw(12, 3, 2)

  def value(logits, threshold):
    plan, context = args(case)
    routing = dataclasses.replace(plan.routing, probs=jax.nn.softmax(logits))
    changed = dataclasses.replace(plan, routing=routing)
    return losses.entropy_global(changed, context, threshold=threshold)

  logits = jnp.asarray(case.logits, jnp.float32)  # spread over nearly three experts
  assert np.any(jax.grad(value)(logits, math.log(3)))
  assert not np.any(jax.grad(value)(logits, math.log(2)))


def test_modality_needs_the_ids():
  plan, context = args(draw(12, 3, 2))
  context = dataclasses.replace(context, modality=None)
  for loss in losses.entropy_local, losses.entropy_global:
    with pytest.raises(ValueError, match="modality=1"):
      loss(plan, context, modality=1)
