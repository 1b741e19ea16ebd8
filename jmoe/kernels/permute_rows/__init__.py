"""Rows of an array in another order, and the same with a weight and a product each."""
# SPDX-License-Identifier: Apache-2.0

from jmoe.kernels.permute_rows.api import scaled as scaled
from jmoe.kernels.permute_rows.api import take as take
from jmoe.kernels.permute_rows.api import weighed as weighed
