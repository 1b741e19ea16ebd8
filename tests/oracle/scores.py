"""Oracle: logits to scores, float64."""
# SPDX-License-Identifier: Apache-2.0

import numpy as np


def softmax(logits):
  """exp(l) / sum exp(l) along the last dimension."""
  logits = np.asarray(logits, np.float64)
  exps = np.exp(logits - np.max(logits, axis=-1, keepdims=True))
  return exps / np.sum(exps, axis=-1, keepdims=True)


def sigmoid(logits):
  """1 / (1 + exp(-l)), written so that no logit overflows."""
  return np.exp(-np.logaddexp(0.0, -np.asarray(logits, np.float64)))


def relu(logits):
  """max(l, 0)."""
  return np.maximum(np.asarray(logits, np.float64), 0.0)


def sqrt_softplus(logits):
  """sqrt(log(1 + exp(l)))."""
  return np.sqrt(np.logaddexp(0.0, np.asarray(logits, np.float64)))


SCORES = {
  "softmax": softmax,
  "sigmoid": sigmoid,
  "relu": relu,
  "sqrt_softplus": sqrt_softplus,
}
