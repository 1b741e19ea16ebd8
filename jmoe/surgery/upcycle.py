"""Dense feed-forwards copied into experts: a model that begins as its parent."""
# SPDX-License-Identifier: Apache-2.0

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jmoe import dispatch, experts, gates, routers
from jmoe._ranges import in_range
from jmoe.assign import renormalise
from jmoe.config import Dense, MoEConfig
from jmoe.layer import init_section, init_state, param_shapes
from jmoe.surgery import dense
from jmoe.surgery.columns import resized, take
from jmoe.surgery.frame import Layer, Model, blocks, on_layers, rebuilt
from jmoe.types import wide
from jmoe.use import shown, use

_START = 0.02  # of a new gate, as the paper's


def upcycle(
  model: Model,
  *,
  num_experts: int,
  k: int = 2,
  seed: int = 0,
  blocks_changed: Sequence[int] | None = None,
  renormalised: bool = True,
  granularity: int = 1,
  noise: float = 0.0,
  reinit: float = 0.0,
  config: MoEConfig | None = None,
) -> Model:
  """A sparse model whose experts are copies of a dense one's feed-forwards.

  Komatsuzaki et al. 2022, arXiv 2212.05055: every expert a copy, a new gate of standard
  deviation 0.02, all else kept.  With renormalised weights and nothing drawn the new
  model's outputs are the old one's; without, a feed-forward's is times the sum of a
  token's weights.

  `granularity` g cuts each copy into g slices of its hidden width, so that there are
  `num_experts / g` copies (He et al. 2024, arXiv 2410.07524, virtual groups): slices of
  a copy have equal gate columns, a token takes whole copies, and the weights, times g,
  sum to g.

  Args:
    model: with dense blocks.
    num_experts: E, a multiple of the granularity.
    k: experts of a token, a multiple of the granularity.
    seed: of what is drawn.
    blocks_changed: numbers of blocks in order of depth; None: every dense one.
    renormalised: weights of a token's experts sum to one.
    granularity: g.
    noise: added to each expert's matrices, as a share of their standard deviation.
    reinit: share of each expert's hidden units that begin anew, other ones for each, by
      a normal with mean and deviation of what was there (Drop-Upcycling, Nakamura et
      al. 2025, arXiv 2502.19261).
    config: what the layers are like beside experts, router and gate; None: dropless,
      with jmoe's losses.

  Raises:
    ValueError: a block that is sparse, numbers that do not divide, or a `config` with a
      shared expert.
  """
  parts = blocks(model)
  chosen = [n for n, block in enumerate(parts) if not block.sparse]
  if blocks_changed is not None:
    chosen = list(blocks_changed)
  wrong = [n for n in chosen if not 0 <= n < len(parts) or parts[n].sparse]
  if wrong or not chosen or len(set(chosen)) < len(chosen):
    raise ValueError(
      f"upcycle: blocks_changed={shown(chosen)}; give numbers of dense blocks of the "
      f"{len(parts)}, each once."
    )
  random = np.random.default_rng(seed)
  for n in chosen:
    ff = parts[n].config.ff
    assert isinstance(ff, Dense)
    layer = copied(
      dense.of_block(parts[n]),
      num_experts=num_experts,
      k=k,
      activation=ff.activation,
      seed=random,
      renormalised=renormalised,
      granularity=granularity,
      noise=noise,
      reinit=reinit,
      config=config,
    )
    parts[n] = parts[n].with_layer(layer)
  return rebuilt(model, parts)


def copied(
  matrices: Mapping[str, Any],
  *,
  num_experts: int,
  k: int,
  activation: Callable[..., Any],
  seed: int | np.random.Generator = 0,
  renormalised: bool = True,
  granularity: int = 1,
  noise: float = 0.0,
  reinit: float = 0.0,
  config: MoEConfig | None = None,
) -> Layer:
  """One dense feed-forward as experts, as of one's own model.

  Args:
    matrices: `up` f[D,F], `down` f[F,D], maybe `gate` f[D,F]; no biases.
    activation: of the feed-forward.

  The others, and errors, are those of `upcycle`.
  """
  E, g = num_experts, granularity
  if g < 1 or E % g or k % g or not 0 < k <= E:
    raise ValueError(
      f"upcycle: num_experts={E} and k={k} with granularity={g}; give multiples of it, "
      "k at most num_experts."
    )
  noise = in_range("upcycle: noise", noise)
  reinit = in_range("upcycle: reinit", reinit, most=1)
  if set(matrices) | {"gate"} != {"up", "down", "gate"}:
    raise ValueError(
      f"upcycle: matrices={sorted(matrices)}; give up, down and maybe gate, no biases."
    )
  if k == 1 < E and renormalised:
    raise ValueError(
      f"upcycle: k=1 of num_experts={E} with renormalised weights, which are then all "
      "one, so that the gate does not learn; use renormalised=False "
      "(--plain-weights), or a larger k."
    )
  random = np.random.default_rng(seed)
  d_model, width = matrices["up"].shape
  if width % g:
    raise ValueError(f"upcycle: d_ff={width} is no multiple of granularity={g}.")
  # Expert e holds slice e % g of copy e // g.
  slices = {
    name: np.stack(
      np.split(np.asarray(x), g, axis=0 if name == "down" else 1) * (E // g)
    )
    for name, x in matrices.items()
  }
  if reinit:
    slices = _partly_new(slices, reinit, random)
  if noise:
    each = (1, 2)
    slices = {n: _noisy(x, noise, random, axis=each) for n, x in slices.items()}
  gate_DE = _START * random.standard_normal((d_model, E // g)).astype(np.float32)
  params = {
    "gate": {"kernel_DE": np.repeat(gate_DE, g, axis=1)},
    "experts": dense.as_experts(slices),
  }
  expert = experts.glu if "gate" in matrices else experts.mlp
  made = dict(
    d_model=d_model,
    num_experts=E,
    gate=use(gates.linear),
    router=use(routers.top_k, k=k, scale=float(g)),
    experts=use(expert, d_ff=width // g, activation=activation),
    renormalise=use(renormalise.before_dropping if renormalised else renormalise.never),
  )
  if config is None:
    sparse = MoEConfig(dispatch=use(dispatch.sort), **made)  # type: ignore[arg-type]
  else:
    sparse = dataclasses.replace(config, **made)
  new = set(param_shapes(sparse)) - set(params)
  if new - {"aggregate"}:
    raise ValueError(
      f"upcycle: config has {' and '.join(sorted(new))} beside the experts, for which "
      "a dense model has no weights; leave them out."
    )
  for part in new:
    drawn = init_section(jax.random.key(int(random.integers(2**31))), sparse, part)
    params[part] = {name: np.asarray(x) for name, x in drawn.items()}
  state = jax.tree.map(np.asarray, init_state(sparse, params))
  return Layer(sparse, params, state)


def _partly_new(
  slices: dict[str, np.ndarray], share: float, random: np.random.Generator
) -> dict[str, np.ndarray]:
  made = {name: x.copy() for name, x in slices.items()}
  E, _, width = made["up"].shape
  for e in range(E):
    units = random.choice(width, round(share * width), replace=False)
    for name, x in made.items():
      at = (e, units) if name == "down" else (e, slice(None), units)
      old = x[at]
      if old.size:
        scale, middle = old.std(dtype=wide(x)), old.mean(dtype=wide(x))  # not bfloat16
        drawn = random.standard_normal(old.shape) * scale + middle
        x[at] = drawn.astype(x.dtype)
  return made


def expand(
  model: Model, *, times: int, k: int | None = None, seed: int = 0, noise: float = 0.0
) -> Model:
  """`times` as many experts, each with its copies, under equal gate columns.

  With `k` times as large too a token takes all copies of what it took, each at an equal
  share of its weight, so that without noise the outputs are the old ones; but where
  `aggregate.dag` has learned to send messages, copies send them as well.  A balance
  bias is divided as a softmax's scores are.

  Args:
    model: with sparse layers; scores are a softmax, or weights are renormalised.
    times: m, copies of each expert.
    k: choices per token; None: m times as many.
    seed: of the noise.
    noise: added to the copies' matrices and to all gate columns, as a share of their
      standard deviation; an expert itself stays as it is.

  Raises:
    ValueError: times or k that cannot be, or weights that would grow with the copies.
  """
  if times < 1:
    raise ValueError(f"expand: times={times}; give 1 or more.")
  noise = in_range("expand: noise", noise)
  random = np.random.default_rng(seed)

  def change(number: int, layer: Layer) -> Layer:
    del number
    config = layer.config
    weighed, score = config.renormalise.name, config.score.name
    if weighed == "ones" or (weighed == "never" and score != "softmax"):
      raise ValueError(
        f"expand: score={score} with renormalise={weighed}: copies would add "
        "up; give a layer whose weights are shares, as under "
        "renormalise.over_chosen."
      )
    E = config.num_experts
    made = take(layer, np.repeat(np.arange(E), times).tolist())
    made = made._replace(
      config=resized(config, E * times, (config.k or 1) * times if k is None else k)
    )
    bias = made.state.bias
    if bias is not None and config.score.name == "softmax":
      # It is added to scores, of which each copy has its share.
      made = made._replace(state=dataclasses.replace(made.state, bias=bias / times))
    if not noise:
      return made
    new = np.arange(E * times) % times > 0  # not the first one of its copies
    parts: dict[str, Any] = {
      name: np.where(new[(...,) + (None,) * (x.ndim - 1)], _noisy(x, noise, random), x)
      for name, x in ((n, np.asarray(x)) for n, x in made.params["experts"].items())
    }
    gate = {
      name: _noisy(np.asarray(x), noise, random)
      if "E" in name.rpartition("_")[2]
      else x
      for name, x in made.params["gate"].items()
    }
    return made._replace(params={**made.params, "experts": parts, "gate": gate})

  return on_layers(model, change)


def _noisy(
  x: np.ndarray,
  noise: float,
  random: np.random.Generator,
  axis: tuple[int, ...] | None = None,
) -> np.ndarray:
  """Noise added as a share of the deviation over all of an array, or over some dims."""
  drawn = random.standard_normal(x.shape).astype(wide(x))
  # Of bfloat16 NumPy would make sums in bfloat16, which stop growing.
  scale = x.std(axis, dtype=wide(x), keepdims=axis is not None)
  return (x + noise * scale * drawn).astype(x.dtype)
