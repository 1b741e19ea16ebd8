"""Restrictions: `(select_TE, context, *, mask, key, train, axes) -> bool[T,E]`.

Which experts a token may use, apart from which it chooses; several are intersected.
Those that rank experts come last, whatever their place in the configuration, and rank
within the `mask` of the others.
"""
# SPDX-License-Identifier: Apache-2.0

from jmoe.restrict.document_pool import document_pool as document_pool
from jmoe.restrict.domain import domain as domain
from jmoe.restrict.expert_groups import expert_groups as expert_groups
from jmoe.restrict.subset import subset as subset
