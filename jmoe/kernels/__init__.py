"""Kernels: one folder per operation, each with an api, a reference and backends."""
# SPDX-License-Identifier: Apache-2.0

from jmoe.kernels.grouped_ffn import grouped_ffn as grouped_ffn
from jmoe.kernels.grouped_matmul import grouped_matmul as grouped_matmul
