"""Stages that contradict each other, or of which one would be lost, are refused."""
# SPDX-License-Identifier: Apache-2.0

import dataclasses

import pytest

from jmoe import (
  balance,
  experts,
  gates,
  losses,
  noise,
  restrict,
  routers,
  score,
  simple,
  use,
)
from jmoe.assign import priority, renormalise
from jmoe.config import Attention, BlockConfig, ModelConfig, MoEConfig
from tests.refusals import (
  D,
  E,
  check,
  choosing,
  dropless,
  factor,
  limited,
  numbered,
  small,
)

pytestmark = pytest.mark.contract


def model(ff=None, **attention):
  block = BlockConfig(Attention(**{"num_heads": 2, **attention}), ff or small())
  return ModelConfig(256, D, segments=(((block,), 2),))


def noisy(**fields):
  """V-MoE's noise, which the load loss wants."""
  own = dict(router=use(routers.noisy_top_k, k=2), losses=(use(losses.load),))
  return MoEConfig(D, E, **{**own, **fields})


SUBSET = use(restrict.subset, experts=(0, 1))
OTHERS = use(restrict.subset, experts=(2, 3))
# Routers, and the stages they do not read.
UNREAD = {
  use(routers.noisy_top_k, k=2): ("balance", "select_noise", "logit_noise", "score"),
  use(routers.hashed, vocab_size=5): (
    "balance", "select_noise", "logit_noise", "score"
  ),
  use(routers.every_expert): ("balance", "select_noise"),
}  # fmt: skip
STAGES = dict(
  balance=use(balance.update),
  select_noise=use(noise.gumbel),
  logit_noise=use(noise.gaussian),
  score=use(score.sigmoid),
)


# fmt: off
TWICE = [
  (lambda: small(k=3, router=use(routers.top_k, k=1)), TypeError,
   ("k beside router=top_k(k=1)", "give one")),
  (lambda: small(k=2, router=use(routers.top_k, k=2)), TypeError, ("k beside router",)),
  (lambda: small(experts=use(experts.mlp, d_ff=4)), TypeError,
   ("d_ff beside experts=mlp(d_ff=4)", "MoEConfig(..., experts=...)")),
  (lambda: small(gated=False, experts=use(experts.mlp, d_ff=4)), TypeError,
   ("d_ff and gated beside experts",)),
  (lambda: small(capacity_factor=1.25, capacity=factor()), TypeError,
   ("capacity_factor beside capacity=by_factor(factor=1.0)",)),
  (lambda: small(shared_d_ff=4, shared=use(experts.mlp, d_ff=8)), TypeError,
   ("shared_d_ff beside shared=mlp(d_ff=8)",)),
]

CONSTANT = [
  *((lambda rule=rule: dropless(router=use(routers.top_k, k=1), renormalise=use(rule)),
     ValueError, (f"renormalise={rule.__name__}()", "k=1", "renormalise.never"))
    for rule in (renormalise.before_dropping, renormalise.after_dropping,
                 renormalise.over_chosen)),
  *((lambda rule=rule: dropless(router=use(routers.top_2, policy="none"),
     renormalise=use(rule)), ValueError, ("policy='none'", "renormalise.never"))
    for rule in (renormalise.after_dropping, renormalise.over_chosen)),
  (lambda: dropless(gate=use(gates.none)), ValueError,
   ("losses=(load_balance(), router_z())", "gate=none", "losses=()")),
  (lambda: MoEConfig(D, E, gate=use(gates.none), router=use(routers.hashed,
    vocab_size=5), losses=(use(losses.load_balance),)), ValueError, ("gate=none",)),
]

RESTRICT = [
  (lambda: dropless(restrict=(SUBSET, OTHERS)), ValueError,
   ("restrict=(subset", "leave a token 0 experts", "the 2 it needs")),
  (lambda: choosing(restrict=(SUBSET, OTHERS)), ValueError, ("0 experts", "the 1")),
  (lambda: choosing(restrict=(use(restrict.subset, experts=()),)), ValueError,
   ("subset: experts=()", "keep 1 or more")),
  *((lambda pair=pair: MoEConfig(D, 8, restrict=pair), ValueError,
     ("leave a token 1 experts", "the 2 it needs"))
    for one in [use(restrict.expert_groups, num_groups=4, keep=1)]
    for other in [use(restrict.subset, experts=(0, 2, 3, 4, 5))]
    for pair in ((one, other), (other, one))),
  (lambda: MoEConfig(D, 8, restrict=(use(restrict.domain, num_domains=2),
    use(restrict.subset, experts=(0, 4)))), ValueError, ("leave a token 1 experts",)),
  (lambda: MoEConfig(D, 8, router=use(routers.top_k, k=3), restrict=(
    use(restrict.expert_groups, num_groups=4, keep=2),
    use(restrict.expert_groups, num_groups=2, keep=1))), ValueError,
   ("leave a token 2 experts", "the 3 it needs")),
]

NO_EFFECT = [
  (lambda r=router, f=field: MoEConfig(D, E, router=r, losses=(), **{f: STAGES[f]}),
   ValueError, (f"{field}=", "no effect", f"router={router.name}", "routers.top_k"))
  for router, fields in UNREAD.items() for field in fields
]

LOAD = [
  (lambda: noisy(router=use(routers.top_k, k=2)), ValueError,
   ("load", "no Gaussian noise", "routers.noisy_top_k", "noise.gaussian")),
  (lambda: noisy(router=use(routers.top_k, k=2), logit_noise=use(noise.gumbel)),
   ValueError, ("no Gaussian noise",)),
  (lambda: noisy(router=use(routers.top_k, k=2), select_noise=use(noise.gaussian)),
   ValueError, ("no Gaussian noise",)),
  (lambda: noisy(router=use(routers.top_k, k=2), logit_noise=use(noise.gaussian,
    std=0.5)), ValueError, ("noise_std=1.0", "gaussian(std=0.5)", "the same")),
  (lambda: noisy(router=use(routers.noisy_top_k, k=2, noise_std=0.0)), ValueError,
   ("noise_std=1.0", "draws 0.0")),
  (lambda: noisy(router=use(routers.noisy_top_k, k=4)), ValueError,
   ("k=4 takes every expert", "k < 4")),
  (lambda: noisy(restrict=(SUBSET,)), ValueError, ("load", "restrict=(subset",)),
  (lambda: noisy(router=use(routers.top_k, k=2), logit_noise=use(noise.gaussian),
    balance=use(balance.update)), ValueError, ("load", "balance=update()")),
  *((lambda r=router: noisy(router=r), ValueError,
     (f"{router.name} does not take the k best", "routers.noisy_top_k"))
    for router in (use(routers.top_2), use(routers.every_expert),
                   use(routers.hashed, vocab_size=5))),
]

CAUSAL = [
  *((lambda p=p: model(limited(priority=use(p))), ValueError,
     (f"priority={p.__name__}", "later tokens", "by_choice_rank", "future_drops=True"))
    for p in (priority.by_confidence, priority.by_weight, priority.random)),
  (lambda: model(dropless(max_rows=0.5)), ValueError,
   ("max_rows=0.5", "later tokens", "max_rows=None", "future_drops=True")),
  (lambda: dataclasses.replace(model(), future_drops=1), TypeError,
   ("future_drops=1", "True or False")),
]

# fmt: on

TABLE = numbered(
  twice=TWICE,
  constant=CONSTANT,
  restrict=RESTRICT,
  no_effect=NO_EFFECT,
  load=LOAD,
  causal=CAUSAL,
)


@pytest.mark.parametrize("case", TABLE)
def test_is_refused_in_one_helpful_line_before_compiling(case):
  check(*TABLE[case])


def test_what_looks_ahead_is_welcome_where_it_may_or_drops_nothing():
  confident = limited(priority=use(priority.by_confidence))
  bounded = dropless(max_rows=0.5)
  for ff in (confident, bounded):
    assert model(ff, causal=False).num_layers == 2
    block = BlockConfig(Attention(num_heads=2), ff)
    open_eyed = ModelConfig(256, D, segments=(((block,), 1),), future_drops=True)
    assert open_eyed.num_layers == 1
    with pytest.raises(ValueError, match="future_drops"):
      dataclasses.replace(open_eyed, future_drops=False)
  assert model(dropless(priority=use(priority.random), max_rows=1.0)).num_layers == 2


def test_one_choice_is_renormalised_only_where_no_gate_could_learn_from_it():
  one = use(routers.top_k, k=1)
  assert (
    simple(D, 16, num_experts=E, router=one).renormalise
    == use(renormalise.never)
    == small(k=1).renormalise
  )
  three = use(routers.top_k, k=3)
  assert simple(D, 16, num_experts=E, router=three) == small(k=3)
  share = use(renormalise.before_dropping)
  assert MoEConfig(D, 1, router=one, renormalise=share).k == 1
  assert (
    MoEConfig(D, E, gate=use(gates.none), router=one, renormalise=share, losses=()).k
    == 1
  )


def test_restrictions_that_leave_enough_together_are_accepted():
  groups = use(restrict.expert_groups, num_groups=4, keep=1)
  some = use(restrict.subset, experts=(0, 1, 4, 5))
  domain = use(restrict.domain, num_domains=2)
  for pair in ((groups, some), (some, groups), (domain, groups), (domain, some)):
    assert MoEConfig(D, 8, restrict=pair).restrict == pair
  many = use(restrict.expert_groups, num_groups=32, keep=16)  # 600 million choices
  half = use(restrict.subset, experts=tuple(range(0, 64, 2)))
  assert MoEConfig(D, 64, restrict=(many, half)).k == 2
