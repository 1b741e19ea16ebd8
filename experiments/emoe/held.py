"""How much of the pretrained outputs few groups hold: clustered against random."""
# SPDX-License-Identifier: Apache-2.0

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from experiments.emoe.pack import read
from jmoe.analysis import modularity
from jmoe.config import Dense
from jmoe.convert import bert
from jmoe.models.by_name import take_apart
from jmoe.models.encoder import Encoder
from jmoe.surgery.cluster import balanced

_NAMES = {"up": "up.kernel", "up_bias": "up.bias", "down": "down.kernel"}
DRAWS = 3  # random partitions, of which the mean is taken


def pretrained(
  path: Path,
  *,
  num_texts: int,
  groups: Sequence[int],
  shares: Sequence[float],
  untrained: bool = False,
) -> list[dict[str, Any]]:
  """A record for each layer, number of groups, share and partition.

  Args:
    path: of the pack.
    num_texts: drawn from all domains, seed 0.
    groups: numbers of groups.
    shares: of the groups that a token takes.
    untrained: weights drawn as before pretraining, in place of the pretrained ones.
  """
  pack = read(path)
  model = bert.from_released(pack.config, pack.tensors)
  if untrained:
    _, drawn, _ = take_apart(Encoder(model.config, rngs=nnx.Rngs(0)))
    model = model._replace(params=drawn)
  rows = np.random.default_rng(0).permutation(len(pack.tokens_MS))[:num_texts]
  tokens_BS = pack.tokens_MS[rows][:, : pack.length_M[rows].max()]
  valid_BS = tokens_BS > 0
  encoder = model.module()

  @jax.jit
  def inputs(tokens_BS, valid_BS):
    x_BSD, found = encoder.embedded(tokens_BS), []
    for n, layer in enumerate(encoder.layers):
      x_BSD = layer.attend(x_BSD, valid_BS)
      found.append(x_BSD)
      x_BSD, _ = layer.feed(x_BSD, valid_BS, key=None, train=False, layer=n)
    return found

  records = []
  given = inputs(jnp.asarray(tokens_BS), jnp.asarray(valid_BS))
  for n, x_BSD in enumerate(given):
    at, ff = f"layers.{n}.", model.config.feed_forwards[n]
    assert isinstance(ff, Dense)
    matrices = {own: model.params[at + name] for own, name in _NAMES.items()}
    x_TD = np.asarray(x_BSD)[valid_BS]
    for number in groups:
      found = compared(matrices, x_TD, ff.activation, number, shares)
      records += [{"layer": n, **record} for record in found]
  return records


def compared(
  matrices: Mapping[str, Any],
  x_TD: np.ndarray,
  activation: Any,
  number: int,
  shares: Sequence[float],
) -> list[dict[str, Any]]:
  """Of one feed-forward: records for each share, clustered and at random."""
  keys_FD = np.asarray(matrices.get("gate", matrices["up"]), np.float32).T
  F, ks = len(keys_FD), [max(1, round(share * number)) for share in shares]
  parts = {"keys": [np.argsort(balanced(keys_FD, number), kind="stable")]}
  parts["random"] = [np.random.default_rng(d).permutation(F) for d in range(DRAWS)]
  records = []
  for name, orders in parts.items():
    each = [
      modularity.held(
        matrices, x_TD, order_F, activation=activation, num_groups=number, ks=ks
      )
      for order_F in orders
    ]
    for held in zip(*each, strict=True):
      mean = [float(np.mean([h[i] for h in held])) for i in range(1, 4)]
      names = dict(zip(("share", "error", "best"), mean, strict=True))
      records.append(
        {
          "partition": name,
          "groups": number,
          "k": held[0].k,
          **names,
          "tokens": len(x_TD),
        }
      )
  return records


def lines(records: Sequence[Mapping[str, Any]]) -> list[str]:
  """A table, a line a layer, number of groups and k."""
  head = "".join(f"{name + ' ' + part:>16}" for name in ("share", "error", "best")
                 for part in ("keys", "random"))  # fmt: skip
  said = [f"{'layer':>5}{'N':>5}{'k':>5}{head}"]
  cells: dict[tuple, dict[str, Mapping[str, Any]]] = {}
  for record in records:
    at = (record["layer"], record["groups"], record["k"])
    cells.setdefault(at, {})[record["partition"]] = record
  for (layer, groups, k), by_part in cells.items():
    values = "".join(
      f"{by_part[part][name]:>16.4f}"
      for name in ("share", "error", "best")
      for part in ("keys", "random")
    )
    said.append(f"{layer:>5}{groups:>5}{k:>5}{values}")
  return said
