"""How much of the pretrained outputs few groups hold: clustered against random."""
# SPDX-License-Identifier: Apache-2.0

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from experiments import results, summary
from experiments.emoe.encoder import DENSE
from experiments.emoe.pack import read
from jmoe.analysis import modularity
from jmoe.config import Dense
from jmoe.convert import bert
from jmoe.models.by_name import take_apart
from jmoe.models.encoder import Encoder
from jmoe.surgery import encoders
from jmoe.surgery.cluster import balanced

SEEDS = (0, 1, 2)  # of the texts, of the clusters' first centres, of random groups


def pretrained(
  path: Path,
  *,
  num_texts: int,
  groups: Sequence[int],
  shares: Sequence[float],
  untrained: bool = False,
) -> list[dict[str, Any]]:
  """A record for each seed, layer, number of groups, share and partition.

  Args:
    path: of the pack.
    num_texts: drawn from all domains by each seed.
    groups: numbers of groups.
    shares: of the groups that a token takes.
    untrained: weights drawn as before pretraining, in place of the pretrained ones.
  """
  pack = read(path)
  model = bert.from_released(pack.config, pack.tensors)
  if untrained:
    _, drawn, _ = take_apart(Encoder(model.config, rngs=nnx.Rngs(0)))
    model = model._replace(params=drawn)

  @jax.jit
  def inputs(params, tokens_BS, valid_BS):
    encoder: Any = encoders.blueprint(model.config).model(params, {})
    x_BSD, found = encoder.embedded(tokens_BS), []
    for n, layer in enumerate(encoder.layers):
      x_BSD = layer.attend(x_BSD, valid_BS)
      found.append(x_BSD)
      x_BSD, _ = layer.feed(x_BSD, valid_BS, key=None, train=False, layer=n)
    return found

  records = []
  for seed in SEEDS:
    rows = np.random.default_rng(seed).permutation(len(pack.tokens_MS))[:num_texts]
    tokens_BS, valid_BS = pack.tokens_MS[rows], pack.tokens_MS[rows] > 0
    given = inputs(dict(model.params), jnp.asarray(tokens_BS), jnp.asarray(valid_BS))
    for n, x_BSD in enumerate(given):
      at, ff = f"layers.{n}.", model.config.feed_forwards[n]
      assert isinstance(ff, Dense)
      matrices = {own: model.params[at + name] for own, name in DENSE.items()}
      x_TD = np.asarray(x_BSD)[valid_BS]
      for number in groups:
        found = compared(matrices, x_TD, ff.activation, number, shares, seed)
        records += [{"layer": n, **record} for record in found]
  return records


def compared(
  matrices: Mapping[str, Any],
  x_TD: np.ndarray,
  activation: Any,
  number: int,
  shares: Sequence[float],
  seed: int,
) -> list[dict[str, Any]]:
  """Of one feed-forward: records for each share, clustered and at random."""
  keys_FD = np.asarray(matrices.get("gate", matrices["up"]), np.float32).T
  ks = [max(1, round(share * number)) for share in shares]
  orders = {
    "keys": np.argsort(balanced(keys_FD, number, seed=seed), kind="stable"),
    "random": np.random.default_rng(seed).permutation(len(keys_FD)),
  }
  return [
    {"partition": name, "groups": number, "seed": seed, **held._asdict()}
    for name, order_F in orders.items()
    for held in modularity.held(
      matrices, x_TD, order_F, activation=activation, num_groups=number, ks=ks
    )
  ]


def claim(
  records: Sequence[Mapping[str, Any]],
  folder: Path,
  name: str,
  command: str,
  *,
  untrained: bool = False,
) -> None:
  """Appends shares to FOLDER/NAME-held-K-of-N-layer-L.json; `-held-untrained-` if so.

  Raises:
    BadData: a file holds something else.
  """
  about = {"versions": summary.versions(), "hardware": summary.hardware()}
  mark, model, weights = "", "MiniLM", {}
  if untrained:
    mark, model, weights = "untrained-", "an untrained MiniLM", {"untrained": True}
  for record in records:
    at = f"{record['k']}-of-{record['groups']}-layer-{record['layer']}"
    results.append(
      folder / f"{name}-held-{mark}{at}.json",
      claim=f"share of a feed-forward's output, layer {record['layer']} of {model}, "
      f"that {record['k']} of {record['groups']} groups hold, chosen by mean keys",
      unit="share",
      against="random",
      arm=record["partition"],
      seed=record["seed"],
      value=record["share"],
      command=command,
      config={n: record[n] for n in ("layer", "groups", "k", "partition")} | weights,
      **about,
    )


def lines(records: Sequence[Mapping[str, Any]]) -> list[str]:
  """A table of means over seeds, a line a layer, number of groups and k."""
  head = "".join(f"{name + ' ' + part:>16}" for name in ("share", "error", "best")
                 for part in ("keys", "random"))  # fmt: skip
  said = [f"{'layer':>5}{'N':>5}{'k':>5}{head}"]
  cells: dict[tuple, dict[str, list[Mapping[str, Any]]]] = {}
  for record in records:
    by_part = cells.setdefault((record["layer"], record["groups"], record["k"]), {})
    by_part.setdefault(record["partition"], []).append(record)
  for (layer, groups, k), by_part in cells.items():
    values = "".join(
      f"{np.mean([record[name] for record in by_part[part]]):>16.4f}"
      for name in ("share", "error", "best")
      for part in ("keys", "random")
    )
    said.append(f"{layer:>5}{groups:>5}{k:>5}{values}")
  return said
