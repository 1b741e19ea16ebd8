"""What every loss promises; a loss that is not in the table of `cases` fails.

Faults put in on purpose, and the test that then failed:

  padding counted in f                              padding
  padding counted in a sum or in a mean             loops
  padding zeroed after the softmax, not before      padding (gradient is NaN)
  mean over all scopes, empty ones too              loops
  every choice counted with choices="first"         loops
  f divided by tokens instead of choices            loops
  scores not divided by their sum                   loops (sigmoid)
  no gradient through P                             gradient
  sample instead of population variance             loops
  noise_std not divided by E                        loops
  threshold one rank too high                       loops
  no gradient through the threshold                 gradient
  psum left out, or the losses averaged             mesh
  rows taken as equal blocks, last group cut off    loops
  entropy before the mean                           loops
"""
# SPDX-License-Identifier: Apache-2.0

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec as P

from jmoe import losses
from tests import oracle, tolerance
from tests.losses import cases
from tests.losses.cases import LOSSES, draw, evaluate

pytestmark = pytest.mark.contract

SCOPES = ("sequence", "group", "batch", "mesh")
each_loss = pytest.mark.parametrize("name", LOSSES)
each_scope = pytest.mark.parametrize("over", SCOPES)


def test_table_has_every_loss():
  functions = set(losses.__all__) - {"loss_name", "total_loss"}
  assert functions == {loss.name for loss in LOSSES.values()}


@each_scope
@pytest.mark.parametrize(
  "T, E, k, score",
  [(15, 3, 2, "softmax"), (15, 3, 2, "sigmoid"), (11, 7, 7, "softmax")],
)
def test_equals_loops_over_tokens(over, T, E, k, score):
  for seed in range(4):
    case = draw(T, E, k, seed, score=score)
    values, _ = evaluate(case, over)
    for name, value in values.items():
      assert value.dtype == jnp.float32
      expected = np.float32(cases.expected(case, name, over))
      tolerance.assert_close(value, expected, f"{name}, seed {seed}")


def test_one_expert_has_nothing_to_balance():
  values, _ = evaluate(draw(7, 1, 1), "batch")
  case = draw(7, 1, 1)
  for name, value in values.items():
    expected = np.float32(cases.expected(case, name, "batch"))
    tolerance.assert_close(value, expected, name)
  assert values["load_balance"] == 1 and values["importance"] == values["load"] == 0


def test_value_at_perfect_balance():
  T, E = 15, 3
  turns = np.arange(T)
  case = draw(
    T,
    E,
    2,
    logits=np.zeros((T, E)),
    noise=np.zeros((T, E)),
    chosen=np.stack([turns % E, (turns + 1) % E], axis=1),
    live=np.ones((T, 2), bool),
    valid=np.ones(T, bool),
  )
  values, _ = evaluate(case, "batch")
  assert set(values) == set(cases.AT_BALANCE)
  for name, value in values.items():
    tolerance.assert_close(value, np.float32(cases.AT_BALANCE[name](E)), name)


@each_scope
def test_padding_changes_nothing(over):
  case = draw(15, 3, 2, seed=3)
  expected, _ = evaluate(case, over)
  padding = ~case.valid[:, None]
  garbage = case.replace(
    logits=np.where(padding, np.nan, case.logits), live=case.live | padding
  )
  longer = garbage.replace(
    logits=np.concatenate([garbage.logits, np.full((7, 3), np.inf)]),
    noise=np.concatenate([case.noise, np.full((7, 3), np.nan)]),
    chosen=np.concatenate([case.chosen, np.zeros((7, 2))]),
    live=np.concatenate([garbage.live, np.ones((7, 2), bool)]),
    valid=np.concatenate([case.valid, np.zeros(7, bool)]),
    modality=np.concatenate([case.modality, np.arange(7) % 3]),
    row=np.concatenate([case.row, np.arange(7) % 4]),
  )
  for padded in garbage, longer:
    values, gradients = evaluate(padded, over)
    for name in LOSSES:
      tolerance.assert_close(values[name], expected[name], name)
      for gradient in gradients[name].values():
        assert np.all(np.isfinite(gradient)), name
        assert not np.any(np.asarray(gradient)[~padded.valid]), name


@each_scope
def test_no_valid_token_gives_zero_and_no_gradient(over):
  values, gradients = evaluate(draw(15, 3, 2, valid=np.zeros(15, bool)), over)
  for name in LOSSES:
    assert values[name] == 0, name
    assert not any(np.any(gradient) for gradient in gradients[name].values()), name


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_gradient_equals_finite_differences(score):
  case = draw(7, 3, 2, seed=5, score=score)
  with enable_x64():
    _, gradients = evaluate(case, "group", jnp.float64)
    gradients = cases.by_logits(case, gradients, jnp.float64)
  for name in LOSSES:
    assert gradients[name].dtype == jnp.float64
    expected = oracle.finite_difference(
      lambda logits, name=name: cases.expected(
        case.replace(logits=logits), name, "group"
      ),
      case.logits,
    )
    np.testing.assert_allclose(
      gradients[name], expected, **tolerance.FINITE_DIFFERENCE, err_msg=name
    )


def test_mesh_scope_equals_one_device_on_every_device():
  devices = jax.devices()[:4]
  assert len(devices) == 4
  case = draw(24, 3, 2, seed=7, group_size=3)
  case.valid[6:12] = False  # the second shard holds no token
  given = cases.arrays(case)
  found = cases.floats(jnp.asarray(case.logits, jnp.float32), given["noise"], "softmax")

  def one_shard(found, given):
    args = cases.plan(found, given, **cases.sizes(case))
    value, difference = {}, {}
    for name, loss in LOSSES.items():
      over_mesh, alone = loss.replace(over="mesh"), loss.replace(over="batch")
      value[name] = over_mesh(*args, axes="data")
      difference[name] = (over_mesh(*args) - alone(*args, axes="data"))[None]
    # Each device's own copy, made varying so that none is taken for all.
    each = {name: v[None] + 0 * found["logits"][:1, 0] for name, v in value.items()}
    return value, (each, difference)

  spread = jax.shard_map(
    one_shard,
    mesh=Mesh(np.array(devices), ("data",)),
    in_specs=(P("data"), P("data")),
    out_specs=(P(), (P("data"), P("data"))),
  )

  @jax.jit
  def values_and_gradients(found):
    value, pull, aux = jax.vjp(lambda found: spread(found, given), found, has_aux=True)
    zeros = jax.tree.map(jnp.zeros_like, value)
    ones = {name: {**zeros, name: jnp.ones_like(value[name])} for name in value}
    return value, aux, {name: pull(one)[0] for name, one in ones.items()}

  value, (each, difference), gradients = values_and_gradients(found)
  expected, expected_gradients = evaluate(case, "batch")
  for name in LOSSES:
    tolerance.assert_close(value[name], expected[name], name)
    tolerance.assert_close(each[name], np.full(4, expected[name]), name)
    assert not np.any(difference[name]), name  # without axes: the shard's own batch
    for array, gradient in gradients[name].items():
      tolerance.assert_close(gradient, expected_gradients[name][array], (name, array))


@each_scope
def test_no_scatter_in_value_or_gradient(over):
  case = draw(15, 3, 2)
  jaxpr = jax.make_jaxpr(lambda: evaluate(case, over))()
  assert "top_k" in str(jaxpr) and "scatter" not in str(jaxpr)


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_finite_at_huge_logits(score):
  signs = np.array([[1, -1, -1], [-1, -1, -1], [1, 1, 1], [0, 1, -1], [-1, 0, 1]] * 3)
  for size in 50, 90, 110, 1e4, 1e15:
    case = draw(15, 3, 2, logits=size * signs, score=score)
    values, gradients = evaluate(case, "batch")
    gradients = cases.by_logits(case, gradients)
    for name in LOSSES:
      assert np.isfinite(values[name]), (name, size)
      assert np.all(np.isfinite(gradients[name])), (name, size)


def test_bfloat16_scores_are_pooled_in_float32():
  values, _ = evaluate(draw(15, 3, 2), "batch", jnp.bfloat16)
  assert all(value.dtype == jnp.float32 for value in values.values())


@each_loss
def test_unknown_scope_is_an_error_with_the_nearest_one(name):
  loss = LOSSES[name].replace(over="sequences")
  with pytest.raises(ValueError, match="did you mean 'sequence'"):
    loss(*cases.args(draw(15, 3, 2)))
  with pytest.raises(ValueError, match="did you mean 'sequence'"):
    loss.function.check(None, **loss.kwargs)


def test_sequence_scope_needs_to_know_the_sequences():
  with pytest.raises(ValueError, match="num_rows"):
    evaluate(draw(15, 3, 2, num_rows=None), "sequence")
  with pytest.raises(ValueError, match="15 tokens in num_rows=4.*row="):
    evaluate(draw(15, 3, 2, row=None), "sequence")
  blocks = draw(12, 3, 2, row=None)  # equal blocks need no ids
  values, _ = evaluate(blocks, "sequence")
  given, _ = evaluate(blocks.replace(row=np.arange(12) // 3), "sequence")
  for name in LOSSES:
    tolerance.assert_close(values[name], given[name], name)


def enable_x64():
  """`jax.enable_x64` where there is one, else its older home."""
  if hasattr(jax, "enable_x64"):
    return jax.enable_x64(True)
  from jax.experimental import enable_x64 as older

  return older(True)
