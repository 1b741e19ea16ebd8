"""The optimizer: AdamW as an optax chain whose parts depend on a parameter's role."""
# SPDX-License-Identifier: Apache-2.0

from collections.abc import Hashable, Iterable

import jax
import optax

from experiments.config import Optim

ROLES = ("gate", "expert", "norm", "embedding", "matrix")
_DECAYED = ("expert", "matrix")  # not what scales, selects or is looked up


def role(name: str) -> str:
  """What a parameter is for, from its dotted name.

  >>> role("segments.0.1.moe.gate.kernel_DE"), role("segments.0.1.attention_norm.scale")
  ('gate', 'norm')
  """
  parts = name.split(".")
  if "moe" in parts:
    section = parts[parts.index("moe") + 1]
    return {"gate": "gate", "experts": "expert"}.get(section, "matrix")
  if parts[-1] in ("scale", "bias"):
    return "norm"
  return "embedding" if "embed" in parts else "matrix"


def optimizer(
  config: Optim, *, steps: int, names: Iterable[str]
) -> optax.GradientTransformation:
  """AdamW with warm-up and a cosine to `end_fraction` of the peak learning rate.

  Args:
    config: learning rate, decay, clip, and a factor of the learning rate for each role.
    steps: length of the run.
    names: of the parameters, which are a dictionary.
  """
  roles = {name: role(name) for name in names}
  schedule = optax.warmup_cosine_decay_schedule(
    0.0,
    config.learning_rate,
    warmup_steps=config.warmup_steps,
    decay_steps=max(steps, config.warmup_steps + 1),
    end_value=config.learning_rate * config.end_fraction,
  )
  factors = dict(config.role_factors)
  by_role: dict[Hashable, optax.GradientTransformation] = {
    r: optax.scale(factors.get(r, 1.0)) for r in ROLES
  }
  chain = optax.chain(
    optax.clip_by_global_norm(config.clip),
    optax.scale_by_adam(b1=config.b1, b2=config.b2),
    optax.add_decayed_weights(
      config.weight_decay,
      mask={n: r in _DECAYED and "bias" not in n for n, r in roles.items()},
    ),
    optax.multi_transform(by_role, roles),
    optax.scale_by_learning_rate(schedule),
  )

  def update(updates, state, params=None, **extra):
    # optax multiplies floats and integers, which strict promotion would refuse.
    with jax.numpy_dtype_promotion("standard"):
      return chain.update(updates, state, params, **extra)

  return optax.GradientTransformation(chain.init, update)
