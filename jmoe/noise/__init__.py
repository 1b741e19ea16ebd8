"""Noise: `(array, *, context, key) -> array`, drawn per token.

A token's draw depends on the key and its `position` alone, so every layout of the same
data draws the same noise.  The layer leaves noise out when it does not train.
"""
# SPDX-License-Identifier: Apache-2.0

from jmoe.noise.gaussian import gaussian as gaussian
from jmoe.noise.gumbel import gumbel as gumbel
from jmoe.noise.jitter import jitter as jitter
