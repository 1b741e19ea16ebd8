"""Every published layer: builds, survives JSON, runs, learns, and is what it says.

Faults put in on purpose, and the test that then failed:

  another capacity rule, factor or k                 facts
  one GShard layer's slot rule in the other          runs and learns
  weights left undivided, or scaled by another sum   runs and learns
  a loss without its weight, or over another scope   runs and learns
  a shared expert of another width, a missing bias   published counts
"""
# SPDX-License-Identifier: Apache-2.0

import dataclasses
import functools
import inspect
import math
import pkgutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jmoe
from jmoe import Context, checks, presets
from jmoe.assign import capacity, priority, renormalise
from jmoe.kernels import grouped_matmul
from jmoe.layer import init_state, param_shapes
from jmoe.use import from_json, to_json, use

# Compile time is what this file costs: half of it goes with these two.
QUICK = {
  "xla_backend_optimization_level": 0,
  "xla_llvm_disable_expensive_passes": True,
}
T, D = 24, 16
SIZES = dict(d_model=D, d_ff=32, num_experts=8)
TOP_2 = {**SIZES, "k": 2}
LIMOE = dict(image_threshold=math.log(4), text_threshold=math.log(2))
LIMOE_WEIGHTS = presets.limoe.loss_weights(
  text_local=0.04,
  text_global=0.04,
  image_global=0.04,
  importance=0.005,
  load=0.005,
  router_z=0.001,
)
GROUPS = {**TOP_2, "num_groups": 4, "keep_groups": 2}
TABLE = {  # module.function: keywords of a tiny layer
  "switch.layer": {**SIZES, "group_size": 10},
  "gshard.layer": {**SIZES, "group_size": 12},
  "gshard.lingvo_layer": {**SIZES, "group_size": 12},
  "glam.layer": SIZES,
  "st_moe.layer": SIZES,
  "vmoe.layer": {**SIZES, "group_size": "row"},
  "limoe.layer": {**SIZES, **LIMOE},
  "mmoe.layer": {**SIZES, "num_tasks": 3},
  "zcode_m3.layer": SIZES,
  "pr_moe.layer": SIZES,
  "pr_moe.blended_layer": SIZES,
  "tutel.layer": {**TOP_2, "noise_std": 1.0},
  "fairseq_moe.layer": SIZES,
  "pangu_sigma.layer": {**SIZES, "vocab_size": 11, "num_domains": 4},
  "mixtral.layer": TOP_2,
  "dbrx.layer": SIZES,
  "grok_1.layer": SIZES,
  "olmoe.layer": TOP_2,
  "qwen2_moe.layer": {**TOP_2, "shared_d_ff": 24},
  "qwen3_moe.layer": TOP_2,
  "deepseek_v2.layer": GROUPS,
  "deepseek_v2.lite_layer": TOP_2,
  "deepseek_v3.layer": GROUPS,
  "gpt_oss.layer": SIZES,
  "llama_4.layer": SIZES,
  "expert_choice.layer": {**SIZES, "group_size": 12},
  "soft_moe.layer": {**SIZES, "slots_per_expert": 2},
  "moe_plus_plus.layer": SIZES,
  "hash_layers.layer": {**SIZES, "vocab_size": 11},
  "megablocks.layer": SIZES,
  "dag_moe.layer": TOP_2,
  "emo.layer": {**TOP_2, "least": 3},
  "emoe.layer": TOP_2,
  "emoe.learned_layer": TOP_2,
  "emoe.released_layer": TOP_2,
}
NO_GATE = ("mmoe.layer", "pangu_sigma.layer", "hash_layers.layer")
each_preset = pytest.mark.parametrize("name", TABLE)


def function_of(name: str):
  module, function = name.split(".")
  return getattr(getattr(presets, module), function)


def build(name: str, **changed) -> jmoe.MoEConfig:
  return function_of(name)(**{**TABLE[name], **changed})


def context() -> Context:
  """Two rows of twelve tokens, the last two padding."""
  tokens = jnp.arange(T, dtype=jnp.int32)
  return Context(
    valid=tokens < T - 2,
    segment=tokens // 5,
    token_id=tokens % 11,
    domain_id=tokens // 6,
    modality=tokens % 2,
    num_rows=2,
  )


def quick(config: jmoe.MoEConfig) -> jmoe.MoEConfig:
  """The same layer with matmuls that compile fast; kernels have their own tests."""
  plain = use(grouped_matmul, implementation="ragged_dot", allow_dense=True)

  def swapped(expert):
    if expert is None:
      return None
    if "base" in expert.kwargs:
      return expert.replace(base=swapped(expert.kwargs["base"]))
    return expert.replace(matmul=plain)

  return dataclasses.replace(
    config, experts=swapped(config.experts), shared=swapped(config.shared)
  )


def run(name: str):
  """One training step of the preset's own objective: loss, y, Info, gradients."""
  config = quick(build(name))
  r = np.random.default_rng(0)
  params = jax.tree.map(
    lambda leaf: jnp.asarray(r.normal(size=leaf.shape) / 4, leaf.dtype),
    param_shapes(config),
  )
  if "zeros" in repr(config.gate):
    params["gate"] = jax.tree.map(jnp.zeros_like, params["gate"])
  state = init_state(config, params, jax.random.key(1))
  x_TD = jnp.asarray(r.normal(size=(T, D)), jnp.float32)

  @functools.partial(jax.jit, compiler_options=QUICK)
  @functools.partial(jax.value_and_grad, has_aux=True)
  def step(params, x_TD, state, key):
    y, info = jmoe.moe(
      params,
      x_TD,
      config,
      context=context(),
      state=state,
      key=key,
      train=True,
      residual=x_TD if checks.owns_skip(config) else None,
      with_plan=True,
    )
    loss = jnp.sum(jnp.square(y)) + jmoe.total_loss(info, loss_weights(name))
    return loss, (y, info)

  (loss, (y, info)), gradients = step(params, x_TD, state, jax.random.key(2))
  return loss, y, info, gradients


def loss_weights(name: str) -> dict[str, float]:
  module = getattr(presets, name.split(".")[0])
  own = {
    "limoe.layer": LIMOE_WEIGHTS,
    "emoe.learned_layer": presets.emoe.LEARNED_LOSS_WEIGHTS,
    "emoe.released_layer": presets.emoe.RELEASED_LOSS_WEIGHTS,
  }
  return own[name] if name in own else module.LOSS_WEIGHTS


def test_table_has_every_preset():
  found = set()
  for module in pkgutil.iter_modules(presets.__path__):
    functions = inspect.getmembers(getattr(presets, module.name), inspect.isfunction)
    found |= {f"{module.name}.{n}" for n, _ in functions if n.endswith("layer")}
  assert {name for name in found if "._" not in name} == set(TABLE)


@each_preset
def test_survives_json_and_compares_equal(name):
  config = build(name)
  again = from_json(to_json(config))
  assert again == config == build(name) and hash(again) == hash(config)
  assert config != build(name, d_ff=48)


@each_preset
def test_defaults_build(name):
  """The published number of experts, k and expert groups fit together."""
  parameters = inspect.signature(function_of(name)).parameters.values()
  needed = {p.name for p in parameters if p.default is p.empty}
  config = function_of(name)(**{k: TABLE[name][k] for k in needed})
  assert config.num_experts >= 8


@each_preset
def test_runs_and_learns(name):
  loss, y, info, gradients = run(name)
  assert np.isfinite(loss) and np.all(np.isfinite(y))
  assert y.shape == ((T, 3, D) if name == "mmoe.layer" else (T, D))
  leaves = jax.tree.leaves(gradients)
  assert all(np.all(np.isfinite(leaf)) for leaf in leaves)
  assert set(loss_weights(name)) == set(info.losses)
  for section, part in gradients.items():
    learns = any(np.any(leaf) for leaf in jax.tree.leaves(part))
    assert learns == (section != "gate" or name not in NO_GATE), section
  if build(name).dispatch.name == "sort":
    assert info.dropped["buffer"] == 0
  CHECKS.get(name, lambda info: None)(info)


# -- what a step shows of the system; once a preset, since compiling is slow -----------


def weights_sum_to(total: float):
  def check(info):
    sums_T = info.plan.routing.weight.reshape(T, -1).sum(1)
    np.testing.assert_allclose(sums_T[: T - 2], total, rtol=1e-6)

  return check


def weights_are_probabilities_times(scale: float):
  def check(info):
    routing = info.plan.routing
    expert_TK = np.asarray(routing.expert).reshape(T, -1)
    probs_TK = np.take_along_axis(np.asarray(routing.probs), expert_TK, axis=1)
    weight_TK = routing.weight.reshape(T, -1)
    np.testing.assert_allclose(weight_TK, scale * probs_TK, rtol=1e-6)
    assert np.all(probs_TK.sum(1) < 0.999)

  return check


def skipped_choices_queue(queue: bool):
  def check(info):
    routing = info.plan.routing
    skipped_N = ~np.asarray(routing.live) & np.repeat(np.arange(T) < T - 2, 2)
    assert skipped_N.any()
    assert np.all(np.asarray(routing.queues)[skipped_N] == queue)

  return check


def bias_moves_against_the_load(info):
  weights_sum_to(2.5)(info)
  load_E = np.asarray(info.load)
  expected = 1e-3 * np.sign(load_E.mean() - load_E)
  np.testing.assert_allclose(info.state.bias, expected, atol=1e-9)
  assert np.any(expected)


def tokens_stay_in_their_domain(info):
  routing = info.plan.routing
  np.testing.assert_array_equal(routing.expert // 2, np.arange(T) // 6)
  assert np.all(routing.weight == 1)


def chosen_groups_weigh_one(info):
  assert np.all(info.plan.routing.weight[: 2 * (T - 2)] == 1)
  assert info.state.gate["key_ED"].shape == (8, D)


def documents_stay_in_their_pool(info):
  routing = info.plan.routing
  allowed_TE = np.asarray(routing.probs)[: T - 2] > 0
  assert allowed_TE.sum(1).min() >= 3 and not allowed_TE.all()
  document_T = np.arange(T - 2) // 5
  assert (allowed_TE == allowed_TE[5 * document_T]).all()
  assert np.any(np.asarray(routing.weight).reshape(T, 2).sum(1)[: T - 2] < 0.999)


CHECKS = {
  "gshard.layer": skipped_choices_queue(True),
  "gshard.lingvo_layer": skipped_choices_queue(False),
  "glam.layer": weights_sum_to(1.0),
  "tutel.layer": weights_sum_to(1.0),
  "mixtral.layer": weights_sum_to(1.0),
  "dbrx.layer": weights_sum_to(1.0),
  "qwen3_moe.layer": weights_sum_to(1.0),
  "gpt_oss.layer": weights_sum_to(1.0),
  "moe_plus_plus.layer": weights_sum_to(1.0),
  "vmoe.layer": weights_are_probabilities_times(1.0),
  "grok_1.layer": weights_are_probabilities_times(1.0),
  "olmoe.layer": weights_are_probabilities_times(1.0),
  "qwen2_moe.layer": weights_are_probabilities_times(1.0),
  "llama_4.layer": weights_are_probabilities_times(1.0),
  "megablocks.layer": weights_are_probabilities_times(1.0),
  "dag_moe.layer": weights_are_probabilities_times(1.0),
  "deepseek_v2.lite_layer": weights_are_probabilities_times(1.0),
  "deepseek_v2.layer": weights_are_probabilities_times(16.0),
  "deepseek_v3.layer": bias_moves_against_the_load,
  "pangu_sigma.layer": tokens_stay_in_their_domain,
  "emo.layer": documents_stay_in_their_pool,
  "emoe.layer": chosen_groups_weigh_one,
  "emoe.learned_layer": weights_sum_to(2.0),
}


# -- what a configuration says ---------------------------------------------------------


def test_facts_of_the_papers():
  def rule(name):
    found = build(name).capacity
    return found.get("rule"), found.get("factor"), found.get("eval_factor")

  assert rule("switch.layer") == (capacity.mesh, 1.25, 2.0)
  assert rule("gshard.layer") == (capacity.ceil, 1.0, None)
  assert rule("gshard.lingvo_layer") == (capacity.lingvo, 2.0, None)
  assert rule("glam.layer") == (capacity.lingvo, 2.0, None)
  assert rule("st_moe.layer") == (capacity.flaxformer, 1.25, 2.0)
  assert rule("vmoe.layer") == (capacity.vmoe, 1.05, None)
  assert rule("tutel.layer") == (capacity.tutel, 1.25, None)
  assert rule("zcode_m3.layer") == (capacity.deepspeed, 1.0, 1.0)
  assert rule("fairseq_moe.layer") == (capacity.fairseq, 1.0, 0.25)
  assert build("fairseq_moe.layer").capacity.get("eval_rule") is capacity.fairseq_eval
  for name in "glam", "gshard", "st_moe":
    assert build(f"{name}.layer").renormalise.function is renormalise.before_dropping
  after = build("fairseq_moe.layer").renormalise.function
  assert after is renormalise.after_dropping

  ks = dict(
    switch=1, gshard=2, vmoe=2, limoe=1, zcode_m3=1, dbrx=4, grok_1=2, gpt_oss=4
  )
  ks |= dict(llama_4=1, megablocks=1, moe_plus_plus=2, mmoe=8, emoe=2)
  assert {n: build(f"{n}.layer").k for n in ks} == ks
  full = dict(mixtral=(8, 2), dbrx=(16, 4), olmoe=(64, 8), qwen3_moe=(128, 8))
  full |= dict(deepseek_v2=(160, 6), deepseek_v3=(256, 8), gpt_oss=(128, 4))
  full |= dict(emoe=(64, 16))
  for name, sizes in full.items():
    config = getattr(presets, name).layer(d_model=D, d_ff=32)
    assert (config.num_experts, config.k) == sizes, name

  assert build("switch.layer").input_noise.get("eps") == 0.01
  assert build("zcode_m3.layer").priority.function is priority.random
  assert build("limoe.layer").priority.function is priority.by_confidence
  assert build("llama_4.layer").scale == "input"
  assert build("llama_4.layer").score.name == "sigmoid"
  assert build("gpt_oss.layer").gate.kwargs == {"bias": True}
  assert build("pr_moe.layer").join.name == "add"
  assert build("pr_moe.blended_layer").join.name == "blend"
  assert build("qwen2_moe.layer").join.name == "sigmoid_gate"
  assert build("deepseek_v2.layer").restrict[0].get("best") == 1
  assert build("deepseek_v3.layer").restrict[0].get("best") == 2
  assert presets.switch.LOSS_WEIGHTS == {"load_balance_group": 0.01}
  emo = presets.emo.layer(d_model=16, d_ff=8)
  assert (emo.num_experts, emo.k, emo.restrict[0].get("least")) == (127, 7, 8)
  assert presets.emo.LOSS_WEIGHTS == {"load_balance_mesh": 0.1, "router_z": 0.001}
  assert presets.qwen3_moe.LOSS_WEIGHTS == {"load_balance_mesh": 0.001}


def published():
  """Preset, sizes, sparse layers, everything else in the model, published total."""

  def attention(d, q, kv, head):  # projections, and two norms a block
    return d * (q + 2 * kv) * head + q * head * d + 2 * d

  def ends(d, vocab):  # untied embeddings and a last norm
    return 2 * vocab * d + d

  def latent(d):  # DeepSeek's attention: ranks 1536 and 512, 128 heads of 128 + 64
    queries = d * 1536 + 1536 + 1536 * 128 * 192
    return queries + d * 576 + 512 + 512 * 128 * 256 + 128 * 128 * d + 2 * d

  yield (
    "mixtral",
    dict(d_model=4096, d_ff=14336),
    32,
    32 * attention(4096, 32, 8, 128) + ends(4096, 32000),
    46_702_792_704,
  )
  yield (
    "dbrx",
    dict(d_model=6144, d_ff=10752),
    40,
    40 * attention(6144, 48, 8, 128) + ends(6144, 100352),
    131_596_523_520,
  )
  yield (
    "olmoe",
    dict(d_model=2048, d_ff=1024),
    16,
    16 * (attention(2048, 16, 16, 128) + 2 * 2048) + ends(2048, 50304),
    6_919_161_856,
  )
  yield (  # the paper's total, 14 billion, is rounded; this is by its own sizes
    "emo",
    dict(d_model=2048, d_ff=1024),
    16,
    16 * attention(2048, 16, 16, 128) + ends(2048, 100352),
    13_568_608_256,
  )
  yield (
    "qwen2_moe",
    dict(d_model=3584, d_ff=2560, shared_d_ff=20480),
    28,
    28 * (attention(3584, 28, 4, 128) + 36 * 128) + ends(3584, 151936),
    57_408_658_944,
  )
  yield (
    "qwen3_moe",
    dict(d_model=2048, d_ff=768),
    48,
    48 * (attention(2048, 32, 4, 128) + 2 * 128) + ends(2048, 151936),
    30_532_122_624,
  )
  yield (
    "gpt_oss",
    dict(d_model=2880, d_ff=2880),
    36,
    36 * (attention(2880, 64, 8, 64) + 80 * 64 + 2880 + 64) + ends(2880, 201088),
    116_829_156_672,
  )
  yield (
    "llama_4",
    dict(d_model=5120, d_ff=8192),
    48,
    48 * attention(5120, 40, 8, 128) + ends(5120, 202048),
    107_769_861_120,
  )
  yield (
    "deepseek_v2",
    dict(d_model=5120, d_ff=1536),
    59,
    60 * latent(5120) + 3 * 5120 * 12288 + ends(5120, 102400),
    235_741_434_880,
  )
  yield (
    "deepseek_v3",
    dict(d_model=7168, d_ff=2048),
    58,
    61 * latent(7168) + 3 * 3 * 7168 * 18432 + ends(7168, 129280),
    671_026_404_352,
  )


PUBLISHED = list(published())


@pytest.mark.parametrize(
  "name, sizes, layers, rest, total", PUBLISHED, ids=[row[0] for row in PUBLISHED]
)
def test_published_parameter_counts(name, sizes, layers, rest, total):
  config = getattr(presets, name).layer(**sizes)
  leaves = jax.tree.leaves(param_shapes(config))
  assert layers * sum(math.prod(leaf.shape) for leaf in leaves) + rest == total
