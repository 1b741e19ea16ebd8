"""Routers: `(logits, scores, select, *, mask, context, key, train, forced) -> Routing`.

Parameter-free.  They select by `select`, weigh by `scores`, respect `mask` and
`context.valid`, and replay recorded choices given as `forced`.
"""
# SPDX-License-Identifier: Apache-2.0

from jmoe.routers.every_expert import every_expert as every_expert
from jmoe.routers.expert_choice import expert_choice as expert_choice
from jmoe.routers.hashed import hash_table as hash_table
from jmoe.routers.hashed import hashed as hashed
from jmoe.routers.noisy_top_k import noisy_top_k as noisy_top_k
from jmoe.routers.soft import soft as soft
from jmoe.routers.token_choice import token_choice as token_choice
from jmoe.routers.top_2 import top_2 as top_2
from jmoe.routers.top_k import top_k as top_k
