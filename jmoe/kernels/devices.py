"""What jax runs on by default, as far as kernels differ by it."""
# SPDX-License-Identifier: Apache-2.0

import contextlib
import contextvars
import functools
import importlib
import re
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

HOPPER_BLOCK = 128  # rows to which Hopper's kernels want each expert's aligned
TRITON_BLOCK = 16  # and Triton's: the least that tensor cores multiply
TPU_TILE = 128  # rows that a TPU multiplies at a time, at least
_HOPPER_JAX = (0, 10)  # the first whose Pallas compiles these kernels

GPUS = ("gpu", "ampere", "hopper")
DEVICES = ("cpu", *GPUS, "tpu")

_assumed: contextvars.ContextVar[str | None] = contextvars.ContextVar(
  "device", default=None
)


@contextlib.contextmanager
def as_if(device: str) -> Iterator[None]:
  """Within it kernels are chosen for a device that need not be here.

  For looking at shapes and for lowering.  A sparse layer that was traced for another
  device is traced anew; a function of one's own under `jax.jit` is not.

  Args:
    device: one of `DEVICES`.
  """
  if device not in DEVICES:
    raise ValueError(f"as_if: device={device!r}; use one of {', '.join(DEVICES)}.")
  token = _assumed.set(device)
  try:
    yield
  finally:
    _assumed.reset(token)


def current_device() -> str:
  """ "cpu", "tpu", or which GPU.

  "hopper" is an H100 or H200, "ampere" any other NVIDIA GPU of compute capability 8.0
  and up (A100, L4, 4090, B200), "gpu" what is older or another maker's.

  Of `jax.default_device`, or else of the default backend; that arrays were put on
  another device is not known while a function is traced.
  """
  if (assumed := _assumed.get()) is not None:
    return assumed
  # None, the name of a platform, or a device.
  chosen: Any = getattr(jax.config, "jax_default_device", None)
  if chosen is None or isinstance(chosen, str):
    device = chosen or jax.default_backend()
  else:
    device = chosen.platform
  if device not in ("gpu", "cuda", "rocm"):
    return device
  if chosen is None or isinstance(chosen, str):
    chosen = jax.devices(chosen)[0]
  capability = str(getattr(chosen, "compute_capability", None))
  # Mosaic's kernels are for one generation: their instructions ended with it.
  if capability == "9.0":
    return "hopper"
  is_number = re.fullmatch(r"\d+\.\d+", capability)  # not AMD's "gfx90a"
  return "ampere" if is_number and float(capability) >= 8.0 else "gpu"


def unfit_for_hopper(dtype: Any, block: int) -> str | None:
  """Why Hopper's own kernels cannot serve, if they cannot.

  Args:
    dtype: of rows and matrices.
    block: rows to which each expert's are aligned.
  """
  if jax.__version_info__ < _HOPPER_JAX:
    return f"jax {jax.__version__} is older than 0.10"
  if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float16):
    return f"{jnp.dtype(dtype).name} is not a 16-bit type"
  if block % HOPPER_BLOCK:
    return f"groups are aligned to {block} rows, not to {HOPPER_BLOCK}"
  return None


def unfit_for_triton(dtype: Any, block: int) -> str | None:
  """Why the kernels in Pallas's Triton cannot serve, if they cannot.

  Args:
    dtype: of rows and matrices.
    block: rows to which each expert's are aligned.
  """
  if not has_triton():
    return f"jax {jax.__version__} has no Pallas Triton"
  if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float16, jnp.float32):
    return f"{jnp.dtype(dtype).name} is not bfloat16, float16 or float32"
  if block % TRITON_BLOCK:
    return f"groups are aligned to {block} rows, not to {TRITON_BLOCK}"
  return None


@functools.cache
def has_triton() -> bool:
  """Whether this jax has Pallas's Triton, which is to be removed from it."""
  try:
    triton = importlib.import_module("jax.experimental.pallas.triton")
  except ImportError:
    return False
  return hasattr(triton, "CompilerParams")


def unfit_for_megablox(dtype: Any, block: int) -> str | None:
  """Why jax's megablox kernels cannot serve a TPU, if they cannot.

  Args:
    dtype: of rows and matrices.
    block: rows to which each expert's are aligned.
  """
  if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float32):
    return f"megablox has no {jnp.dtype(dtype).name}"
  if block % TPU_TILE:
    return f"groups are aligned to {block} rows, not to {TPU_TILE}"
  return None


def row_alignment(dtype: Any, rows_per_expert: float | None = None) -> int:
  """Rows to which each expert's should be aligned on this device; 1: any number.

  Args:
    dtype: of rows and matrices.
    rows_per_expert: the mean, of groups whose sizes are data; None: of equal groups.
  """
  device = current_device()
  if device == "hopper" and not unfit_for_hopper(dtype, HOPPER_BLOCK):
    return HOPPER_BLOCK
  if device in ("ampere", "hopper") and not unfit_for_triton(dtype, TRITON_BLOCK):
    return TRITON_BLOCK
  if device != "tpu" or rows_per_expert is None or unfit_for_megablox(dtype, TPU_TILE):
    return 1
  # A tile is multiplied whole: half of one is lost for each expert.  Larger tiles read
  # matrices less often; a sixteenth of the rows loses a thirty-second of the work.
  tile = TPU_TILE
  while tile < 4 * TPU_TILE and 2 * tile <= rows_per_expert / 16:
    tile *= 2
  return tile


def spare_blocks(blocks: int) -> int:
  """Blocks that a buffer of ragged groups has beyond the last that may be used.

  On TPUs megablox finds the tile of an expert without rows by a histogram in float32,
  which from some 2048 tiles on may be wrong about the last of them.

  Args:
    blocks: that may be used.
  """
  return 8 if current_device() == "tpu" and blocks > 1024 else 0


def search_method() -> str:
  """How `jnp.searchsorted` should search on this device.

  A loop is a hundred launches of kernels that do nothing on an accelerator; unrolled it
  is one.  On a CPU the loop compiles faster and runs as fast.
  """
  return "scan" if current_device() == "cpu" else "scan_unrolled"
