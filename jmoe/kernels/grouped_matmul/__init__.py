"""Rows of expert e times matrix e."""
# SPDX-License-Identifier: Apache-2.0

from jmoe.kernels.grouped_matmul.api import choose as choose
from jmoe.kernels.grouped_matmul.api import grouped_matmul as grouped_matmul
from jmoe.kernels.grouped_matmul.reference import reference as reference
