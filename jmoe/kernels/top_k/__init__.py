"""Which columns of a row are the highest."""
# SPDX-License-Identifier: Apache-2.0

from jmoe.kernels.top_k.api import top_k as top_k
