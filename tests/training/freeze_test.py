"""What is frozen stays as it is, under every optimizer."""
# SPDX-License-Identifier: Apache-2.0

import jax
import numpy as np
import pytest

from experiments import optim
from experiments.optim.freeze import renumbered
from tests.training.optimizers import (
  EXPERT,
  KINDS,
  SHAPES,
  draw,
  moved,
  plain,
  repeated,
)

FREEZE = ("gate", "shared", "experts:0,2", "norm")


@pytest.mark.parametrize(
  ("kind", "dtype"), [(kind, "float32") for kind in KINDS] + [("adamw", "bfloat16")]
)
def test_what_is_frozen_keeps_every_bit_and_counts_in_no_norm(kind, dtype):
  params = draw(SHAPES, dtype=dtype)
  for param in params.values():
    param[0] = -0.0  # the sign is a bit too
  config = plain(kind=kind, clip=0.1, weight_decay=0.5, freeze=FREEZE)
  optimizer = optim.optimizer(config, steps=9, params=params)
  grad = draw(SHAPES, seed=1)

  def is_frozen(name):
    mask = np.zeros(SHAPES[name], bool)
    if any(f".moe.{part}." in name for part in ("gate", "shared")) or "norm" in name:
      mask[:] = True
    if EXPERT in name:
      mask[:, [0, 2]] = True
    return mask

  loud = {n: np.where(is_frozen(n), 1e6 * g, g) for n, g in grad.items()}
  quiet = {n: np.where(is_frozen(n), 0 * g, g) for n, g in grad.items()}
  (after, state, updates), (other, *_) = (
    repeated(optimizer, params, g, 3) for g in (loud, quiet)
  )
  for name, param in params.items():
    mask = is_frozen(name)
    bits = (np.asarray(x).view(f"u{x.dtype.itemsize}") for x in (param, after[name]))
    before, now = bits
    np.testing.assert_array_equal(now[mask], before[mask], err_msg=name)
    # Whoever adds them: XLA leaves out a sum with a constant zero of either sign.
    assert np.signbit(updates[name])[mask].all() and not np.any(
      updates[name], where=mask
    )
    if name in state.master:
      copy = np.asarray(state.master[name])
      np.testing.assert_array_equal(copy[mask], param[mask].astype(np.float32))
    if not mask.all():
      assert (now != before)[~mask].mean() > 0.9, name
    np.testing.assert_array_equal(after[name], other[name], err_msg=name)
  held = jax.eval_shape(optimizer.init, params)
  shapes = {x.shape for x in jax.tree.leaves(held)}
  assert SHAPES["segments.0.0.moe.gate.kernel_DE"] not in shapes  # nor any moments


def test_experts_beside_free_ones_are_numbered_through():
  shapes = {EXPERT + "base.up_EDF": (1, 3, 4, 5), EXPERT + "constant_CD": (1, 2, 4)}
  params = draw(shapes)
  grad = {n: np.ones_like(x) for n, x in params.items()}
  optimizer = optim.optimizer(plain(freeze=("experts:1,4",)), steps=9, params=params)
  updates, _ = moved(optimizer, params, [grad])
  still = {n: np.all(u == 0, axis=tuple(range(2, u.ndim))) for n, u in updates.items()}
  assert still[EXPERT + "base.up_EDF"].tolist() == [[False, True, False]]
  assert still[EXPERT + "constant_CD"].tolist() == [[False, True]]
  with pytest.raises(ValueError, match="has 5 with parameters; give numbers of 0 to 4"):
    optim.optimizer(plain(freeze=("experts:5",)), steps=9, params=params)


def test_renumbered_experts_stay_frozen_and_no_others():
  for freeze, origins, expected in (
    (("norm", "experts:0,1,2,3"), [[0, 1, 2, 4, 5]] * 2, ("norm", "experts:0,1,2")),
    (("columns:0", "experts:1"), [[0, 0, 1, 1]], ("columns:0,1", "experts:2,3")),
    (("norm", "experts:3"), [[0, 1]], ("norm",)),  # it is gone
    (("norm",), None, ("norm",)),
  ):
    assert renumbered(freeze, origins) == expected
  for origins in (None, [[0, 1], [1, 2]]):
    with pytest.raises(ValueError, match="'experts:1'.*--set optim.freeze="):
      renumbered(("experts:1",), origins)


def test_frozen_columns_of_gates_keep_every_bit():
  params, grad = draw(SHAPES), draw(SHAPES, seed=1)
  config = plain(freeze=("columns:1", "experts:0"))
  optimizer = optim.optimizer(config, steps=9, params=params)
  after, *_ = repeated(optimizer, params, grad, 3)
  gates = [n for n in SHAPES if ".moe.gate." in n]
  assert gates
  for name in gates:
    same = np.asarray(after[name]) == np.asarray(params[name])
    assert same[..., 1].all() and not same[..., 0].any()
  with pytest.raises(ValueError, match="names column 9, but .* has"):
    config = plain(freeze=("columns:9",))
    optim.optimizer(config, steps=9, params=params)
