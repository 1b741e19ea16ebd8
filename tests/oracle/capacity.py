"""Oracle: how many slots an expert has per group; formulas that share only a name.

Each is a function of (tokens, experts, k, factor), evaluated in the order printed.
"""
# SPDX-License-Identifier: Apache-2.0

import fractions
import math


def ceil(tokens, experts, k, factor, minimum=0, multiple=1):
  """Ours: ceil(k T cf / E), cf decimal; at least `minimum`, then up to a multiple."""
  exact = k * tokens * fractions.Fraction(str(factor)) / experts
  return _up(max(math.ceil(exact), minimum), multiple)


def mesh(tokens, experts, k, factor, minimum=4):
  """Mesh TensorFlow: max(min(T, floor(T cf / E)), 4); k is not in it."""
  return max(min(tokens, math.floor(tokens * factor / experts)), minimum)


def lingvo(tokens, experts, k, factor, multiple=4):
  """lingvo: floor(T cf / E), 0 becomes 4, up to a multiple of 4; k is not in it."""
  return _up(math.floor(tokens * factor / experts) or 4, multiple)


def flaxformer(tokens, experts, k, factor, minimum=4):
  """flaxformer: max(round(cf T / E), 4), halves to even; k is not in it."""
  return max(round(factor * tokens / experts), minimum)


def vmoe(tokens, experts, k, factor, multiple=4):
  """V-MoE: ceil(T k cf / E), up to a multiple of 4."""
  return _up(math.ceil(tokens * k * factor / experts), multiple)


def deepspeed(tokens, experts, k, factor, minimum=4):
  """DeepSpeed: ceil(T / E cf k), at least 4."""
  return max(math.ceil(tokens / experts * factor * k), minimum)


def tutel(tokens, experts, k, factor, multiple=1):
  """Tutel, positive factor: k floor(cf ceil(T / E)), then aligned."""
  return _up(k * math.floor(factor * math.ceil(tokens / experts)), multiple)


def megablocks(tokens, experts, k, factor, world=1):
  """MegaBlocks: floor(cf k T world / E)."""
  return math.floor(factor * k * tokens * world / experts)


def megatron(tokens, experts, k, factor, minimum=0):
  """Megatron-LM: ceil(T k / E cf), optional minimum."""
  return max(math.ceil(tokens * k / experts * factor), minimum)


def fairseq_train(tokens, experts, k, factor):
  """fairseq's top-2 gate in training: 2 ceil(T / E); k and factor are not in it."""
  return 2 * math.ceil(tokens / experts)


def fairseq_eval(tokens, experts, k, factor, fraction=0.25):
  """fairseq's top-2 gate in evaluation: ceil(fraction T), whatever E is."""
  return math.ceil(fraction * tokens)


def _up(count, multiple):
  """The smallest multiple that is not below `count`."""
  return multiple * math.ceil(count / multiple)


CAPACITY_RULES = {
  rule.__name__: rule
  for rule in (
    ceil,
    mesh,
    lingvo,
    flaxformer,
    vmoe,
    deepspeed,
    tutel,
    megablocks,
    megatron,
    fairseq_train,
    fairseq_eval,
  )
}

# One worked case through every rule.
WORKED = {"tokens": 1000, "experts": 7, "k": 2, "factor": 1.25}
WORKED_CAPACITY = {
  "ceil": 358,
  "mesh": 178,
  "lingvo": 180,
  "flaxformer": 179,
  "vmoe": 360,
  "deepspeed": 358,
  "tutel": 356,
  "megablocks": 357,
  "megatron": 358,
  "fairseq_train": 286,
  "fairseq_eval": 250,
}
