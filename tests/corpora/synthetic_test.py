"""The synthetic mixture, and a small model that finds its languages."""
# SPDX-License-Identifier: Apache-2.0

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments import corpora, data, tokens
from experiments.corpora import synthetic
from experiments.state import blueprint, init_state
from experiments.vocabulary import VOCAB_SIZE, Bytes
from jmoe import losses
from jmoe.config import Attention, BlockConfig, ModelConfig, simple
from jmoe.use import use
from tests.training.conftest import QUICK

_EXPERTS, _SEQ, _ROWS = 8, 64, 16
_jit = functools.partial(jax.jit, compiler_options=QUICK)


@pytest.fixture(scope="module")
def texts():
  found, _ = corpora.chosen(corpora.Choice("synthetic", 100_000))
  return corpora.split(found)


def test_letters_are_equally_likely_and_say_their_domain(texts):
  seen: dict[str, dict[str, int]] = {}
  for doc in texts:
    for letter in doc.text:
      counts = seen.setdefault(letter, {})
      counts[doc.domain] = counts.get(doc.domain, 0) + 1
  assert len(seen) == synthetic.NUM_DOMAINS * synthetic.LETTERS
  assert all(len(counts) == 1 for counts in seen.values())
  totals = [sum(counts.values()) for counts in seen.values()]
  # The deviation of a count is the root of it, about a hundred.
  assert np.ptp(totals) < 0.1 * np.mean(totals)


def test_a_small_sparse_model_gives_domains_their_experts(texts):
  """At least 0.8 of the mutual information; more experts than domains, one choice."""
  names = sorted({doc.domain for doc in texts})
  records = [{"text": d.text.encode(), "domain": names.index(d.domain)} for d in texts]
  windows = data.Windows(tokens.encoded(records, Bytes()), seq=_SEQ)
  batches = data.batches(windows, batch=_ROWS, seq=_SEQ, seed=0)
  sparse = simple(
    32,
    d_ff=16,
    num_experts=_EXPERTS,
    k=1,
    losses=(use(losses.load_balance), use(losses.entropy_local)),
  )
  config = ModelConfig(
    VOCAB_SIZE,
    32,
    segments=(((BlockConfig(Attention(num_heads=2), sparse),), 1),),
    remat=False,
  )
  shape, _ = blueprint(config)
  optimizer = optax.adam(2e-2)
  key = jax.random.key_data(jax.random.key(0))
  state = init_state(key, config=config, optimizer=optimizer)

  @_jit
  def step(params, moments, batch):
    def objective(params):
      model = shape.model(params, state.balance)
      logits_BSV, infos = model(
        batch["inputs"], batch["segment"], batch["position"], train=True
      )
      nats_BS = optax.softmax_cross_entropy_with_integer_labels(
        logits_BSV, batch["targets"]
      )
      counts_BS = (batch["segment"] > 0).astype(jnp.float32)
      nats = jnp.sum(nats_BS * counts_BS) / jnp.sum(counts_BS)
      weights = {"load_balance": 0.1, "entropy_local": 0.1}
      return nats + losses.total_loss(infos, weights), nats

    (_, nats), grads = jax.value_and_grad(objective, has_aux=True)(params)
    with jax.numpy_dtype_promotion("standard"):  # as optax multiplies
      updates, moments = optimizer.update(grads, moments, params)
    return optax.apply_updates(params, updates), moments, nats

  @_jit
  def load(params, batch, domain):
    """i32[E] choices of the tokens of one domain."""
    segment_BS = jnp.where(batch["domain"] == domain, batch["segment"], 0)
    model = shape.model(params, state.balance)
    _, (info,) = model(batch["inputs"], segment_BS, batch["position"])
    return jnp.sum(info.load, 0)

  params, moments = state.params, state.optimizer
  start = _information(load, params, batches)
  for _ in range(120):
    params, moments, nats = step(params, moments, next(batches))
  assert synthetic.LETTER_NATS < nats < synthetic.LETTER_NATS + 0.1
  found = _information(load, params, batches)
  assert start < 0.5 * synthetic.IDEAL_NATS
  assert 0.8 * synthetic.IDEAL_NATS < found <= synthetic.IDEAL_NATS + 1e-6


def _information(load, params, batches) -> float:
  """Nats of I(domain; expert) of equally frequent domains."""
  joint = np.zeros((synthetic.NUM_DOMAINS, _EXPERTS))
  for _ in range(4):
    batch = next(batches)
    joint += [np.asarray(load(params, batch, d)) for d in range(len(joint))]
  joint /= joint.sum(1, keepdims=True) * len(joint)
  apart = joint.sum(0) / len(joint)
  ratio = np.divide(joint, apart, out=np.ones_like(joint), where=joint > 0)
  return float(np.sum(joint * np.log(ratio)))
