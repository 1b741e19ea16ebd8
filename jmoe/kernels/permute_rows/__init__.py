"""Rows of an array in another order, weighed, and summed per token."""
# SPDX-License-Identifier: Apache-2.0

from jmoe.kernels.permute_rows.api import spread as spread
from jmoe.kernels.permute_rows.api import take as take
from jmoe.kernels.permute_rows.api import unwritten as unwritten
from jmoe.kernels.permute_rows.api import weighed as weighed
from jmoe.kernels.permute_rows.sums import summed as summed
