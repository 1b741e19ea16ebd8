"""What each noise draws."""
# SPDX-License-Identifier: Apache-2.0

import jax
import jax.numpy as jnp
import numpy as np

from jmoe import layer, noise
from jmoe.types import Context
from jmoe.use import use
from tests import _cases as cases

T, E = 20_000, 4
KEY, NOTHING = jax.random.key(0), Context()


def test_gaussian_has_a_standard_deviation_of_one_over_the_experts():
  drawn = np.asarray(
    noise.gaussian(jnp.zeros((T, E)), context=NOTHING, key=KEY, std=3.0)
  )
  sigma = 3.0 / E
  bound = 4 * sigma / np.sqrt(drawn.size)  # four standard errors
  assert abs(drawn.mean()) < bound
  assert abs(drawn.std() - sigma) < bound
  assert abs(np.corrcoef(drawn[:, 0], drawn[:, 1])[0, 1]) < 4 / np.sqrt(T)


def test_the_largest_logit_with_gumbel_noise_is_a_sample_of_their_softmax():
  logits = jnp.array([1.0, 0.0, -1.0, 0.5])
  noisy = noise.gumbel(jnp.tile(logits, (T, 1)), context=NOTHING, key=KEY)
  counts = np.bincount(np.argmax(noisy, axis=1), minlength=E) / T
  chance = np.asarray(jax.nn.softmax(logits))
  assert np.all(np.abs(counts - chance) < 4 * np.sqrt(chance * (1 - chance) / T))


def test_jitter_multiplies_within_its_bounds():
  for dtype in (jnp.float32, jnp.bfloat16):
    found = noise.jitter(2 * jnp.ones((T, E), dtype), context=NOTHING, key=KEY, eps=0.1)
    assert found.dtype == jnp.float32
    factor = np.asarray(found) / 2
    assert 0.9 <= factor.min() < 0.901 and 1.099 < factor.max() <= 1.1
    assert abs(factor.mean() - 1) < 4 * 0.1 / np.sqrt(3 * factor.size)


def test_jitter_is_seen_by_the_gate_and_not_by_the_experts():
  row = dict(router="top_k E", capacity="dropless", dispatch="sort")
  plain = cases.config_of(row, 3)
  noisy = cases.config_of(row, 3, input_noise=use(noise.jitter, eps=0.3))
  drawn = cases.draw("random", 13, 3)
  with cases.by_operation():
    (_, one), (_, other) = (cases.run(config, drawn) for config in (plain, noisy))
    logits = np.asarray(other.plan.routing.logits)
    assert not np.array_equal(logits, one.plan.routing.logits)
    inside = np.abs(logits / drawn.x[:, :3] - 1)
    assert inside.max() <= 0.3 + 1e-5
    # With all experts of one output the weights cannot matter, so only x can.
    params = cases.params_of(noisy)
    same = jax.tree.map(
      lambda a: jnp.tile(a[:1], (3,) + (1,) * (a.ndim - 1)), params["experts"]
    )
    given = dict(context=drawn.context(), key=KEY, train=True)
    outs = [
      layer.moe({**params, "experts": same}, jnp.asarray(drawn.x), config, **given)[0]
      for config in (plain, noisy)
    ]
  np.testing.assert_allclose(*outs, rtol=1e-5, atol=1e-5)


def test_stages_and_layers_draw_independently():
  seen = []
  for index in (None, 0, 1):
    given = NOTHING if index is None else Context(layer=jnp.asarray(index))
    for key in layer._keys(KEY, given).values():
      seen.append(tuple(np.asarray(jax.random.key_data(key)).tolist()))
  assert len(set(seen)) == len(seen)
