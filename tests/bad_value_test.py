"""Numbers out of range, functions in the wrong place, misspelt names: one line each.

What fields of a configuration mean together is in `contradictions_test`.
"""
# SPDX-License-Identifier: Apache-2.0

import dataclasses
import inspect

import jax
import pytest

import jmoe.presets
from jmoe import (
  Context,
  State,
  balance,
  experts,
  gates,
  initializers,
  losses,
  noise,
  routers,
  use,
)
from jmoe.assign import capacity
from jmoe.config import Attention, BlockConfig, Dense, ModelConfig
from tests._cases import enable_x64
from tests.refusals import (
  D,
  check,
  choosing,
  dropless,
  factor,
  limited,
  numbered,
  small,
)

pytestmark = pytest.mark.contract

INF = float("inf")


def balanced(rate):
  return dropless(balance=use(balance.update, rate=rate))


def with_experts(**keywords):
  return dropless(experts=use(experts.glu, **{"d_ff": 4, **keywords}))


def clamped(**keywords):
  return dropless(experts=use(experts.clamped_glu, d_ff=4, **keywords))


def model(ff=None, causal=True, **fields):
  block = BlockConfig(Attention(2, causal=causal), ff or small())
  return ModelConfig(256, D, segments=(((block,), 2),), **fields)


def two_of_something(first, second):
  return first


# fmt: off
NUMBERS = [
  *((lambda r=r: balanced(r), ValueError, (f"rate={r}", "from 0 up"))
    for r in (-1.0, INF)),
  *((lambda e=e: dropless(input_noise=use(noise.jitter, eps=e)), ValueError,
     (f"jitter: eps={e}", "0 to 1")) for e in (-1.0, 1.5, INF)),
  *((lambda s=s: dropless(logit_noise=use(noise.gaussian, std=s)), ValueError,
     (f"gaussian: std={s}", "from 0 up")) for s in (-1.0, INF)),
  *((lambda x=x: clamped(limit=x), ValueError,
     (f"clamped_glu: limit={x}", "above 0")) for x in (-1, 0.0, INF)),
  (lambda: clamped(alpha=INF), ValueError, ("alpha=inf", "finite")),
  (lambda: with_experts(initializer=use(initializers.fan_in, scale=-1.0)), ValueError,
   ("fan_in: scale=-1.0", "from 0 up")),
  (lambda: dropless(gate=use(gates.linear, initializer=use(
    initializers.truncated_normal, stddev=-1.0))), ValueError, ("stddev=-1.0",)),
  (lambda: dropless(losses=(use(losses.entropy_global, threshold=-1.0),)), ValueError,
   ("threshold=-1.0", "from 0 up")),
  (lambda: dropless(param_dtype="float64"), ValueError,
   ("param_dtype='float64'", "jax_enable_x64", "'float32'")),
  (lambda: model(dtype="float64"), ValueError, ("dtype='float64'", "jax_enable_x64")),
]

WITHIN = [
  *((lambda r=r: limited(capacity=factor(rule=r)), TypeError,
     ("by_factor: rule=", "(tokens, num_experts, k, factor)", "jmoe.assign.capacity"))
    for r in (jax.nn.silu, capacity.by_factor, capacity.fixed)),
  (lambda: limited(capacity=factor(eval_rule=jax.nn.silu)), TypeError,
   ("eval_rule=silu", "takes 1")),
  (lambda: choosing(router=use(routers.expert_choice, rule=jax.nn.silu)), TypeError,
   ("expert_choice: rule=silu",)),
  (lambda: dropless(experts=use(experts.with_free, base=use(routers.top_k, k=1),
    zero=1)), TypeError, ("with_free: base=top_k(k=1)", "jmoe.experts")),
  (lambda: with_experts(initializer=use(routers.top_k, k=1)), TypeError,
   ("glu: initializer=top_k(k=1)", "jmoe.initializers")),
  (lambda: with_experts(activation=two_of_something), TypeError,
   ("glu: activation=two_of_something", "takes 2")),
  (lambda: with_experts(matmul=jax.nn.silu), TypeError, ("glu: matmul=silu",)),
]

FLAGS = [
  (lambda: model(Dense(4, gated="no")), TypeError, ("gated='no'", "True or False")),
  *((lambda v=v: model(causal=v), TypeError, (f"causal={v!r}", "True or False"))
    for v in ("no", None)),
  *((lambda f=f: model(**f), TypeError, ("True or False",))
    for f in (dict(tied=None), dict(tied="no"), dict(remat=3))),
]

NAMES = [
  (lambda: Context(vald=1), TypeError, ("Context", "did you mean 'valid'?")),
  (lambda: State(bais=1), TypeError, ("State", "did you mean 'bias'?")),
  (lambda: jmoe.preset, AttributeError, ("'preset'", "did you mean 'presets'?")),
  (lambda: jmoe.presets.mixtrl, AttributeError, ("'mixtrl'", "mean 'mixtral'?")),
  (lambda: jmoe.presets.mixtral.layer(d_f=8), TypeError,
   ("mixtral.layer", "did you mean 'd_ff'?")),
  (lambda: jmoe.presets.mixtral.layer(d_model=8), TypeError,
   ("mixtral.layer", "'d_ff'", "its keywords: d_model")),
  (lambda: jmoe.presets.mixtral.layer(8, 8), TypeError, ("mixtral.layer", "position")),
]
# fmt: on

TABLE = numbered(number=NUMBERS, within=WITHIN, flag=FLAGS, name=NAMES)


@pytest.mark.parametrize("case", TABLE)
def test_is_refused_in_one_helpful_line_before_compiling(case):
  check(*TABLE[case])


def test_the_ends_of_a_range_are_in_it():
  for one in (use(noise.gaussian, std=0), use(noise.jitter, eps=1)):
    assert dropless(input_noise=one).input_noise == one
  assert balanced(0).balance == use(balance.update, rate=0)


def test_functions_with_keywords_have_a_place_within_functions():
  exact = use(jax.nn.gelu, approximate=False)
  assert with_experts(activation=exact).experts.get("activation") == exact
  zeros = use(initializers.zeros)
  assert with_experts(initializer=zeros).experts.get("initializer") == zeros
  with enable_x64():
    assert dataclasses.replace(small(), param_dtype="float64").param_dtype == "float64"


def of_preset(module):
  """Its public functions."""
  found = {n: f for n, f in vars(module).items() if inspect.isfunction(f)}
  return [
    f for n, f in found.items() if f.__module__ == module.__name__ and n[0] != "_"
  ]


PRESETS = {n: m for n, m in vars(jmoe.presets).items() if inspect.ismodule(m)}


@pytest.mark.parametrize("name", PRESETS)
def test_each_preset_names_the_nearest_keyword(name):
  functions = of_preset(PRESETS[name])
  assert PRESETS[name].layer in functions
  for function in functions:
    with pytest.raises(TypeError, match=f"{name}.{function.__name__}: unknown keyword"):
      function(num_expert=4)
