"""A model that cannot be built is refused when it is written down."""
# SPDX-License-Identifier: Apache-2.0

import dataclasses

import pytest

from jmoe import use
from jmoe.config import Attention, BlockConfig, Dense, ModelConfig, MoEConfig, simple
from jmoe.dispatch import buckets
from jmoe.routers import expert_choice

pytestmark = pytest.mark.contract

BLOCK = BlockConfig(Attention(num_heads=2), Dense(d_ff=8))


def model(block=BLOCK, **fields):
  given = dict(vocab_size=10, d_model=8, segments=(((block,), 1),))
  return ModelConfig(**{**given, **fields})


def attention(**fields):
  return dataclasses.replace(BLOCK, attention=Attention(**{"num_heads": 2, **fields}))


def with_ff(ff):
  return dataclasses.replace(BLOCK, ff=ff)


def expert_choosing(**fields):
  layer = MoEConfig(8, 4, router=use(expert_choice), dispatch=use(buckets), losses=())
  return dataclasses.replace(BLOCK, ff=layer, **fields)


@pytest.mark.parametrize(
  ("make", "said"),
  [
    (lambda: model(d_model=0), "d_model=0"),
    (lambda: model(vocab_size=True), "vocab_size=True is not an integer"),
    (lambda: model(dtype="bfloat"), "did you mean 'bfloat16'"),
    (lambda: model(norm="rsm"), "did you mean 'rms'"),
    (lambda: model(segments=()), "segments="),
    (lambda: model(segments=(BLOCK, 2)), "is not a pair"),
    (lambda: model(segments=((BLOCK, 2),)), r"\(\(block,\), repeat\)"),
    (lambda: model(segments=(((BLOCK,), 0),)), "repeat=0"),
    (lambda: model(attention(num_heads=3)), "not divisible by num_heads=3"),
    (lambda: model(attention(num_heads=4, num_kv_heads=3)), "num_kv_heads=3"),
    (lambda: model(attention(head_dim=3)), "head_dim=3 is odd"),
    (lambda: model(attention(rope_theta=float("nan"))), "rope_theta=nan"),
    (lambda: model(with_ff(Dense(d_ff=-1))), "d_ff=-1"),
    (lambda: model(with_ff(3)), "neither Dense nor MoEConfig"),
    (lambda: model(with_ff(simple(4, 8, num_experts=2))), "d_model=4"),
    (lambda: model(expert_choosing()), "expert_choice looks at later tokens"),
  ],
)
def test_a_model_that_cannot_work_is_refused_in_one_line(make, said):
  with pytest.raises((ValueError, TypeError), match=said) as caught:
    make()
  assert "\n" not in str(caught.value)


def test_expert_choice_is_welcome_where_attention_looks_both_ways():
  block = expert_choosing(attention=Attention(num_heads=2, causal=False))
  assert model(block).num_layers == 1
