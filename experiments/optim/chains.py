"""AdamW, Adafactor and Muon as optax chains whose parts depend on a parameter's role.

Gradient, moments and arithmetic are float32 whatever dtype parameters are stored in.
"""
# SPDX-License-Identifier: Apache-2.0

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array
from optax import contrib

from experiments.config import Optim
from experiments.optim import freeze, roles
from experiments.optim.per_matrix import per_matrix
from jmoe.types import wide
from jmoe.use import nearest

Arrays = dict[str, Array]


class Optimizer(NamedTuple):
  """An optax transformation that also says what it moves."""

  init: Callable[[Any], Any]
  update: Callable[..., Any]
  trained: Callable[[Any], Arrays]  # gradients -> float32, frozen ones left out or zero


class State(NamedTuple):
  """Of an optimizer."""

  master: Arrays  # float32 copies of parameters stored in fewer bits
  chain: Any


def optimizer(config: Optim, *, steps: int, params: Mapping[str, Any]) -> Optimizer:
  """The chain: clip, scale by `kind`, decay, factor of the role, learning rate.

  - The norm that is clipped is of all trained gradients together; frozen parameters
    and experts do not count in it.  `clip=0` does not clip.
  - Only matrices decay, decoupled from the gradient (Loshchilov and Hutter 2019,
    arXiv:1711.05101), times the learning rate.  Gates, norms, biases and embeddings do
    not.
  - `accumulate=n` averages the gradients of n batches and then makes one update.
    Batches weigh alike, however many of their tokens are scored; routing losses and
    balance are those of each batch by itself.  Batches after the last whole n change
    nothing.
  - Parameters stored in less than float32 have a float32 copy in the state.  It is what
    moves; the parameter is that copy, rounded.

  Args:
    config: of the run.
    steps: length of the run in batches.
    params: shapes and stored dtypes by name (`state.blueprint` gives them).

  Raises:
    ValueError: an unknown role or expert in `role_factors` or `freeze`, or fewer steps
      than `accumulate`.
  """
  if steps < config.accumulate:
    raise ValueError(
      f"optim.accumulate={config.accumulate} is more than steps={steps}, so nothing "
      "would be learned; make it smaller."
    )
  stored = {name: jnp.dtype(param.dtype) for name, param in params.items()}
  frozen = freeze.frozen(config.freeze, params)
  names = [name for name in params if name not in frozen.names]
  narrow = [name for name in names if stored[name].itemsize < 4]
  chain = _chain(config, steps, {name: params[name] for name in names})
  if config.accumulate > 1:
    chain = optax.MultiSteps(chain, config.accumulate).gradient_transformation()

  def trained(grads: Arrays) -> Arrays:
    return {n: _wide(g) for n, g in frozen.without(grads).items()}

  def init(params: Arrays) -> State:
    full = {name: _wide(params[name]) for name in names}
    return State({name: full[name] for name in narrow}, chain.init(full))

  def update(updates: Arrays, state: State, params: Arrays) -> tuple[Arrays, State]:
    for name, dtype in stored.items():
      if params[name].dtype != dtype:
        raise ValueError(
          f"optimizer: {name} is {params[name].dtype}, but it was made for {dtype}; "
          "give both the same param_dtype."
        )
    full = {name: state.master.get(name, params[name]) for name in names}
    moves: Any
    # optax multiplies floats and integers, which strict promotion would refuse.
    with jax.numpy_dtype_promotion("standard"):
      moves, chained = chain.update(trained(updates), state.chain, full)
    moves = frozen.held(moves)
    master = {name: full[name] + moves[name] for name in narrow}
    for name in narrow:
      moves[name] = _rounded(master[name], stored[name]) - _wide(params[name])
    moves = frozen.held(moves)
    still = {n: jnp.full(params[n].shape, -0.0, jnp.float32) for n in frozen.names}
    return moves | still, State(master, chained)

  return Optimizer(init, update, trained)


def schedule(config: Optim, steps: int) -> optax.Schedule:
  """The learning rate of each update: a warm-up from zero, then the named curve.

  `steps` and `warmup_steps` are batches; `accumulate` of them are one update, and the
  curve moves once an update.  It ends at `end_fraction` of the peak.
  """
  warmup = math.ceil(config.warmup_steps / config.accumulate)
  rest = max(math.ceil(steps / config.accumulate) - warmup, 1)
  peak, end = config.learning_rate, config.end_fraction
  curves = {
    "cosine": lambda: optax.cosine_decay_schedule(peak, rest, alpha=end),
    "linear": lambda: optax.linear_schedule(peak, peak * end, rest),
    "constant": lambda: optax.constant_schedule(peak),
  }
  after = curves[config.schedule]()
  if not warmup:
    return after
  return optax.join_schedules(
    [optax.linear_schedule(0.0, peak, warmup), after], [warmup]
  )


def _chain(
  config: Optim, steps: int, params: Mapping[str, Any]
) -> optax.GradientTransformation:
  """The chain for the parameters that are trained."""
  by_role = dict(config.role_factors)
  for name in by_role:
    if name not in roles.ROLES:
      raise ValueError(
        f"optim.role_factors names {name!r}; {nearest(name, roles.ROLES)}"
      )
  factors = {name: by_role.get(roles.role(name), 1.0) for name in params}
  matrices = {name: roles.is_matrix(name, param) for name, param in params.items()}

  def times(moves: Any, _: Any) -> Arrays:
    return {name: factors[name] * move for name, move in moves.items()}

  scale = {"adamw": _adamw, "adafactor": _adafactor, "muon": _muon}[config.kind]
  return optax.chain(
    optax.clip_by_global_norm(config.clip) if config.clip else optax.identity(),
    scale(config, params),
    optax.add_decayed_weights(config.weight_decay, mask=matrices),
    optax.stateless(times),
    optax.scale_by_learning_rate(schedule(config, steps)),
  )


def _adamw(config: Optim, params: Mapping[str, Any]) -> optax.GradientTransformation:
  del params  # elementwise: stacks make no difference
  return optax.scale_by_adam(b1=config.b1, b2=config.b2)


def _adafactor(
  config: Optim, params: Mapping[str, Any]
) -> optax.GradientTransformation:
  """Shazeer and Stern 2018 (arXiv:1804.04235), algorithm 4, without momentum.

  Second moments are factored into rows and columns of one matrix of one expert and
  layer, never over experts or layers; those of gates, whose columns are experts, are
  kept whole.  Updates are clipped at a root mean square of one and scaled by that of
  the matrix they change, both of one matrix again, so the learning rate is relative.
  """
  del config  # b1 and b2 have no part in it

  def one(name: str) -> optax.GradientTransformation:
    return optax.chain(
      optax.scale_by_factored_rms(factored=roles.role(name) != "gate"),
      optax.clip_by_block_rms(1.0),
      optax.scale_by_param_block_rms(),
    )

  return per_matrix(
    {name: one(name) for name in params}, {name: roles.stacked(name) for name in params}
  )


def _muon(config: Optim, params: Mapping[str, Any]) -> optax.GradientTransformation:
  """Muon (Jordan 2024) for each matrix of each expert and layer; AdamW for the rest.

  Scaled by 0.2 * sqrt(max(rows, columns)), the size of AdamW's updates, so that one
  learning rate serves both: Liu et al. 2025 (arXiv:2502.16982), equation 4.
  """

  def last_two(moves: Any) -> Any:
    return jax.tree.map(lambda _: contrib.MuonDimensionNumbers(-2, -1), moves)

  def scaled(moves: Any, _: Any) -> Any:
    return jax.tree.map(lambda x: 0.2 * math.sqrt(max(x.shape[-2:])) * x, moves)

  muon = optax.chain(
    # Dims that are neither rows nor columns make a batch of matrices.
    contrib.scale_by_muon(weight_dimension_numbers=last_two),
    optax.stateless(scaled),
  )
  adam = optax.scale_by_adam(b1=config.b1, b2=config.b2)
  kinds = {n: "muon" if roles.is_matrix(n, p) else "adam" for n, p in params.items()}
  return optax.partition({"muon": muon, "adam": adam}, kinds)


def _wide(x: Array) -> Array:
  return x.astype(wide(x))


def _rounded(x: Array, dtype: Any) -> Array:
  """The nearest number of a narrower dtype, still in float32.

  A cast there and back would do, were XLA not allowed to leave it out.
  """
  limits = jnp.finfo(dtype)
  return jax.lax.reduce_precision(x, limits.nexp, limits.nmant)
