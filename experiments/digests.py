"""Digests of arrays, by which a checkpoint is known to be whole.

Of arrays that one process holds, a sha256.  Of those that several hold parts of, a sum
over elements that no layout changes, so that any number of processes can form it: each
element's bits and its place in the whole array go through the finalizer of SplitMix64
(Steele et al. 2014, doi:10.1145/2660193.2660195, figure 14), a bijection of 64 bits.
Another bit anywhere is another sum.
"""
# SPDX-License-Identifier: Apache-2.0

import functools
import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from experiments import hosts
from experiments.state import path_part

_SUM = "sum64:"
_PIECE = 2**18  # elements at a time: their places fit a cache


def named(tree: Any) -> dict[str, Any]:
  """Path -> leaf: what is on disk, which so knows no Python types."""
  return {
    "/".join(map(path_part, path)): leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }


def digests(tree: Any) -> dict[str, str]:
  """Path -> digest of the dtype, shape and bytes of each array of a tree.

  Where several processes hold it, all must call this.
  """
  leaves = named(tree)
  return _sums(leaves) if hosts.count() > 1 else _hashes(leaves)


def differing(tree: Any, saved: Mapping[str, str], *, alone: bool = False) -> list[str]:
  """The paths whose digest is not the saved one, of either kind.

  Args:
    tree: of arrays.
    saved: what `digests` gave.
    alone: whether this process holds all of it; otherwise every process must call this.
  """
  leaves = named(tree)
  summed = {n: x for n, x in leaves.items() if saved.get(n, "").startswith(_SUM)}
  hashed = {n: x for n, x in leaves.items() if n in saved and n not in summed}
  found = _hashes(hashed) | (_sums(summed, alone) if summed else {})
  return [name for name in saved if found.get(name) != saved[name]]


def sha256(*parts: bytes) -> str:
  """Of the parts one after another."""
  total = hashlib.sha256()
  for part in parts:
    total.update(part)
  return total.hexdigest()


def of_json(value: Any) -> str:
  """Of a value that JSON can hold."""
  return sha256(json.dumps(value, sort_keys=True).encode())


def _hashes(leaves: Mapping[str, Any]) -> dict[str, str]:
  found = {}
  for name, leaf in leaves.items():
    array = _whole(leaf)
    found[name] = sha256(f"{array.dtype}{array.shape}".encode(), array.tobytes())
  return found


def _whole(leaf: Any) -> np.ndarray:
  if getattr(leaf, "is_fully_addressable", True):
    return np.asarray(leaf)
  # One process saved it: each must see all of it, one array at a time.
  from jax.experimental import multihost_utils

  return np.asarray(multihost_utils.process_allgather(leaf, tiled=True))


def _sums(leaves: Mapping[str, Any], alone: bool = False) -> dict[str, str]:
  mine = {
    name: sum(_sum(*shard, np.shape(leaf)) for shard in _shards(leaf)) % 2**64
    for name, leaf in leaves.items()
  }
  each = [mine]
  if not alone:
    each = [json.loads(text) for text in hosts.exchange("digests", json.dumps(mine))]
  found = {}
  for name, leaf in leaves.items():
    total = sum(one[name] for one in each) % 2**64
    text = f"{leaf.dtype}{tuple(np.shape(leaf))}{total}"
    found[name] = _SUM + sha256(text.encode())
  return found


def _shards(leaf: Any) -> Iterator[tuple[np.ndarray, tuple[int, ...]]]:
  """(array, its first index) of the parts that this process counts."""
  if not isinstance(leaf, jax.Array):
    yield np.asarray(leaf), (0,) * np.ndim(leaf)
    return
  for shard in leaf.addressable_shards:
    if shard.replica_id == 0:
      yield np.asarray(shard.data), tuple(s.start or 0 for s in shard.index)


def _sum(array: np.ndarray, start: tuple[int, ...], shape: tuple[int, ...]) -> int:
  """The sum over one part of an array of a shape."""
  if array.size > _PIECE:
    dim = next(d for d, n in enumerate(array.shape) if n > 1)
    half = array.shape[dim] // 2
    later = (*start[:dim], start[dim] + half, *start[dim + 1 :])
    first, rest = np.split(array, [half], axis=dim)
    return (_sum(first, start, shape) + _sum(rest, later, shape)) % 2**64
  strides = [math.prod(shape[d + 1 :]) for d in range(len(shape))]
  first = sum(s * n for s, n in zip(strides, start, strict=True))
  bits = np.ascontiguousarray(array).view(f"u{array.dtype.itemsize}")
  bits = bits.reshape(array.shape).astype(np.uint64)
  with np.errstate(over="ignore"):
    place = _places(array.shape, tuple(strides)) + np.uint64(first)
    x = bits + place * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return int(np.sum(x ^ (x >> np.uint64(31)), dtype=np.uint64))


@functools.lru_cache(maxsize=4)
def _places(shape: tuple[int, ...], strides: tuple[int, ...]) -> np.ndarray:
  """u64 index in the flat whole array, beside that of the first element."""
  places = np.ones(shape, np.uint64)  # from one, so that zeros count
  for dim, (size, stride) in enumerate(zip(shape, strides, strict=True)):
    along = np.arange(size, dtype=np.uint64) * np.uint64(stride)
    places += along.reshape(-1, *[1] * (len(shape) - dim - 1))
  return places
