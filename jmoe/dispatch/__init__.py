"""Dispatch: `(x_TD, plan, experts, home) -> y`; one file is one strategy.

A strategy carries rows to experts, decides when they run, and brings their outputs
home.  It receives the experts as a function, so that exchange and computation can be
interleaved; `home` is linear, so partial sums may be formed on the way.
"""
# SPDX-License-Identifier: Apache-2.0

from jmoe.dispatch.all_gather import all_gather as all_gather
from jmoe.dispatch.all_to_all import all_to_all as all_to_all
from jmoe.dispatch.buckets import buckets as buckets
from jmoe.dispatch.deduplicated import deduplicated as deduplicated
from jmoe.dispatch.einsum import einsum as einsum
from jmoe.dispatch.hierarchical import hierarchical as hierarchical
from jmoe.dispatch.mask import mask as mask
from jmoe.dispatch.mix import mix as mix
from jmoe.dispatch.ragged_all_to_all import ragged_all_to_all as ragged_all_to_all
from jmoe.dispatch.sort import sort as sort
