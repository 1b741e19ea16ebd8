"""Aggregations: `(params, y_TKD, plan, x_TD, residual_TD) -> y`.

What replaces the weighted sum when the experts' outputs must stay apart.
"""
# SPDX-License-Identifier: Apache-2.0

from jmoe.aggregate.dag import dag as dag
from jmoe.aggregate.per_task import per_task as per_task
