"""What a batch is: names and shapes of its arrays, without the pipeline behind them."""
# SPDX-License-Identifier: Apache-2.0

from typing import Any

import jax
import numpy as np

FEATURES = ("inputs", "targets", "scored", "domain")
Batch = dict[str, np.ndarray]  # i32[B,S] each: see `data.batches`


def shapes(batch: int, seq: int, models: int | None = None) -> dict[str, Any]:
  """What `data.batches` gives, as shapes; of several models a stack of them."""
  lead = () if models is None else (models,)
  shape = jax.ShapeDtypeStruct((*lead, batch, seq), np.int32)
  return dict.fromkeys((*FEATURES, "segment", "position"), shape)
