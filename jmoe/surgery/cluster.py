"""A dense feed-forward cut into experts by balanced clustering of its keys (EMoE)."""
# SPDX-License-Identifier: Apache-2.0

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jmoe import gates
from jmoe.config import Dense, ModelConfig, MoEConfig
from jmoe.layer import init_section, init_state
from jmoe.presets import emoe
from jmoe.surgery import dense
from jmoe.surgery.columns import concatenated
from jmoe.surgery.frame import Layer, Model, blocks, rebuilt
from jmoe.surgery.to_dense import to_dense
from jmoe.types import Params
from jmoe.use import shown, use

GATES = ("keys", "frozen", "linear", "cosine")


class Clustered(NamedTuple):
  """A model with some feed-forwards in groups, and where their hidden units were."""

  model: Model
  orders: list[np.ndarray]  # i[F] of each sparse layer: hidden unit of the dense one
  config: ModelConfig  # of the dense model


def cluster(
  model: Model,
  *,
  num_experts: int,
  k: int,
  blocks_changed: Sequence[int],
  seed: int = 0,
  partition: str = "keys",
  gate: str = "keys",
) -> Clustered:
  """Dense feed-forwards as `num_experts` groups of hidden units; a token takes k.

  Qiu, Huang, Fu 2024 (EMoE, arXiv 2310.10908): keys, the input weights of a hidden unit
  (of the gate projection if there is one), are clustered into groups of one size; a
  group's score is the token times the mean of its keys; chosen groups weigh one, so all
  of them together are the dense feed-forward.

  Args:
    model: with dense blocks.
    num_experts: N, which divides the hidden width.
    k: groups of a token.
    blocks_changed: numbers of dense blocks in order of depth; the authors' are the last
      even ones.
    seed: of the clusters' first centres.
    partition: "keys", or "random" as a control.
    gate: "keys": means that follow the keys from step to step, without parameters;
      "frozen": those of now for good; "linear" or "cosine": a trained gate that begins
      at the means, whose weights multiply (EMoE-learn).

  Raises:
    ValueError: a block that is sparse, a width that is not divisible, or another
      partition or gate.
  """
  parts, orders = blocks(model), []
  for n in sorted(blocks_changed):
    if not 0 <= n < len(parts) or parts[n].sparse:
      raise ValueError(
        f"cluster: blocks_changed={shown(list(blocks_changed))}; give numbers of dense "
        f"blocks of the {len(parts)}, each once."
      )
    ff = parts[n].config.ff
    assert isinstance(ff, Dense)
    layer, order_F = split(
      dense.of_block(parts[n]),
      num_experts=num_experts,
      k=k,
      activation=ff.activation,
      seed=seed,
      partition=partition,
      gate=gate,
    )
    orders.append(order_F)
    parts[n] = parts[n].with_layer(layer)
  return Clustered(rebuilt(model, parts), orders, model.config)


def split(
  matrices: Mapping[str, Any],
  *,
  num_experts: int,
  k: int,
  activation: Callable[..., Any],
  seed: int = 0,
  partition: str = "keys",
  gate: str = "keys",
) -> tuple[Layer, np.ndarray]:
  """One feed-forward in groups, and where their hidden units were.

  Args:
    matrices: `up` f[D,F], `down` f[F,D], maybe `gate` f[D,F], and `up_bias` and
      `gate_bias` f[F].  A bias after `down` is no group's: it stays where it was.
    activation: of the feed-forward.

  The others, and errors, are those of `cluster`.

  Returns:
    (the layer, i[F] the dense hidden unit of each, group by group).
  """
  if partition not in ("keys", "random"):
    raise ValueError(f"cluster: partition={partition!r}; give 'keys' or 'random'.")
  if gate not in GATES:
    raise ValueError(f"cluster: gate={gate!r}; give one of {', '.join(GATES)}.")
  if not {"up", "down"} <= set(matrices):
    raise ValueError(f"cluster: matrices={sorted(matrices)}; give up and down.")
  keys_FD = np.asarray(matrices.get("gate", matrices["up"]), np.float32).T
  if partition == "keys":
    label_F = balanced(keys_FD, num_experts, seed=seed)
  else:
    label_F = np.repeat(np.arange(num_experts), _size(len(keys_FD), num_experts))
    np.random.default_rng(seed).shuffle(label_F)
  order_F = np.argsort(label_F, kind="stable")
  held = {name: np.asarray(x) for name, x in matrices.items()}
  experts = stacked(held, order_F, num_experts)
  config = _config(dense.from_experts(experts), num_experts, k, activation, gate)
  arrays = {name: jnp.asarray(x) for name, x in experts.items()}
  params: Params = {"experts": experts}
  if gate in ("linear", "cosine"):
    params = {"gate": _averages(config, arrays)} | params
  return Layer(config, params, init_state(config, {"experts": arrays})), order_F


def stacked(
  matrices: Mapping[str, Any], order_F: np.ndarray, num_experts: int
) -> dict[str, Any]:
  """A feed-forward's arrays as parameters of experts; traceable.

  Args:
    matrices: as `split` takes them.
    order_F: i[F] the dense hidden unit of each, group by group.
    num_experts: N, which divides F.

  Raises:
    ValueError: F is not divisible.
  """
  size, found = _size(len(order_F), num_experts), {}
  for name, x in matrices.items():
    axis = _hidden(name)
    shape = x.shape[:axis] + (num_experts, size) + x.shape[axis + 1 :]
    found[name] = x.take(order_F, axis).reshape(shape).swapaxes(0, axis)
  return dense.as_experts(found)


def joined(layer: Layer, order_F: np.ndarray) -> dict[str, Any]:
  """The feed-forward that `split` took, hidden units where they were.

  To the bit if the layer was not trained; else what all groups together are, each at
  weight one.

  Args:
    layer: in groups.
    order_F: from `split`.
  """
  back_F = np.argsort(order_F)
  found = {}
  for name, x in dense.from_experts(layer.params["experts"]).items():
    axis = _hidden(name)
    found[name] = concatenated(list(x), axis).take(back_F, axis)
  return found


def _hidden(name: str) -> int:
  """The dim of a dense array that is the hidden width."""
  return 1 if name in ("up", "gate") else 0


def _config(
  stacks: Mapping[str, np.ndarray],
  num_experts: int,
  k: int,
  activation: Callable[..., Any],
  gate: str,
) -> MoEConfig:
  d_model = stacks["up"].shape[1]
  fields: dict[str, Any] = dict(
    d_model=d_model,
    d_ff=stacks["up"].shape[2],
    num_experts=num_experts,
    k=k,
    gated="gate" in stacks,
    activation=activation,
    bias="hidden" if "up_bias" in stacks else False,
  )
  if gate in ("keys", "frozen"):
    return emoe.layer(refresh=gate == "keys", **fields)
  learned = use(gates.linear)
  if gate == "cosine":
    learned = use(gates.cosine, d_project=d_model)
  return emoe.learned_layer(gate=learned, **fields)


def _averages(config: MoEConfig, experts: Params) -> dict[str, np.ndarray]:
  """A trained gate's first parameters: the means of the keys."""
  key_DE = np.asarray(gates.keys.buffers(experts)["key_ED"]).T  # type: ignore[attr]
  if config.gate.name == "linear":
    return {"kernel_DE": key_DE}
  first = init_section(jax.random.key(0), config, "gate")
  first |= {"project_DP": np.eye(config.d_model, dtype=np.float32), "centre_PE": key_DE}
  return {name: np.asarray(x) for name, x in first.items()}


def merged(clustered: Clustered) -> Model:
  """The dense model again, hidden units where they were: to the bit, if untrained.

  Traceable in the arrays.
  """
  order = iter(clustered.orders)
  made = []
  whole = blocks(to_dense(clustered.model, how="concatenate"))
  for block, old in zip(whole, blocks(clustered.model), strict=True):
    if old.sparse:
      back_F = np.argsort(next(order))
      matrices = {
        name: x.take(back_F, _hidden(name)) for name, x in dense.of_block(block).items()
      }
      ff = block.config.ff
      assert isinstance(ff, Dense)
      block = dense.as_block(block, matrices, ff)
    made.append(block)
  return rebuilt(clustered.model._replace(config=clustered.config), made)


def balanced(keys_FD: np.ndarray, number: int, *, seed: int = 0, rounds: int = 30):
  """i[F] which of `number` clusters of exactly one size each key is in.

  Spherical k-means: keys to length one, centres as well.  A round moves the centres to
  their members' mean, then swaps members between any two clusters while both together
  come closer, which is the best split for these two; the sum of similarities never
  falls.  The same on every machine up to rounding, and for F 11,008 of width 4096 under
  a minute on one core.

  Args:
    keys_FD: f[F,D].
    number: N, which divides F.
    seed: of the first centres.
    rounds: at most.

  Raises:
    ValueError: F is not divisible.
  """
  F = len(keys_FD)
  size = _size(F, number)
  length_F1 = np.linalg.norm(keys_FD, axis=1, keepdims=True)
  unit_FD = (keys_FD / np.maximum(length_F1, 1e-30)).astype(np.float32)
  label_F = _filled(unit_FD, _centres(unit_FD, number, seed), size)
  before = -np.inf
  for _ in range(rounds):
    mean_ND = np.stack([unit_FD[label_F == n].sum(0) for n in range(number)])
    mean_ND /= np.maximum(np.linalg.norm(mean_ND, axis=1, keepdims=True), 1e-30)
    near_FN = unit_FD @ mean_ND.T
    _swap(near_FN, label_F, number)
    now = float(near_FN[np.arange(F), label_F].sum(dtype=np.float64))
    if now - before <= 1e-6 * abs(now):
      break
    before = now
  return label_F


def _centres(unit_FD: np.ndarray, number: int, seed: int) -> np.ndarray:
  """Keys far from each other, as k-means++ draws them."""
  random = np.random.default_rng(seed)
  chosen = [int(random.integers(len(unit_FD)))]
  far_F = np.full(len(unit_FD), np.inf)
  for _ in range(number - 1):
    far_F = np.minimum(far_F, np.maximum(1 - unit_FD @ unit_FD[chosen[-1]], 0))
    total = np.cumsum(far_F, dtype=np.float64)
    at = np.searchsorted(total, random.random() * total[-1], side="right")
    chosen.append(int(min(at, len(unit_FD) - 1)))
  return unit_FD[chosen]


def _filled(unit_FD: np.ndarray, centre_ND: np.ndarray, size: int) -> np.ndarray:
  """The nearest cluster with room, for those first that have most to lose."""
  near_FN = unit_FD @ centre_ND.T
  two_F2 = np.sort(near_FN, axis=1)[:, -2:]
  loses_F = two_F2[:, -1] - two_F2[:, 0]
  room_N = np.full(len(centre_ND), size)
  label_F = np.empty(len(unit_FD), np.int64)
  for f in np.argsort(-loses_F, kind="stable"):
    n = int(np.argmax(np.where(room_N > 0, near_FN[f], -np.inf)))
    label_F[f] = n
    room_N[n] -= 1
  return label_F


def _swap(near_FN: np.ndarray, label_F: np.ndarray, number: int) -> None:
  """Exchanges members of every two clusters, in place, while it brings them nearer."""
  members = [np.flatnonzero(label_F == n) for n in range(number)]
  for a in range(number):
    for b in range(a + 1, number):
      here, there = members[a], members[b]
      gain_a = near_FN[here, b] - near_FN[here, a]
      gain_b = near_FN[there, a] - near_FN[there, b]
      i, j = np.argsort(-gain_a, kind="stable"), np.argsort(-gain_b, kind="stable")
      count = int((gain_a[i] + gain_b[j] > 1e-9).sum())  # sums only fall
      if count:
        i, j = i[:count], j[:count]
        members[a] = np.concatenate([np.delete(here, i), there[j]])
        members[b] = np.concatenate([np.delete(there, j), here[i]])
  for n, each in enumerate(members):
    label_F[each] = n


def _size(F: int, number: int) -> int:
  if number < 1 or F % number:
    raise ValueError(f"cluster: num_experts={number} does not divide d_ff={F}.")
  return F // number
