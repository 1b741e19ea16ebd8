"""Arrays of a safetensors file, by name, without a package.

Eight bytes with the length of a JSON header, the header, and the arrays one after the
other, little-endian (huggingface.co/docs/safetensors).
"""
# SPDX-License-Identifier: Apache-2.0

import json
import math
import struct
from pathlib import Path

import jax.numpy as jnp
import numpy as np

_DTYPES = {
  "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": jnp.bfloat16,
  "I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8,
  "U8": np.uint8, "BOOL": np.bool_,
}  # fmt: skip


def read(source: Path | bytes) -> dict[str, np.ndarray]:
  """All arrays of a file; of a path they are mapped, not read.

  Args:
    source: the file, or what is in it, as read from an archive.

  Raises:
    ValueError: it is not such a file, it ends too early, or it has arrays of a type
      that is not known.
  """
  if isinstance(source, Path):
    data, where = np.memmap(source, np.uint8, "r"), str(source)
  else:
    data, where = np.frombuffer(source, np.uint8), "source"
  try:
    (length,) = struct.unpack("<Q", data[:8].tobytes())
    header = json.loads(data[8 : 8 + length].tobytes())
  except (struct.error, ValueError):
    raise ValueError(
      f"tensors.read: {where} does not begin as a safetensors file; give one."
    ) from None
  body, found = data[8 + length :], {}
  for name, about in header.items():
    if name == "__metadata__":
      continue
    if about["dtype"] not in _DTYPES:
      raise ValueError(
        f"tensors.read: {name!r} of {where} has dtype {about['dtype']}; known: "
        f"{', '.join(_DTYPES)}."
      )
    dtype = np.dtype(_DTYPES[about["dtype"]])
    begin, end = about["data_offsets"]
    if end > len(body) or end - begin != math.prod(about["shape"]) * dtype.itemsize:
      raise ValueError(
        f"tensors.read: {where} has not all of {name!r}; get the file again."
      )
    found[name] = body[begin:end].view(dtype).reshape(about["shape"])
  return found
