"""A whole feed-forward per expert: input matrices, activation, output matrix."""
# SPDX-License-Identifier: Apache-2.0

from jmoe.kernels.grouped_ffn.api import gated_layer as gated_layer
from jmoe.kernels.grouped_ffn.api import grouped_ffn as grouped_ffn
from jmoe.kernels.grouped_ffn.reference import reference as reference
