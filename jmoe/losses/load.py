"""The load loss of V-MoE: keeps the chances of the experts to be chosen alike."""
# SPDX-License-Identifier: Apache-2.0

import math

import jax
import jax.numpy as jnp
from jax import Array
from jax.scipy.special import ndtr
from jax.scipy.stats import norm

from jmoe.kernels.top_k import top_k
from jmoe.losses import _scope
from jmoe.noise import gaussian
from jmoe.routers.noisy_top_k import noisy_top_k
from jmoe.types import Context, Plan, valid_or_all
from jmoe.use import Use, fact, marked, shown


def _check(config, *, noise_std: float = 1.0, over: str = "group") -> None:
  del config
  _scope.check_scope(over)
  if not 0 < noise_std < math.inf:
    raise ValueError(f"load: noise_std={noise_std}; give that of the noise, over 0.")


def _fits(config, *, noise_std: float = 1.0, over: str = "group") -> str | None:
  """It is the chance to be among the k highest logits under the layer's own noise."""
  del over
  if not fact(config.router, "takes_best"):
    return f"{config.router.name} does not take the k best; use routers.noisy_top_k."
  if config.k >= config.num_experts:
    return f"k={config.k} takes every expert; use k < {config.num_experts}."
  for field in ("restrict", "balance"):
    if getattr(config, field):
      return (
        f"it does not know of {field}={shown(getattr(config, field))}; leave one out."
      )
  drawn = _drawn(config)
  if drawn is None:
    return (
      "no Gaussian noise on the logits; use routers.noisy_top_k, or "
      "logit_noise=use(noise.gaussian)."
    )
  stage, std = drawn
  if std != noise_std:
    return f"noise_std={noise_std}, but {stage!r} draws {std}; give both the same."
  return None


def _drawn(config) -> tuple[Use, float] | None:
  """The stage that draws normal noise on the logits, and its standard deviation."""
  if config.router.function is noisy_top_k:
    return config.router, config.router.get("noise_std")
  noise = config.logit_noise
  if noise is None or noise.function is not gaussian:
    return None
  return noise, noise.get("std")


@jax.custom_jvp
def _cdf(z: Array) -> Array:
  """Phi.  Its own rule, since erf's fails under shard_map in jax 0.12.0."""
  return ndtr(z)


_cdf.defjvps(lambda dz, _, z: dz * norm.pdf(z))


@marked(check=_check, fits=_fits)
def load(
  plan: Plan,
  context: Context,
  *,
  noise_std: float = 1.0,
  over: str = "group",
  axes: _scope.Axes = None,
) -> Array:
  """f32[]: squared coefficient of variation of experts' expected load; 0 at balance.

  The load that a token expects to give an expert is the probability that, were the
  expert's noise alone drawn anew, it would be among the token's k best:
  1 - Phi((threshold - clean logit) / sigma), with the k-th largest noisy logit as
  threshold and sigma = noise_std / E.  Without noise (evaluation) the threshold is the
  k-th largest clean logit.

  Source: Riquelme et al. 2021 (V-MoE), arXiv 2106.05974, appendix A.2; after Shazeer et
  al. 2017, arXiv 1701.06538, appendix A.  The gradient goes through the threshold too,
  as in V-MoE's code.

  Args:
    plan: of a router that takes the k < E best of noisy logits, without a restriction
      or a bias; a configuration of another kind is refused.
    context: `valid`; `row` and `num_rows` for `over="sequence"`.
    noise_std: what the noise stage was given, before its division by E.
    over: "sequence", "group", "batch" or "mesh": tokens whose chances are summed.  The
      mean is taken over scopes that hold a valid token.
    axes: mesh axes of `over="mesh"`.

  Raises:
    ValueError: a router without a fixed number of choices, or no positive `noise_std`.
  """
  _check(None, noise_std=noise_std, over=over)
  routing = _scope.token_choice(plan, "load")
  assert routing.k is not None
  valid_T = valid_or_all(context, routing.num_tokens)
  clean_TE = _scope.masked(routing.logits, valid_T)
  noisy_TE = clean_TE
  if routing.noisy_logits is not None:
    noisy_TE = _scope.masked(routing.noisy_logits, valid_T)

  # The value is read through a mask: the gradient of a sort or a gather would scatter.
  last_T = top_k(noisy_TE, routing.k)[:, -1]
  is_last_TE = last_T[:, None] == jnp.arange(routing.num_experts, dtype=last_T.dtype)
  threshold_T = jnp.where(is_last_TE, noisy_TE, 0).sum(1)

  sigma = noise_std / routing.num_experts
  chance_TE = _cdf((clean_TE - threshold_T[:, None]) / sigma)  # 1 - Phi(z) = Phi(-z)
  chance_TE = _scope.masked(chance_TE, valid_T)
  sums = _scope.sums(over, routing, context, axes)
  variation_Z = _scope.squared_variation(sums(chance_TE))
  return sums.mean(variation_Z, sums(valid_T.astype(chance_TE.dtype)))
