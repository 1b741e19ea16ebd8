"""Which experts are worth keeping; `cut_model` then leaves the others out."""
# SPDX-License-Identifier: Apache-2.0

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jax import Array

from jmoe.surgery.extract import best
from jmoe.surgery.frame import Model, layers
from jmoe.surgery.receipt import Sample
from jmoe.surgery.walk import Seen, walk


def frequency(seen: Seen) -> Array:
  """f32[E] assignments of a batch that found a place; for `walk`."""
  routing = seen.plan.routing
  expert_E = jnp.arange(routing.num_experts, dtype=jnp.int32)
  hit_NE = (routing.expert[:, None] == expert_E) & seen.plan.kept[:, None]
  return hit_NE.sum(0, dtype=jnp.float32)


def _activation(seen: Seen) -> Array:
  """f32[2,E] assignments, and the sum over them of weight times norm of the output."""
  routing = seen.plan.routing
  norm_N = jnp.linalg.norm(seen.outputs().astype(jnp.float32), axis=-1).reshape(-1)
  value_N = jnp.where(seen.plan.kept, routing.weight * norm_N, 0)
  expert_E = jnp.arange(routing.num_experts, dtype=jnp.int32)
  hit_NE = routing.expert[:, None] == expert_E
  sums_E = jnp.where(hit_NE, value_N[:, None], 0).sum(0)
  return jnp.stack([frequency(seen), sums_E])


def by_frequency(model: Model, samples: Sequence[Sample]) -> list[np.ndarray]:
  """f64[E] a layer: assignments on the samples (Z-Code M3, arXiv 2109.10465)."""
  return walk(model, samples, frequency)[1]


def by_reap(model: Model, samples: Sequence[Sample]) -> list[np.ndarray]:
  """f64[E] a layer: the saliency of REAP.

  Lasby et al. 2025, arXiv 2510.13999: the mean of `g_j(x) |f_j(x)|` over the tokens
  that are routed to expert j; 0 for one that had none.  g is the weight by which the
  layer adds the output, renormalised where it renormalises.

  Args:
    model: with a fixed number of choices.
    samples: packed rows, one or more.

  Raises:
    ValueError: no samples, or no fixed number of choices.
  """
  return [
    sums[1] / np.maximum(sums[0], 1) for sums in walk(model, samples, _activation)[1]
  ]


def at_random(model: Model, *, seed: int = 0) -> list[np.ndarray]:
  """f64[E] a layer: numbers that say nothing, the floor of all the others."""
  random = np.random.default_rng(seed)
  return [random.random(layer.config.num_experts) for layer in layers(model)]


def choose(
  scores: Sequence[np.ndarray],
  *,
  keep: int,
  uniform: bool = True,
  at_least: int = 1,
) -> list[list[int]]:
  """The experts with the highest scores, by number and ascending, of each layer.

  Args:
    scores: f[E] of each layer; of equal ones the first is better.
    keep: experts a layer; of all layers together on average, if they may differ.
    uniform: as many in each layer.  If not, scores are compared over layers, each
      divided by the mean of its layer.
    at_least: experts that every layer keeps.

  Raises:
    ValueError: more or fewer than there are.
  """
  sizes = [len(score_E) for score_E in scores]
  if not 1 <= at_least <= keep <= min(sizes):
    raise ValueError(
      f"choose: keep={keep}, at_least={at_least} of {min(sizes)} experts; give 1 <= "
      "at_least <= keep <= experts."
    )
  if uniform:
    return [best(score_E, keep) for score_E in scores]
  ranked = [np.argsort(-np.asarray(s, np.float64), kind="stable") for s in scores]
  kept = [order[:at_least].tolist() for order in ranked]
  rest = [
    (-float(score_E[e]) / max(float(np.mean(score_E)), 1e-30), n, int(e))
    for n, (score_E, order) in enumerate(zip(scores, ranked, strict=True))
    for e in order[at_least:]
  ]
  for _, n, e in sorted(rest)[: keep * len(sizes) - sum(map(len, kept))]:
    kept[n].append(e)
  return [sorted(experts) for experts in kept]
