"""Scores: `logits_TE -> scores_TE`, what experts are selected and weighed by."""
# SPDX-License-Identifier: Apache-2.0

from jmoe.score.relu import relu as relu
from jmoe.score.sigmoid import sigmoid as sigmoid
from jmoe.score.softmax import softmax as softmax
from jmoe.score.sqrt_softplus import sqrt_softplus as sqrt_softplus
