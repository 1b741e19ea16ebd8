"""A smaller model of the experts that some text asks for (EMO, Easy-EP, at random)."""
# SPDX-License-Identifier: Apache-2.0

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

from jmoe._value_checks import whole
from jmoe.surgery.cut import cut, cut_model
from jmoe.surgery.frame import Layer, Model, layer_configs
from jmoe.surgery.receipt import Sample
from jmoe.surgery.walk import Score, Seen, walk
from jmoe.use import shown


class Extracted(NamedTuple):
  """A model with fewer experts, and where they come from."""

  model: Model
  kept: list[list[int]]  # of each sparse layer in order of depth, in ascending order
  scores: list[np.ndarray]  # f64[E] of each, by which they were chosen


def mean_probability(seen: Seen) -> Array:
  """f32[E] sum over tokens of the routing probability: EMO's own score.

  Wang, Bhagia, Min 2026, arXiv 2605.06663; the authors' code has the same sum.
  """
  keep_T1 = seen.valid_T[:, None]
  return jnp.sum(jnp.where(keep_T1, seen.plan.routing.probs, 0), axis=0)


def easy_ep(seen: Seen) -> Array:
  """f32[E] `sum_t g_et |E_e(x_t)| (1 - cos(x_t, x_t + y_t))`: Easy-EP.

  Dong et al. 2025, arXiv 2504.06792: how much an expert gives, times how much the layer
  turns the token; y is the layer's output, and x what it was given.
  """
  x_TD, y_TD = (a.astype(jnp.float32) for a in (seen.x_TD, seen.y_TD))
  routing = seen.plan.routing
  norm_TK = jnp.linalg.norm(seen.outputs().astype(jnp.float32), axis=-1)
  gate_TK = routing.weight.reshape(norm_TK.shape)
  after_TD = x_TD + y_TD
  lengths_T = jnp.linalg.norm(x_TD, axis=1) * jnp.linalg.norm(after_TD, axis=1)
  cosine_T = jnp.sum(x_TD * after_TD, axis=1) / jnp.maximum(lengths_T, 1e-30)
  turn_T = jnp.where(seen.valid_T, jnp.maximum(1 - cosine_T, 0), 0)
  value_TK = gate_TK * norm_TK * turn_T[:, None]
  expert_E = jnp.arange(routing.num_experts, dtype=jnp.int32)
  hit_TKE = routing.expert.reshape(norm_TK.shape)[:, :, None] == expert_E
  return jnp.sum(jnp.where(hit_TKE, value_TK[:, :, None], 0), axis=(0, 1))


SCORES: dict[str, Score] = {"mean_probability": mean_probability, "easy_ep": easy_ep}


def layerwise(
  model: Model,
  samples: Sequence[Sample],
  *,
  keep: int | Sequence[int],
  score: Score = mean_probability,
) -> Extracted:
  """The best experts of each layer, chosen where earlier layers are already cut.

  EMO's own way, as in its authors' code; shared experts stay.

  Args:
    model: any that `cut` can cut.
    samples: text of the domain.
    keep: routed experts of each sparse layer, or one number for all; a layer that has
      no more stays as it is.
    score: by which they are chosen; ties go to the lower index.

  Raises:
    ValueError: as `cut`, or numbers of experts that do not fit the layers.
  """
  counts, kept = _counts(model, keep), []

  def change(number: int, layer: Layer, score_E: np.ndarray) -> Layer:
    kept.append(best(score_E, counts[number]))
    return cut(layer, kept[-1])

  made, scores = walk(model, samples, score, change)
  return Extracted(made, kept, scores)


def in_one_pass(
  model: Model,
  samples: Sequence[Sample],
  *,
  keep: int | Sequence[int],
  score: Score = mean_probability,
) -> Extracted:
  """The best experts of each layer in the whole model: Easy-EP's way.

  Arguments and errors are those of `layerwise`.
  """
  counts = _counts(model, keep)
  _, scores = walk(model, samples, score)
  kept = [best(score_E, n) for score_E, n in zip(scores, counts, strict=True)]
  return Extracted(cut_model(model, kept), kept, scores)


def at_random(model: Model, *, keep: int | Sequence[int], seed: int) -> Extracted:
  """Experts drawn at random in each layer: the floor for the others.

  Arguments and errors are those of `layerwise`; `seed` is of the draw.
  """
  counts = _counts(model, keep)
  random = np.random.Generator(np.random.PCG64(seed))
  scores = [random.random(ff.num_experts) for ff in layer_configs(model.config)]
  kept = [best(score_E, n) for score_E, n in zip(scores, counts, strict=True)]
  return Extracted(cut_model(model, kept), kept, scores)


def best(score_E: np.ndarray, count: int) -> list[int]:
  """Indices of the highest scores, in ascending order; ties go to the lower index."""
  return sorted(np.argsort(-np.asarray(score_E), kind="stable")[:count].tolist())


def _counts(model: Model, keep: int | Sequence[int]) -> list[int]:
  """Experts of each sparse layer."""
  sizes = [ff.num_experts for ff in layer_configs(model.config)]
  each = list(keep) if isinstance(keep, Sequence) else [keep] * len(sizes)
  if len(each) != len(sizes):
    raise ValueError(
      f"extract: keep={shown(keep)} holds {len(each)} numbers, but there are "
      f"{len(sizes)} sparse layers; give one a layer, or one for all."
    )
  if not sizes or not all(map(whole, each)):
    raise ValueError(
      f"extract: keep={shown(keep)} of {len(sizes)} sparse layers; keep 1 expert or "
      "more of 1 layer or more."
    )
  return [min(n, size) for n, size in zip(each, sizes, strict=True)]
