"""Gates: `(params, x_TD, context, *, previous_logits) -> logits_TE`, in float32.

The only learned part of routing.  Matmuls and their gradients run at
`Precision.HIGHEST` in at least float32, or as exactly by `kernels.split_product`: the
default is bf16 passes on TPU and TF32 on GPU, which reroutes tokens.
"""
# SPDX-License-Identifier: Apache-2.0

from jmoe.gates.cosine import cosine as cosine
from jmoe.gates.keys import keys as keys
from jmoe.gates.keys import refresh_keys as refresh_keys
from jmoe.gates.linear import linear as linear
from jmoe.gates.mlp import mlp as mlp
from jmoe.gates.none import none as none
from jmoe.gates.per_modality import per_modality as per_modality
from jmoe.gates.slots import slots as slots
