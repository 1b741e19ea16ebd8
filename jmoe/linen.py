"""`linen.MoE`: the layer as a Flax Linen module; all mathematics is in `layer.moe`."""
# SPDX-License-Identifier: Apache-2.0

from typing import Any

from flax import linen as nn
from jax import Array

from jmoe import checks, layer
from jmoe.config import MoEConfig, resolve
from jmoe.types import Context, Info, State

_NOT_GIVEN = ...  # the same object in every copy of a module


class _Layer(nn.Module):
  """The fields and the call of `MoE`, under Flax's own constructor.

  Transformed classes, `nn.remat(MoE)`, have that constructor too: they take a
  configuration or the keywords listed here.
  """

  config: MoEConfig | int
  d_ff: int | None = None
  # Not None where nothing is given: None is a value, and k=None an error.
  num_experts: Any = _NOT_GIVEN
  k: Any = _NOT_GIVEN
  capacity_factor: Any = _NOT_GIVEN
  eval_capacity_factor: Any = _NOT_GIVEN
  activation: Any = _NOT_GIVEN
  gated: Any = _NOT_GIVEN
  bias: Any = _NOT_GIVEN
  shared_d_ff: Any = _NOT_GIVEN

  def resolved(self) -> MoEConfig:
    """The configuration, from whichever way it was given."""
    given = {name: getattr(self, name) for name in _KEYWORDS}
    given = {k: v for k, v in given.items() if v is not _NOT_GIVEN}
    return resolve(self.config, self.d_ff, given)

  @nn.compact
  def __call__(
    self,
    x: Array,
    *,
    context: Context | None = None,
    key: Array | None = None,
    train: bool = False,
    residual: Array | None = None,
    previous_logits: Array | None = None,
    forced: Array | None = None,
    axes: tuple[str, ...] | None = None,
    with_plan: bool = False,
  ) -> tuple[Array, Info]:
    """Applies the layer.

    Args:
      x: `[..., D]` activations.
      context: fields shaped `[...]` or flat; see `jmoe.Context`.
      key: for random choices; None takes the stream "router", if there is one.
      train, previous_logits, forced, axes, with_plan: as for `jmoe.moe`.
      residual: shaped like x.

    Returns:
      The output shaped like x, and `Info`.
    """
    config = self.resolved()
    checks.activations(x, config)  # before parameters are drawn
    self._complete(config)
    params = {}
    for name, shapes in layer.param_shapes(config).items():
      if shapes:
        params[name] = self.param(name, layer.init_section, config, name)
    stateful = layer.has_state(config)
    variable = None
    if stateful:
      variable = self.variable(
        "moe_state",
        "state",
        lambda: layer.init_state(config, params, self.make_rng("params")),
      )
    state = State()
    if variable is not None:
      # Parameters are those after the last optimizer step: nothing runs in between.
      state = layer.after_step(config, params, variable.value)
    if key is None and self.has_rng("router"):
      key = self.make_rng("router")
    y, info = layer.apply(
      params,
      x,
      config,
      context=context,
      state=state,
      key=key,
      train=train,
      residual=residual,
      previous_logits=previous_logits,
      forced=forced,
      axes=axes,
      with_plan=with_plan,
    )
    # Assigned, not accumulated: a rematerialised call writes the same value again.
    if variable is not None and train and not self.is_initializing():
      if self.is_mutable_collection("moe_state"):
        variable.value = info.state
    return y, info

  def _complete(self, config: MoEConfig) -> None:
    """Raises unless `apply` was given what it cannot make: parameters and state."""
    makes = self.has_rng("params")
    if not (makes and self.is_mutable_collection("params")):
      given = nn.unbox(dict(self.variables.get("params", {})))
      checks.params(given, config)
    if layer.has_state(config) and not self.has_variable("moe_state", "state"):
      if not (makes and self.is_mutable_collection("moe_state")):
        raise ValueError(
          "moe_state is missing from the variables of a layer with state; pass "
          "{'params': ..., 'moe_state': ...}, both as init returned them."
        )


class MoE(_Layer):
  """A mixture-of-experts layer.

  >>> import jax, jax.numpy as jnp, jmoe
  >>> moe = jmoe.linen.MoE(16, 32, num_experts=4, k=2)
  >>> x = jnp.ones((2, 5, 16))
  >>> variables = moe.init(jax.random.key(0), x)
  >>> (y, info) = moe.apply(variables, x)
  >>> y.shape, sorted(variables)
  ((2, 5, 16), ['params'])

  Parameters have the names of `jmoe.moe_init`, the same tree as `jmoe.nnx.MoE`'s.
  State, where there is any, is in the collection "moe_state"; a call in training writes
  it if that collection is mutable.  Random numbers come from `key`, or from the stream
  "router".
  """

  def __init__(self, config: MoEConfig | int, d_ff: int | None = None, **keywords: Any):
    """From a configuration, or from plain keywords.

    Args:
      config: a `MoEConfig` or preset; or d_model.
      d_ff: width of an expert, with plain keywords.
      **keywords: of `jmoe.simple`, or Flax's `name` and `parent`.

    Raises:
      ValueError, TypeError: naming the argument, its value and the remedy.
    """
    flax = {k: keywords.pop(k) for k in ("name", "parent") if k in keywords}
    # Flax copies modules by all of their fields, those too that were not given.
    given = {k: v for k, v in keywords.items() if v is not _NOT_GIVEN}
    super().__init__(resolve(config, d_ff, given), **flax)


_KEYWORDS = (
  "num_experts", "k", "capacity_factor", "eval_capacity_factor", "activation", "gated",
  "bias", "shared_d_ff",
)  # fmt: skip
