"""Every gate's logits by its formula in NumPy, float64."""
# SPDX-License-Identifier: Apache-2.0

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jmoe
from jmoe import experts, gates, renormalise
from jmoe.types import Context, State
from jmoe.use import use
from tests import _cases as cases
from tests.tolerance import assert_close

T, D, E = 13, 8, 6
R = np.random.default_rng(0)
X = R.normal(size=(T, D)).astype(np.float32)
NOTHING = Context()


def _draw(*shape) -> np.ndarray:
  return R.normal(size=shape).astype(np.float32)


def _wide(*arrays):
  return [np.asarray(a, np.float64) for a in arrays]


def test_linear_is_a_product_plus_its_bias():
  params = {"kernel_DE": _draw(D, E), "bias_E": _draw(E)}
  x, w, b = _wide(X, params["kernel_DE"], params["bias_E"])
  assert_close(gates.linear(params, X, NOTHING), x @ w + b)
  without = gates.linear({"kernel_DE": params["kernel_DE"]}, X, NOTHING)
  assert_close(without, x @ w)


def test_cosine_is_a_similarity_times_a_bounded_temperature():
  params = {
    "project_DP": _draw(D, 5),
    "bias_P": _draw(5),
    "centre_PE": _draw(5, E),
    "log_scale": np.float32(math.log(2)),
  }
  x, p, b, c = _wide(X, *(params[n] for n in ("project_DP", "bias_P", "centre_PE")))
  z = x @ p + b
  cosine = (z / np.linalg.norm(z, axis=1, keepdims=True)) @ (
    c / np.linalg.norm(c, axis=0)
  )
  assert_close(gates.cosine(params, X, NOTHING), 2 * cosine)
  hot = {**params, "log_scale": np.float32(50)}
  assert_close(gates.cosine(hot, X, NOTHING) / 100, cosine)


def test_cosine_of_a_zero_token_is_zero_and_has_a_finite_gradient():
  params = use(gates.cosine, d_project=5).init(
    jax.random.key(0), d_model=D, num_experts=E, dtype=jnp.float32
  )
  zero = jnp.zeros((2, D))
  assert not np.any(gates.cosine(params, zero, NOTHING))
  gradient = jax.grad(lambda x: jnp.sum(gates.cosine(params, x, NOTHING) ** 2))(zero)
  assert np.all(np.isfinite(gradient))


def test_keys_are_the_mean_of_each_experts_input_weights():
  expert_params = {"gate_EDF": _draw(E, D, 5), "up_EDF": _draw(E, D, 5)}
  (x,) = _wide(X)
  for given, name in (
    (expert_params, "gate_EDF"),
    ({"up_EDF": _draw(E, D, 3)}, "up_EDF"),
  ):
    buffers = gates.keys.buffers(given)
    expected = x @ np.mean(given[name].astype(np.float64), axis=2).T
    assert_close(gates.keys(buffers, X, NOTHING), expected)


def test_keys_learn_nothing_and_follow_the_experts_when_refreshed():
  member = use(experts.mlp, d_ff=5)
  sizes = dict(d_model=D, num_experts=E, dtype=jnp.float32)
  old = {"experts": member.init(jax.random.key(0), **sizes)}
  new = {"experts": member.init(jax.random.key(1), **sizes)}
  state = State(gate=gates.keys.buffers(old["experts"]), bias=jnp.ones(E))
  slope = jax.grad(lambda b: jnp.sum(gates.keys(b, X, NOTHING)))(state.gate)
  assert not np.any(slope["key_ED"])
  fresh = gates.refresh_keys(new, state)
  np.testing.assert_array_equal(
    fresh.gate["key_ED"], gates.keys.buffers(new["experts"])["key_ED"]
  )
  assert fresh.bias is state.bias


def test_mlp_hears_the_layer_before_once_its_residual_has_learned():
  params = {"hidden_DH": _draw(D, 7), "out_HE": _draw(7, E), "previous_EE": _draw(E, E)}
  previous = _draw(T, E)
  x, a, b, r, before = _wide(X, *params.values(), previous)
  alone = np.tanh(x @ a) @ b
  assert_close(gates.mlp(params, X, NOTHING), alone)
  heard = gates.mlp(params, X, NOTHING, previous_logits=previous)
  assert_close(heard, alone + before @ r)
  fresh = use(gates.mlp, residual=True).init(
    jax.random.key(0), d_model=D, num_experts=E, dtype=jnp.float32
  )
  np.testing.assert_array_equal(
    gates.mlp(fresh, X, NOTHING, previous_logits=previous), gates.mlp(fresh, X, NOTHING)
  )


def test_every_modality_has_its_own_matrix_and_an_unknown_one_none():
  params = {"kernel_MDE": _draw(3, D, E)}
  modality = np.arange(T) % 4  # 3 is unknown
  found = gates.per_modality(params, X, Context(modality=jnp.asarray(modality)))
  x, w = _wide(X, params["kernel_MDE"])
  expected = [x[t] @ w[m] if m < 3 else np.zeros(E) for t, m in enumerate(modality)]
  assert_close(found, np.stack(expected))


def test_slots_compare_directions_of_tokens_and_slots():
  params = {"slot_DEC": _draw(D, E, 2), "scale": np.float32(1.5)}
  found = gates.slots(params, X[:12], Context(num_rows=4))
  x, s = _wide(X[:12], params["slot_DEC"])
  x = x / np.sqrt(np.sum(x**2, 1, keepdims=True) + 1e-6)
  s = s / np.sqrt(np.sum(s**2, 0) + 1e-6)
  expected = 1.5 * np.einsum("td,dec->tec", x, s).reshape(4, 3, E, 2)
  assert_close(found, expected)


def test_none_likes_all_experts_alike():
  found = gates.none({}, jnp.asarray(X, jnp.bfloat16), NOTHING, num_experts=E)
  assert found.shape == (T, E) and found.dtype == jnp.float32 and not np.any(found)


def test_gates_are_as_wide_as_their_input_and_never_narrower_than_float32():
  for member in (gates.linear, gates.mlp, gates.cosine):
    given = use(member).init(
      jax.random.key(0), d_model=D, num_experts=E, dtype=jnp.float32
    )
    for dtype in (jnp.bfloat16, jnp.float16, jnp.float32):
      assert member(given, jnp.asarray(X, dtype), NOTHING).dtype == jnp.float32
    with cases.enable_x64():
      wide = {name: a.astype(jnp.float64) for name, a in given.items()}
      assert member(wide, jnp.asarray(X, jnp.float64), NOTHING).dtype == jnp.float64


@pytest.mark.parametrize("follows", [True, False])
def test_both_shells_take_the_means_anew_after_a_step(follows):
  """Half of the old ones stays; where nothing follows, all of them."""
  with cases.quickly():
    x = jnp.asarray(X)
    more = dict(refresh=True, momentum=0.5) if follows else {}
    config = jmoe.MoEConfig(
      D,
      E,
      gate=use(gates.keys, **more),
      experts=use(experts.mlp, d_ff=5),
      renormalise=use(renormalise.ones),
      losses=(),
    )
    layer = jmoe.nnx.MoE(config, rngs=nnx.Rngs(0))
    params, state = layer.params(), layer.get_state()
    _, info = layer(x, train=True)
    params["experts"]["up_EDF"] *= 3.0
    layer.experts.write(params["experts"])
    layer.update(info)
    expected = state.gate["key_ED"] * (2.0 if follows else 1.0)
    assert_close(layer.get_state().gate["key_ED"], expected)
    variables = {"params": params, "moe_state": {"state": state}}
    (y, _), new = jmoe.linen.MoE(config).apply(
      variables, x, train=True, mutable=["moe_state"]
    )
    assert_close(new["moe_state"]["state"].gate["key_ED"], expected)
    assert_close(y, layer(x)[0])


def test_a_share_of_the_means_is_checked():
  with pytest.raises(ValueError, match=r"momentum=1\.0; give a share"):
    jmoe.MoEConfig(D, E, gate=use(gates.keys, refresh=True, momentum=1.0), losses=())
  with pytest.raises(ValueError, match="without refresh=True"):
    jmoe.MoEConfig(D, E, gate=use(gates.keys, momentum=0.5), losses=())
