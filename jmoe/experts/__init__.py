"""Experts: `(params, rows) -> [R,D]`; all they see is rows grouped by expert."""
# SPDX-License-Identifier: Apache-2.0

from jmoe.experts import layout as layout
from jmoe.experts.clamped_glu import clamped_glu as clamped_glu
from jmoe.experts.glu import glu as glu
from jmoe.experts.mlp import mlp as mlp
from jmoe.experts.with_free import with_free as with_free
