"""Which grouped matmul serves what: device by device, and that none is dense."""
# SPDX-License-Identifier: Apache-2.0

import itertools

import jax
import jax.numpy as jnp
import pytest

import jmoe
from jmoe.kernels import devices, permute_rows
from jmoe.kernels.grouped_matmul import choose
from jmoe.types import Groups

DTYPES = ("float32", "bfloat16", "float16", "float64")
OLD = "this is no NVIDIA GPU of compute capability 8.0 or more"
WIDE = "float64 is not bfloat16, float16 or float32"
NOT_16 = {n: f"{n} is not a 16-bit type" for n in ("float32", "float64")}
NEW = jax.__version_info__ >= devices._HOPPER_JAX  # Hopper's kernels can be compiled
NO_HOPPER = f"jax {jax.__version__} is older than 0.10"


def expected(device, dtype, equal):
  """(name, what the reason ends with, whether it is slow)."""
  wide = dtype == "float64"
  if device == "cpu":
    return (
      "blocks",
      "are multiplied" if not equal else "are taken are multiplied",
      False,
    )
  if device == "tpu" and not equal and dtype not in ("float32", "bfloat16"):
    return "blocks", "a dense weight gradient in ragged_dot", True  # before jax 0.12
  if device == "tpu":
    return ("batched", "product", False) if equal else ("megablox", "hold rows", False)
  if device == "gpu":
    return ("batched", "cuBLAS product", False) if equal else ("blocks", OLD, True)
  if device == "hopper" and NEW and dtype not in NOT_16:
    return "hopper", "taken" if equal else "exist", False
  reasons = []
  if device == "hopper":
    reasons += [NOT_16[dtype] if NEW else NO_HOPPER]
  if not wide:
    return "triton", "; ".join(["only rows that exist", *reasons]), False
  return "batched" if equal else "blocks", "; ".join([*reasons, WIDE]), not equal


def of(block, equal):
  return Groups(None, None, block, 4 * block if equal else None)  # type: ignore[arg-type]


CASES = list(itertools.product(devices.DEVICES, DTYPES, [False, True]))


@pytest.mark.skipif(jax.__version_info__ >= (0, 12), reason="another jax on TPU")
@pytest.mark.parametrize(("device", "dtype", "equal"), CASES)
def test_the_table(device, dtype, equal):
  name, why, slow = choose(device, of(128, equal), 4, jnp.dtype(dtype))
  wanted, end, is_slow = expected(device, dtype, equal)
  assert (name, slow) == (wanted, is_slow)
  assert why.endswith(end)


@pytest.mark.parametrize("device", ["ampere", "hopper"])
def test_layouts_that_are_not_aligned_are_served_and_named(device):
  for block in (8, 24):
    name, why, slow = choose(device, of(block, False), 4, jnp.float32)
    assert name == "blocks" and slow and f"aligned to {block} rows, not to 16" in why
  name, why, _ = choose(device, of(64, False), 4, jnp.bfloat16)
  assert name == "triton"
  assert device == "ampere" or not NEW or "aligned to 64 rows, not to 128" in why


def test_a_jax_without_triton_is_served_and_named(monkeypatch):
  monkeypatch.setattr(devices, "has_triton", lambda: False)
  monkeypatch.setattr(permute_rows.api, "has_triton", lambda: False)
  name, why, slow = choose("ampere", of(16, False), 4, jnp.bfloat16)
  assert name == "blocks" and slow and why.endswith("has no Pallas Triton")
  assert choose("ampere", of(16, True), 4, jnp.bfloat16)[0] == "batched"
  with devices.as_if("ampere"):
    assert devices.row_alignment(jnp.bfloat16) == 1
    assert not permute_rows.api._served(jnp.ones((4, 128)))


def test_rows_are_carried_by_triton_where_it_serves():
  if jax.__version_info__ < (0, 10):
    pytest.skip("needs jax 0.10")
  for device in devices.DEVICES:
    with devices.as_if(device):
      served = permute_rows.api._served(jnp.ones((4, 128)))
    assert served == (device in ("ampere", "hopper"))


@pytest.mark.parametrize("there", [False, True])
def test_no_choice_is_dense(there, monkeypatch):
  """On a TPU `ragged_dot` is grouped; anywhere else it is a dense product."""
  monkeypatch.setattr(devices, "has_triton", lambda: there)
  names = (*devices.DEVICES, "rocm", "something new")
  for device, dtype, equal in itertools.product(names, DTYPES, [False, True]):
    for block, experts in itertools.product((1, 8, 16, 64, 128), (1, 4)):
      name, why, _ = choose(device, of(block, equal), experts, jnp.dtype(dtype))
      known = "blocks", "batched", "triton", "hopper", "ragged_dot", "megablox"
      assert why and name in known
      assert name != "ragged_dot" or device == "tpu"
      assert name != "batched" or equal


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("limit", [None, 1.25], ids=["dropless", "capacity"])
@pytest.mark.parametrize("device", devices.DEVICES)
def test_explain_prints_the_choice_and_why(device, limit, dtype):
  """With the alignment that the device's layouts have."""
  config = jmoe.simple(16, 32, num_experts=4, k=2, capacity_factor=limit)
  text = jmoe.explain(config, 256, device=device, dtype=dtype)
  (line,) = (one for one in text.splitlines() if one.startswith("experts"))
  name, end, slow = expected(device, dtype, limit is not None)
  told = line[line.index("matmul: ") :]
  assert told.startswith(f"matmul: {name} (")
  assert told.endswith(f"{end}{'; slow' if slow else ''})")
