"""A whole feed-forward per expert: input matrices, activation, output matrix."""
# SPDX-License-Identifier: Apache-2.0

from jmoe.kernels.grouped_ffn.api import check_keep as check_keep
from jmoe.kernels.grouped_ffn.api import check_pieces as check_pieces
from jmoe.kernels.grouped_ffn.api import grouped_ffn as grouped_ffn
from jmoe.kernels.grouped_ffn.reference import reference as reference
