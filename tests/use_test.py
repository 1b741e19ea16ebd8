"""`use` and configurations are values: equal, hashable, printable, JSON both ways."""
# SPDX-License-Identifier: Apache-2.0

import copy
import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jmoe
from jmoe import (
  aggregate,
  balance,
  combine,
  dispatch,
  experts,
  gates,
  initializers,
  join,
  losses,
  noise,
  restrict,
  routers,
  score,
  use,
)
from jmoe.assign import capacity, priority, renormalise
from jmoe.config import Attention, BlockConfig, Dense, ModelConfig, MoEConfig
from jmoe.use import Use, from_json, marked, to_json

pytestmark = pytest.mark.contract


def everything() -> MoEConfig:
  """A configuration with a value of every kind, made from scratch."""
  gelu = use(jax.nn.gelu, approximate=False)
  return MoEConfig(
    16,
    8,
    input_noise=use(noise.jitter, eps=0.05),
    gate=use(gates.linear, bias=True, initializer=use(initializers.zeros)),
    logit_noise=use(noise.gaussian, std=0.5),
    score=use(score.sigmoid),
    restrict=(
      use(restrict.expert_groups, num_groups=4, keep=2),
      use(restrict.subset, experts=(0, 1, 2, 5)),
    ),
    rescore=True,
    router=use(routers.top_k, k=2, scale=2.5),
    group_size="row",
    priority=use(priority.by_confidence),
    capacity=use(
      capacity.by_factor, factor=1.25, eval_factor=2, rule=capacity.vmoe, count="all"
    ),
    renormalise=use(renormalise.after_dropping),
    dispatch=use(dispatch.buckets),
    experts=use(
      experts.with_free, base=use(experts.mlp, d_ff=4, activation=gelu), zero=1
    ),
    scale="input",
    combine=use(combine.stack),
    aggregate=use(aggregate.per_task, num_tasks=2),
    shared=use(experts.glu, d_ff=4, activation=jax.nn.relu),
    join=use(join.blend),
    losses=(
      use(losses.load_balance, over="mesh"),
      use(losses.router_z),
      use(losses.entropy_global, modality=1, threshold=0.5),
    ),
    balance=use(balance.update, rate=1e-2),
    param_dtype=jnp.bfloat16,
  )


def a_model() -> ModelConfig:
  attention = Attention(num_heads=4, num_kv_heads=2)
  dense = BlockConfig(attention, Dense(32, activation=jax.nn.gelu))
  sparse = BlockConfig(attention, jmoe.simple(16, 8, num_experts=4, k=2), norm="layer")
  return ModelConfig(256, 16, segments=(((dense,), 1), ((dense, sparse), 3)))


CONFIGS = {
  "everything": everything,
  "simple": lambda: jmoe.simple(16, 32, num_experts=4, k=2, capacity_factor=1.25),
  "plain": lambda: jmoe.simple(16, 32, num_experts=4, gated=False, bias=True),
  "model": a_model,
}


@pytest.mark.parametrize("name", CONFIGS)
class TestConfigurations:
  def test_made_twice_are_equal_and_hash_alike(self, name):
    one, two = CONFIGS[name](), CONFIGS[name]()
    assert one == two and hash(one) == hash(two) and one is not two
    assert {one: "found"}[two] == "found"

  def test_survive_json_as_equal_values(self, name):
    config = CONFIGS[name]()
    again = from_json(to_json(config))
    assert again == config and type(again) is type(config)
    assert hash(again) == hash(config) and to_json(again) == to_json(config)


@pytest.mark.parametrize("name", ["everything", "simple", "plain"])
def test_a_deep_copy_is_equal_even_with_jitted_activations(name):
  config = CONFIGS[name]()
  assert copy.deepcopy(config) == config


def test_a_changed_field_makes_another_value():
  config = everything()
  others = [
    dataclasses.replace(config, router=config.router.replace(scale=3.0)),
    dataclasses.replace(config, losses=config.losses[:1]),
    dataclasses.replace(config, d_model=32),
    dataclasses.replace(config, group_size=4),
    dataclasses.replace(config, param_dtype="float32"),
  ]
  assert len({config, *others}) == 6


def test_param_dtype_is_one_value_however_it_is_written():
  ways = (jnp.bfloat16, "bfloat16", jnp.dtype("bfloat16"))
  configs = [jmoe.simple(8, 8, num_experts=2, param_dtype=way) for way in ways]
  assert len(set(configs)) == 1 and configs[0].param_dtype == "bfloat16"


def test_order_of_keywords_does_not_matter():
  one = use(routers.top_k, k=2, scale=2.0)
  two = use(routers.top_k, scale=2.0, k=2)
  assert one == two and hash(one) == hash(two) and repr(one) == repr(two)


def test_prints_as_the_call_it_is():
  assert " at 0x" not in repr(everything())
  gelu = use(jax.nn.gelu, approximate=False)
  made = use(experts.mlp, d_ff=4, activation=gelu, initializer=use(initializers.zeros))
  expected = "mlp(activation=gelu(approximate=False), d_ff=4, initializer=zeros())"
  assert repr(made) == expected
  assert repr(use(experts.glu, d_ff=4, activation=jax.nn.silu)) == (
    "glu(activation=silu, d_ff=4)"
  )
  assert repr(use(losses.load_balance, over="mesh")) == "load_balance(over='mesh')"


def test_a_use_is_called_like_its_function_and_is_handed_only_what_it_takes():
  gelu = use(jax.nn.gelu, approximate=False)
  x = jnp.linspace(-2, 2, 5)
  np.testing.assert_array_equal(gelu(x), jax.nn.gelu(x, approximate=False))
  np.testing.assert_array_equal(gelu(x, context=None, key=3), gelu(x))
  assert use(capacity.fixed, slots=3)(7, 2, 1, train=True) == 3


def test_what_the_layer_passes_wins_over_nothing_and_keywords_win_over_defaults():
  top = use(routers.top_k, k=2)
  assert top.get("k") == 2 and top.get("scale") == 1.0
  assert top.replace(scale=2.0).get("scale") == 2.0 and top.get("scale") == 1.0
  assert top.kwargs == {"k": 2} and top.name == "top_k"


def test_numpy_scalars_become_pythons():
  made = use(routers.top_k, k=np.int64(2), scale=np.float32(2.5))
  assert made == use(routers.top_k, k=2, scale=2.5)
  assert type(made.get("k")) is int and type(made.get("scale")) is float
  config = jmoe.simple(np.int32(8), np.int32(8), num_experts=np.int64(4), k=np.int64(2))
  assert config == jmoe.simple(8, 8, num_experts=4, k=2)
  assert type(config.num_experts) is int
  dense = BlockConfig(
    Attention(np.int64(4)), Dense(np.int32(32), gated=np.bool_(False))
  )
  segments = (((dense,), np.int64(2)),)
  model = ModelConfig(np.int64(256), 16, segments=segments, tied=np.bool_(True))
  assert from_json(to_json(model)) == model
  assert from_json(to_json(config)) == config


def test_an_activation_with_keywords_is_part_of_the_value_and_of_the_json():
  exact = use(jax.nn.gelu, approximate=False)
  one = jmoe.simple(8, 8, num_experts=2, activation=exact)
  two = jmoe.simple(8, 8, num_experts=2, activation=jax.nn.gelu)
  assert one != two
  assert json.loads(to_json(one))["experts"]["activation"] == {
    "use": "jax.nn.gelu",
    "approximate": False,
  }
  assert json.loads(to_json(two))["experts"]["activation"] == {
    "function": "jax.nn.gelu"
  }


@marked(choices=lambda num_experts, **_: 1)
def first_expert(logits, scores, select, *, context, forced=None):
  """A router of somebody else's: every token to expert 0."""
  from jmoe.routers.token_choice import token_choice

  nobody = jnp.zeros((scores.shape[0], 1), jnp.int32)
  return token_choice(
    nobody, logits=logits, scores=scores, context=context, forced=forced
  )


def test_a_function_from_elsewhere_works_and_is_read_only_if_allowed():
  config = MoEConfig(8, 4, router=use(first_expert))
  text = to_json(config)
  with pytest.raises(ValueError, match="outside jmoe, jax.nn; pass allow"):
    from_json(text)
  assert from_json(text, allow=(first_expert.__module__,)) == config
  params = jmoe.moe_init(jax.random.key(0), config)
  y_TD, info = jmoe.moe(params, jnp.ones((3, 8)), config)
  assert y_TD.shape == (3, 8) and info.load.tolist() == [3, 0, 0, 0]


def local_function():
  def inside(x):
    return x

  return inside


@pytest.mark.parametrize(
  "function", [lambda x: x, local_function()], ids=["lambda", "local"]
)
def test_a_function_without_a_public_name_is_a_value_but_has_no_json(function):
  config = jmoe.simple(8, 8, num_experts=2, activation=function)
  assert config == jmoe.simple(8, 8, num_experts=2, activation=function)
  with pytest.raises(ValueError, match="no public name; move it to the top level"):
    to_json(config)


@pytest.mark.parametrize(
  ("make", "error", "words"),
  [
    (lambda: use(routers.top_k, kk=2), TypeError, ("'kk'", "did you mean 'k'?")),
    (lambda: use(routers.top_k, k=1, scal=2), TypeError, ("'scal'", "'scale'")),
    (lambda: use(score.softmax, axis=1), TypeError, ("softmax", "none is taken.")),
    (lambda: use(routers.top_k, k=1, mask=None), TypeError, ("'mask'",)),
    (lambda: use(routers.top_k), TypeError, ("top_k", "missing k", "k=...")),
    (lambda: use(routers.top_k, 2), TypeError, ("top_k", "2", "by position", "k")),
    (lambda: use("top_k", k=2), TypeError, ("'top_k'", "pass the function")),
    (lambda: use(restrict.subset, experts=[0]), TypeError, ("experts=[0]", "tuples")),
    (
      lambda: use(restrict.subset, experts=np.ones((9, 9))),
      TypeError,
      ("experts=array", "cannot be compared", "tuples"),
    ),
    (lambda: use(noise.jitter, eps=float("nan")), ValueError, ("jitter", "eps=nan")),
    (
      lambda: use(capacity.by_factor, factor=1.0, per_expert=(1.0, float("nan"))),
      ValueError,
      ("per_expert", "nan"),
    ),
  ],
)
def test_a_call_that_cannot_be_meant_is_refused_at_once(make, error, words):
  with pytest.raises(error) as caught:
    make()
  message = str(caught.value)
  assert "\n" not in message
  for word in words:
    assert word in message, message


@pytest.mark.parametrize(
  ("text", "words"),
  [
    ('{"use": "os.system"}', ("'os.system'", "outside jmoe, jax.nn", "allow=")),
    ('{"use": "jmoeevil.run"}', ("'jmoeevil.run'", "outside")),
    ('{"function": "builtins.eval"}', ("'builtins.eval'", "outside")),
    ('{"use": "jmoe.routers.top_kk"}', ("'jmoe.routers.top_kk'", "not exist")),
    ('{"use": "jmoe.nothing.here"}', ("'jmoe.nothing.here'", "not exist")),
    ('{"function": "jmoe.use.importlib.import_module"}', ("not exist",)),
    ('{"function": "jmoe.use.importlib"}', ("not a function",)),
    ('{"use": 3}', ("names 3", "not a string")),
    ('{"type": "jmoe.routers.top_k"}', ("'jmoe.routers.top_k'", "no configuration")),
    ('{"kind": 1}', ("'use', 'function' nor 'type'",)),
    (
      '{"type": "jmoe.config.MoEConfig", "d_model": 8, "num_expert": 4}',
      ("MoEConfig", "'num_expert'", "did you mean 'num_experts'?"),
    ),
    (
      '{"type": "jmoe.config.MoEConfig", "d_model": 8}',
      ("MoEConfig", "num_experts is missing"),
    ),
    (
      '{"type": "jmoe.config.MoEConfig", "d_model": 8, "num_experts": 1}',
      ("k=2", "num_experts=1", "use k <= 1"),
    ),
    ('{"use": ', ("from_json", "no JSON", "line 1", "to_json")),
    ("[1, 2]", ("from_json", "[1, 2]", "no configuration", "to_json")),
    ("3", ("from_json", "3", "no configuration")),
    (None, ("from_json", "None", "no JSON")),
  ],
)
def test_json_that_names_what_it_must_not_is_refused(text, words):
  with pytest.raises(ValueError) as caught:
    from_json(text)
  message = str(caught.value)
  assert "\n" not in message
  for word in words:
    assert word in message, message


def test_an_object_without_json_form_says_so():
  with pytest.raises(TypeError, match="object has no JSON form"):
    to_json(Use(routers.top_k, (("k", object()),)))
