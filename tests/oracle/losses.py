"""Oracle: auxiliary losses, the balance bias, and gradients by differences."""
# SPDX-License-Identifier: Apache-2.0

import math

import numpy as np

from tests.oracle.routers import ranks


def load_balance(entries, probs, valid=None, choices="all", scope=None):
  """E sum_e f_e P_e per scope, mean over scopes with a valid token; 1 at balance.

  f: fraction of the scope's live choices ("first": of rank 0 only) sent to e, before
  any drop.  P: mean over valid tokens of the scores, each token's divided by its sum.
  `scope` is an id per token: a group, a row, ...; None is one scope for all.
  """
  if choices not in ("first", "all"):
    raise ValueError(choices)
  probs = np.asarray(probs, np.float64)
  num_experts = probs.shape[1]
  rank = ranks(entries)
  values = []
  for tokens in _scopes(valid, scope, len(probs)):
    count, mean_p = np.zeros(num_experts), np.zeros(num_experts)
    for n, entry in enumerate(entries):
      if entry.token in tokens and entry.live and (choices == "all" or rank[n] == 0):
        count[entry.expert] += 1
    for t in tokens:
      if sum(probs[t]) > 0:
        mean_p += probs[t] / sum(probs[t]) / len(tokens)
    fraction = count / max(sum(count), 1)
    values.append(num_experts * sum(fraction * mean_p))
  return _mean(values)


def importance(scores, valid=None, scope=None):
  """CV^2 of the experts' summed clean scores, mean over groups (V-MoE); 0 balanced."""
  values = []
  for tokens in _scopes(valid, scope, len(scores)):
    sums = np.zeros(np.shape(scores)[1])
    for t in tokens:
      sums += np.asarray(scores[t], np.float64)
    values.append(_squared_variation(sums))
  return _mean(values)


def load_vmoe(logits, noisy_logits, k, noise_std=1.0, valid=None, scope=None):
  """CV^2 of each expert's chance to be chosen if its noise were redrawn (V-MoE).

  Chance: 1 - Phi((kth largest noisy logit - clean logit) / sigma), sigma = noise_std/E.
  """
  num_experts = np.shape(logits)[1]
  sigma = noise_std / num_experts
  values = []
  for tokens in _scopes(valid, scope, len(logits)):
    sums = np.zeros(num_experts)
    for t in tokens:
      kth = sorted((float(v) for v in noisy_logits[t]), reverse=True)[k - 1]
      for e in range(num_experts):
        z = (kth - float(logits[t][e])) / sigma
        sums[e] += 0.5 * math.erfc(z / math.sqrt(2))
    values.append(_squared_variation(sums))
  return _mean(values)


def router_z(logits, valid=None):
  """Mean over valid tokens of logsumexp(logits)^2 (ST-MoE); log(E)^2 at zero logits."""
  (tokens,) = _scopes(valid, None, len(logits)) or [[]]
  return _mean(
    [np.logaddexp.reduce(np.asarray(logits[t], np.float64)) ** 2 for t in tokens]
  )


def entropy_local(probs, valid=None, modality=None, which=None):
  """Mean entropy in nats of the (modality's) valid tokens (LIMoE); log E if uniform."""
  return _mean([_entropy(probs[t]) for t in _chosen(probs, valid, modality, which)])


def entropy_global(probs, valid=None, modality=None, which=None, threshold=None):
  """-H(mean p) of the (modality's) valid tokens (LIMoE), or max(0, threshold - H)."""
  tokens = _chosen(probs, valid, modality, which)
  if not tokens:
    return 0.0
  mean_p = sum(np.asarray(probs[t], np.float64) for t in tokens) / len(tokens)
  loss = -_entropy(mean_p)
  return loss if threshold is None else max(0.0, threshold + loss)


def bias_update(bias, load, rate):
  """b + rate * sign(mean(load) - load) (DeepSeek-V3, 2408.15664)."""
  bias, load = np.asarray(bias, np.float64), np.asarray(load, np.float64)
  return bias + rate * np.sign(np.mean(load) - load)


def finite_difference(f, x, eps=1e-6):
  """Gradient of the scalar function f at x, by central differences in float64."""
  x = np.array(x, np.float64)
  gradient = np.zeros(x.shape)
  for i in np.ndindex(x.shape):
    up, down = x.copy(), x.copy()
    up[i] += eps
    down[i] -= eps
    gradient[i] = (float(f(up)) - float(f(down))) / (2 * eps)
  return gradient


def _scopes(valid, scope, num_tokens):
  """Valid tokens of each scope that has one."""
  tokens = [t for t in range(num_tokens) if valid is None or valid[t]]
  ids = [0 if scope is None else int(scope[t]) for t in tokens]
  return [
    [t for t, i in zip(tokens, ids, strict=True) if i == s] for s in sorted(set(ids))
  ]


def _chosen(probs, valid, modality, which):
  """Valid tokens of one modality, or all of them."""
  return [
    t
    for t in range(len(probs))
    if (valid is None or valid[t]) and (modality is None or modality[t] == which)
  ]


def _squared_variation(values):
  """(population standard deviation / mean)^2; 0 if the mean is 0."""
  mean = np.mean(values)
  return float(np.var(values) / mean**2) if mean else 0.0


def _entropy(p):
  """-sum p log p in nats, with 0 log 0 = 0."""
  return -sum(float(v) * math.log(v) for v in p if v > 0)


def _mean(values):
  """The mean, 0 if there is nothing."""
  return float(sum(values) / len(values)) if len(values) else 0.0
