"""A configuration that cannot work is refused when built, in a line that helps."""
# SPDX-License-Identifier: Apache-2.0

import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

import jmoe
import jmoe.linen
import jmoe.nnx
from jmoe import (
  Info,
  State,
  aggregate,
  balance,
  combine,
  dispatch,
  experts,
  gates,
  join,
  losses,
  noise,
  restrict,
  routers,
  score,
  simple,
  total_loss,
  use,
)
from jmoe.assign import capacity, priority, renormalise
from jmoe.config import Attention, BlockConfig, Dense, ModelConfig, MoEConfig
from jmoe.kernels import grouped_matmul
from tests.refusals import (
  COMPILED,
  D,
  E,
  check,
  choosing,
  dropless,
  factor,
  hashed,
  limited,
  numbered,
  rngs,
  small,
  softly,
)

pytestmark = pytest.mark.contract

NAN, INF = float("nan"), float("inf")


def info(**values):
  return Info(losses=values, load=None, dropped={}, entropy=None, state=State())


def model(ff=None, d_model=D, **attention):
  block = BlockConfig(Attention(**{"num_heads": 2, **attention}), ff or small())
  return ModelConfig(256, d_model, segments=(((block,), 2),))


def a_function(x):
  return x


def two_of_something(first, second):
  return first


# fmt: off
SIZES = [
  (lambda: small(k=5), ValueError, ("k=5", "num_experts=4", "k <= 4")),
  (lambda: small(k=0), ValueError, ("k=0", "at least 1")),
  (lambda: small(k=-1), ValueError, ("k=-1", "at least 1")),
  (lambda: small(k=2.0), ValueError, ("k=2.0", "whole number")),
  (lambda: small(k=True), ValueError, ("k=True", "whole number")),
  (lambda: small(k="2"), ValueError, ("k='2'", "whole number")),
  (lambda: small(k=None), ValueError, ("k=None", "whole number")),
  (lambda: MoEConfig(D, E, router=use(routers.top_k, k=9)), ValueError,
   ("k=9", "num_experts=4", "k <= 4")),
  (lambda: MoEConfig(D, E, router=use(routers.noisy_top_k, k=1.5)), ValueError,
   ("noisy_top_k", "k=1.5", "whole number")),
  (lambda: MoEConfig(D, 1, router=use(routers.top_2)), ValueError,
   ("top_2", "num_experts=1", "top_k with k=1")),
  (lambda: small(num_experts=0), ValueError, ("num_experts=0", "at least 1")),
  (lambda: small(num_experts=-2), ValueError, ("num_experts=-2", "at least 1")),
  (lambda: small(num_experts=2.5), ValueError, ("num_experts=2.5", "whole number")),
  (lambda: small(num_experts=True), ValueError, ("num_experts=True", "whole number")),
  (lambda: MoEConfig(0, E), ValueError, ("d_model=0", "at least 1")),
  (lambda: MoEConfig(None, E), ValueError, ("d_model=None", "whole number")),
  (lambda: simple(8.0, 16, num_experts=E), ValueError, ("d_model=8.0",)),
  (lambda: simple(D, 0, num_experts=E), ValueError, ("d_ff=0", "at least 1")),
  (lambda: simple(D, 16.0, num_experts=E), ValueError, ("d_ff=16.0", "whole number")),
  (lambda: small(shared_d_ff=0), ValueError, ("shared_d_ff=0", "at least 1")),
  (lambda: dropless(experts=use(experts.glu, d_ff=-1)), ValueError, ("d_ff=-1",)),
  (lambda: dropless(shared=use(experts.mlp, d_ff=True)), ValueError, ("d_ff=True",)),
  (lambda: dropless(group_size=-1), ValueError, ("group_size=-1", "'row' or None")),
  (lambda: dropless(group_size=0), ValueError, ("group_size=0", "at least 1")),
  (lambda: dropless(group_size=2.0), ValueError, ("group_size=2.0", "whole number")),
  (lambda: dropless(group_size=True), ValueError, ("group_size=True",)),
  (lambda: dropless(group_size="rows"), ValueError, ("group_size='rows'", "'row'")),
  (lambda: dropless(router=use(routers.hashed, vocab_size=0),
    renormalise=use(renormalise.never)), ValueError,
   ("hashed", "vocab_size=0", "at least 1")),
  (lambda: dropless(gate=use(gates.cosine, d_project=0)), ValueError,
   ("cosine", "d_project=0")),
  (lambda: softly(gate=use(gates.slots, slots_per_expert=0)), ValueError,
   ("slots_per_expert=0", "at least 1")),
  (lambda: dropless(dispatch=use(dispatch.sort, block=0)), ValueError, ("block=0",)),
]

CAPACITY = [
  *((lambda f=f: small(capacity_factor=f), ValueError,
     (f"capacity_factor={f}", "positive", "None"))
    for f in (0, 0.0, -1.0, NAN, INF, -INF, True)),
  (lambda: small(capacity_factor="1.25"), ValueError, ("capacity_factor='1.25'",)),
  *((lambda f=f: small(capacity_factor=1.0, eval_capacity_factor=f), ValueError,
     (f"eval_capacity_factor={f}", "positive"))
    for f in (0, -2.0, NAN, INF, False)),
  (lambda: small(eval_capacity_factor=1.0), ValueError,
   ("eval_capacity_factor=1.0", "without capacity_factor", "give both")),
  *((lambda f=f: limited(capacity=factor(factor=f)), ValueError, (f"factor={f}",))
    for f in (0, -1.0, NAN, INF, True)),
  *((lambda f=f: limited(capacity=factor(eval_factor=f)), ValueError,
     (f"eval_factor={f}",)) for f in (0, NAN, INF)),
  (lambda: choosing(router=use(routers.expert_choice, capacity_factor=0.0)), ValueError,
   ("expert_choice", "capacity_factor=0.0", "positive")),
  (lambda: choosing(router=use(routers.expert_choice, capacity_factor=NAN)), ValueError,
   ("expert_choice", "capacity_factor=nan")),
  (lambda: limited(capacity=factor(minimum=-1)), ValueError, ("minimum=-1",)),
  (lambda: limited(capacity=factor(minimum=1.5)), ValueError, ("minimum=1.5", "whole")),
  (lambda: limited(capacity=factor(multiple_of=0)), ValueError, ("multiple_of=0",)),
  (lambda: limited(capacity=factor(multiple_of=2.0)), ValueError, ("multiple_of=2.0",)),
  (lambda: limited(capacity=factor(per_expert=(1.0,))), ValueError,
   ("per_expert", "1 entries", "num_experts=4")),
  (lambda: limited(capacity=factor(per_expert=(1.0, 1.0, 1.0, 0.0))), ValueError,
   ("per_expert=0.0", "positive")),
  (lambda: limited(capacity=factor(count="vald")), ValueError,
   ("count='vald'", "'all'")),
  (lambda: limited(capacity=factor(rule="ceil")), TypeError,
   ("rule='ceil'", "function")),
  (lambda: limited(capacity=use(capacity.fixed, slots=1.5)), ValueError,
   ("slots=1.5", "whole number")),
  (lambda: limited(capacity=use(capacity.fixed, slots=True)), ValueError,
   ("slots=True", "whole number")),
  (lambda: limited(capacity=use(capacity.fixed, slots=-1)), ValueError, ("slots=-1",)),
  (lambda: limited(dispatch=use(dispatch.sort)), ValueError,
   ("capacity=by_factor", "dropless dispatch=sort", "dispatch.buckets")),
  (lambda: small(capacity=factor()), ValueError,
   ("capacity=by_factor", "dropless dispatch=sort", "capacity=None")),
  (lambda: dropless(dispatch=use(dispatch.buckets)), ValueError,
   ("dispatch=buckets", "needs a capacity", "capacity.by_factor")),
  (lambda: dropless(dispatch=use(dispatch.einsum)), ValueError,
   ("dispatch=einsum", "needs a capacity", "dispatch.sort")),
  (lambda: dropless(max_rows=2.0), ValueError, ("max_rows=2.0", "0 to 1")),
  (lambda: dropless(max_rows=0.0), ValueError, ("max_rows=0.0", "positive")),
  (lambda: dropless(max_rows=NAN), ValueError, ("max_rows=nan", "positive")),
  (lambda: dropless(max_rows=True), ValueError, ("max_rows=True", "number")),
  (lambda: limited(max_rows=0.5), ValueError, ("max_rows=0.5", "buckets", "None")),
]

TOGETHER = [
  (lambda: choosing(dispatch=use(dispatch.sort)), ValueError,
   ("router=expert_choice", "dropless dispatch=sort", "dispatch.buckets")),
  (lambda: choosing(capacity=factor()), ValueError,
   ("capacity=by_factor", "expert_choice", "capacity=None")),
  (lambda: choosing(renormalise=use(renormalise.after_dropping)), ValueError,
   ("renormalise", "expert_choice", "renormalise.never")),
  (lambda: choosing(priority=use(priority.by_confidence)), ValueError,
   ("priority", "expert_choice", "by_weight")),
  (lambda: choosing(losses=(use(losses.load_balance),)), ValueError,
   ("load_balance", "expert_choice", "losses=()")),
  (lambda: choosing(losses=(use(losses.load),)), ValueError, ("load", "losses=()")),
  (lambda: choosing(balance=use(balance.update)), ValueError,
   ("balance", "expert_choice", "None")),
  (lambda: choosing(combine=use(combine.stack), aggregate=use(aggregate.per_task,
    num_tasks=2)), ValueError, ("stack", "expert_choice", "token-choice")),
  (lambda: softly(losses=(use(losses.router_z),)), ValueError,
   ("losses", "router=soft", "losses=()")),
  (lambda: softly(capacity=factor()), ValueError, ("capacity", "soft", "None")),
  (lambda: softly(logit_noise=use(noise.gaussian)), ValueError,
   ("logit_noise", "soft", "None")),
  (lambda: softly(scale="input"), ValueError, ("scale='input'", "soft", "'output'")),
  (lambda: softly(gate=use(gates.linear)), ValueError, ("gate=linear", "gates.slots")),
  (lambda: dropless(gate=use(gates.slots)), ValueError, ("gate=slots", "routers.soft")),
  (lambda: dropless(dispatch=use(dispatch.mix)), ValueError, ("dispatch=mix", "soft")),
  (lambda: dropless(losses=(use(losses.load_balance, over="sequnce"),)), ValueError,
   ("over='sequnce'", "'sequence'")),
  (lambda: dropless(losses=(use(losses.load_balance),) * 2), ValueError,
   ("two are named 'load_balance'", "leave one out")),
  (lambda: dropless(losses=(use(losses.load_balance),
    use(losses.load_balance, choices="first"))), ValueError, ("'load_balance'",)),
  (lambda: dropless(combine=use(combine.stack)), ValueError, ("stack", "aggregat")),
  (lambda: dropless(aggregate=use(aggregate.per_task, num_tasks=2)), ValueError,
   ("aggregate=per_task", "combine.stack")),
  (lambda: dropless(join=use(join.sigmoid_gate)), ValueError,
   ("join=sigmoid_gate", "shared=use(experts.glu")),
  (lambda: dropless(restrict=(use(restrict.expert_groups, num_groups=3, keep=1),)),
   ValueError, ("num_groups=3", "num_experts=4", "divisor")),
  (lambda: dropless(restrict=(use(restrict.expert_groups, num_groups=2, keep=3),)),
   ValueError, ("keep=3", "num_groups=2", "1 to 2")),
  (lambda: dropless(restrict=(use(restrict.expert_groups, num_groups=4, keep=1,
    best=1),)), ValueError, ("keep=1", "k=2", "keep=2")),
  (lambda: dropless(restrict=(use(restrict.subset, experts=(0, 9)),)), ValueError,
   ("experts=(0, 9)", "0..3")),
  (lambda: dropless(restrict=(use(restrict.subset, experts=(0,)),)), ValueError,
   ("subset", "k=2", "2 or more")),
  (lambda: dropless(restrict=(use(restrict.domain, num_domains=3),)), ValueError,
   ("num_domains=3", "num_experts=4")),
  (lambda: dropless(experts=use(experts.with_free, base=use(experts.glu, d_ff=4),
    zero=4)), ValueError, ("with_free", "zero=4", "num_experts=4")),
  (lambda: dropless(experts=use(experts.with_free, base=use(experts.glu, d_ff=0),
    zero=1)), ValueError, ("d_ff=0", "at least 1")),
  (lambda: model(choosing()), ValueError,
   ("router=expert_choice", "causal", "routers.top_k", "causal=False")),
  (lambda: model(softly()), ValueError, ("router=soft", "causal", "routers.top_k")),
  (lambda: model(d_model=16), ValueError, ("d_model=8", "d_model=16", "equal")),
]

KINDS = [
  (lambda: dropless(router=routers.top_k), TypeError, ("router=", "use(function")),
  (lambda: dropless(score=None), TypeError, ("score=None", "use(function")),
  (lambda: dropless(losses=use(losses.router_z)), TypeError, ("losses=", "tuple")),
  (lambda: dropless(losses=[use(losses.router_z)]), TypeError, ("losses=", "tuple")),
  (lambda: dropless(losses=(losses.router_z,)), TypeError, ("losses=", "tuple of use")),
  (lambda: dropless(restrict=use(restrict.subset, experts=(0, 1))), TypeError,
   ("restrict=", "tuple")),
  (lambda: dropless(router=use(gates.linear)), TypeError,
   ("router=linear()", "jmoe.gates", "jmoe.routers")),
  (lambda: dropless(gate=use(routers.top_k, k=2)), TypeError,
   ("gate=top_k", "jmoe.gates")),
  (lambda: dropless(dispatch=use(score.softmax)), TypeError, ("dispatch=softmax()",)),
  (lambda: dropless(experts=use(gates.linear)), TypeError,
   ("experts=", "jmoe.experts")),
  (lambda: dropless(renormalise=use(combine.weighted_sum)), TypeError,
   ("renormalise=weighted_sum()", "jmoe.assign.renormalise")),
  (lambda: limited(priority=use(capacity.fixed, slots=1)), TypeError,
   ("priority=fixed(slots=1)", "jmoe.assign.priority")),
  (lambda: limited(capacity=use(capacity.ceil)), TypeError,
   ("capacity=ceil()", "(tokens, num_experts, k)", "takes 4")),
  (lambda: dropless(losses=(use(routers.top_k, k=2),)), TypeError,
   ("losses=top_k(k=2)", "jmoe.losses")),
  (lambda: dropless(router=use(a_function)), TypeError,
   ("router=a_function()", "(logits, scores, select)", "takes 1")),
  (lambda: dropless(dispatch=use(two_of_something)), TypeError,
   ("dispatch=two_of_something()", "takes 2")),
  (lambda: small(activation="silu"), TypeError, ("activation='silu'", "function")),
  (lambda: small(activation=None), TypeError, ("activation=None", "function")),
  (lambda: small(gated="no"), ValueError, ("gated='no'", "True or False")),
  (lambda: small(bias=1), ValueError, ("bias=1", "True or False")),
  (lambda: dropless(rescore="yes"), ValueError, ("rescore='yes'", "True or False")),
  (lambda: dropless(scale="inputs"), ValueError, ("scale='inputs'", "'input'")),
  (lambda: dropless(scale=2.0), ValueError, ("scale=2.0", "'output'")),
  (lambda: dropless(param_dtype="flaot32"), ValueError,
   ("param_dtype='flaot32'", "'float32'")),
  (lambda: dropless(param_dtype="int32"), ValueError, ("param_dtype='int32'", "float")),
  (lambda: dropless(router=use(routers.top_k, k=2, scale=0)), ValueError, ("scale=0",)),
  (lambda: dropless(router=use(routers.top_k, k=2, scale=INF)), ValueError,
   ("scale=inf",)),
  (lambda: dropless(router=use(routers.top_k, k=2, scale="2")), ValueError,
   ("scale='2'", "number")),
  (lambda: dropless(router=use(routers.top_2, policy="rnadom")), ValueError,
   ("policy='rnadom'", "'random'")),
  (lambda: dropless(restrict=(use(restrict.subset, experts=(0.0, 1.0)),)), ValueError,
   ("experts=(0.0, 1.0)", "whole number")),
  (lambda: dropless(restrict=(use(restrict.subset, experts=3),)), ValueError,
   ("experts=3", "tuple")),
  (lambda: dropless(restrict=(use(restrict.expert_groups, num_groups=2.0, keep=1),)),
   ValueError, ("num_groups=2.0", "whole number")),
  (lambda: dropless(experts=use(experts.with_free, base="glu", zero=1)), TypeError,
   ("base='glu'", "use(function")),
  (lambda: dropless(balance=use(balance.update, rate="fast")), ValueError,
   ("rate='fast'", "number")),
  (lambda: model(num_heads=3), ValueError, ("num_heads=3", "d_model=8", "divi")),
  (lambda: model(ff=Dense(0)), ValueError, ("d_ff=0",)),
]

NAMES = [
  (lambda: small(capcity_factor=1.0), TypeError,
   ("'capcity_factor'", "did you mean 'capacity_factor'?")),
  (lambda: simple(D, 16, num_expert=4), TypeError, ("'num_expert'", "'num_experts'")),
  (lambda: small(top_k=2), TypeError, ("'top_k'", "known:", "num_experts")),
  (lambda: MoEConfig(D, num_expert=4), TypeError, ("MoEConfig", "'num_experts'?")),
  (lambda: MoEConfig(D, E, expert=use(experts.glu, d_ff=4)), TypeError,
   ("'expert'", "did you mean 'experts'?")),
  (lambda: dropless(losse=()), TypeError, ("'losse'", "did you mean 'losses'?")),
  (lambda: ModelConfig(256, d_modle=8, segments=()), TypeError,
   ("ModelConfig", "did you mean 'd_model'?")),
  (lambda: Attention(num_head=2), TypeError, ("Attention", "'num_heads'?")),
  (lambda: BlockConfig(Attention(2), f=small()), TypeError, ("BlockConfig", "'f'")),
  (lambda: Dense(dff=2), TypeError, ("Dense", "did you mean 'd_ff'?")),
  (lambda: jmoe.nnx.MoE(D, 16, num_experts=E, capcity_factor=1.0, rngs=rngs()),
   TypeError, ("MoE", "did you mean 'capacity_factor'?")),
  (lambda: jmoe.nnx.MoE(D, 16, num_expert=E, rngs=rngs()), TypeError,
   ("MoE", "did you mean 'num_experts'?")),
  (lambda: jmoe.linen.MoE(D, 16, num_experts=E, capcity_factor=1.0), TypeError,
   ("MoE", "did you mean 'capacity_factor'?")),
  (lambda: jmoe.linen.MoE(D, 16, num_expert=E), TypeError, ("'num_experts'?",)),
  (lambda: jmoe.nnx.MoE(small(), k=2, rngs=rngs()), TypeError,
   ("k beside a MoEConfig", "dataclasses.replace")),
  (lambda: jmoe.linen.MoE(small(), 32), TypeError, ("d_ff beside a MoEConfig",)),
  (lambda: jmoe.nnx.MoE(D, rngs=rngs()), TypeError, ("d_ff", "num_experts")),
  (lambda: jmoe.linen.MoE({}), TypeError, ("MoE({}", "MoEConfig")),
  (lambda: jmoe.nnx.MoE(D, 16, num_experts=E, k=5, rngs=rngs()), ValueError,
   ("k=5", "num_experts=4")),
  (lambda: jmoe.linen.MoE(D, 16, num_experts=E, k=5), ValueError,
   ("k=5", "num_experts=4")),
  (lambda: total_loss([info(load_balance=1.0)], {"load_balnce": 1.0}), ValueError,
   ("'load_balnce'", "did you mean 'load_balance'?")),
  (lambda: total_loss([info()], {"load_balance": 1.0}), ValueError,
   ("'load_balance'", "losses=()")),
  (lambda: total_loss([], {"load_balance": 1.0}), ValueError, ("no infos",)),
  (lambda: dropless(experts=use(experts.glu, d_ff=4, matmul=use(grouped_matmul,
    implementaton="blocks"))), TypeError, ("'implementaton'", "'implementation'?")),
]
# fmt: on

TABLE = numbered(
  size=SIZES, capacity=CAPACITY, together=TOGETHER, kind=KINDS, name=NAMES
)


@pytest.fixture(scope="module", autouse=True)
def drawn():
  rngs()


@pytest.mark.parametrize("case", TABLE)
def test_is_refused_in_one_helpful_line_before_compiling(case):
  check(*TABLE[case])


def test_a_compilation_would_be_seen():
  COMPILED.clear()
  jax.jit(lambda x: x * 3)(jnp.float32(2)).block_until_ready()
  assert COMPILED


def test_what_is_right_is_not_refused():
  for config in (small(), dropless(), limited(), choosing(), hashed(), softly()):
    assert config.num_experts == E
  assert model().num_layers == 2 and model(choosing(), causal=False).num_layers == 2


CODE = """
import time
import jax, flax, jmoe, jmoe.nnx
from flax import nnx
start = time.process_time()
try:
  jmoe.nnx.MoE(512, 2048, num_experts=4, k=5, rngs=nnx.Rngs(0))
except ValueError as error:
  print(time.process_time() - start, error)
"""


def test_a_fresh_process_refuses_within_a_second_of_its_imports():
  done = subprocess.run(
    [sys.executable, "-c", CODE], capture_output=True, text=True, check=True
  )
  seconds, message = done.stdout.strip().split(" ", 1)
  assert float(seconds) < 1.0
  assert message == "k=5 is more than num_experts=4; use k <= 4 or more experts."
