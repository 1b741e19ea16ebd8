"""Fewer experts: which are worth keeping, and the layers without the others."""
# SPDX-License-Identifier: Apache-2.0

from collections.abc import Sequence

import numpy as np

from jmoe.surgery.columns import take
from jmoe.surgery.frame import Layer, Model, layers, on_layers
from jmoe.surgery.observe import Seen
from jmoe.use import shown


def by_frequency(seen: Sequence[Seen]) -> list[np.ndarray]:
  """f32[E] a layer: assignments on the sample (Z-Code M3, arXiv 2109.10465)."""
  return [np.asarray(layer.load_E) for layer in seen]


def by_reap(seen: Sequence[Seen]) -> list[np.ndarray]:
  """f32[E] a layer: the saliency of REAP.

  Lasby et al. 2025, arXiv 2510.13999: the mean of `g_j(x) |f_j(x)|` over the tokens
  that are routed to expert j; 0 for one that had none.  g is the weight with which the
  layer adds the output, renormalised where it renormalises.
  """
  return [
    layer.saliency_E / np.maximum(layer.load_E, 1)
    for layer in (Seen(*(np.asarray(x, np.float64) for x in each)) for each in seen)
  ]


def at_random(model: Model, *, seed: int = 0) -> list[np.ndarray]:
  """f64[E] a layer: numbers that say nothing, the floor of all the others."""
  random = np.random.default_rng(seed)
  return [random.random(layer.config.num_experts) for layer in layers(model)]


def best(
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
      f"best: keep={keep}, at_least={at_least} of {min(sizes)} experts; give 1 <= "
      "at_least <= keep <= experts."
    )
  ranked = [np.argsort(-np.asarray(s, np.float64), kind="stable") for s in scores]
  if uniform:
    return [sorted(order[:keep].tolist()) for order in ranked]
  kept = [order[:at_least].tolist() for order in ranked]
  rest = [
    (-float(score_E[e]) / max(float(np.mean(score_E)), 1e-30), n, int(e))
    for n, (score_E, order) in enumerate(zip(scores, ranked, strict=True))
    for e in order[at_least:]
  ]
  for _, n, e in sorted(rest)[: keep * len(sizes) - sum(map(len, kept))]:
    kept[n].append(e)
  return [sorted(experts) for experts in kept]


def prune(model: Model, experts: Sequence[Sequence[int]]) -> Model:
  """The model with these experts alone, gate columns and balance biases among them.

  A softmax gate over fewer columns divides by a smaller sum; k is as before, or as many
  experts as a layer has left.

  Args:
    model: with sparse layers.
    experts: of each sparse layer in order of depth, by number.

  Raises:
    ValueError: not a list for each layer, no such expert, one twice, or a layer that
      cannot be cut.
  """
  number = len(layers(model))
  if len(experts) != number or any(len(set(ids)) != len(ids) for ids in experts):
    raise ValueError(
      f"prune: experts={shown(experts)}; give {number} lists, no expert twice."
    )

  def change(n: int, layer: Layer) -> Layer:
    if list(experts[n]) == list(range(layer.config.num_experts)):
      return layer
    return take(layer, experts[n])

  return on_layers(model, change)
