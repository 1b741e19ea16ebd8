# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # A sparse layer by hand
#
# Sixteen tokens, four experts, and every step between them drawn: what the gate thinks,
# what each token asks for, which requests find a slot, and what comes out. Then the
# same layer as one call.
#
# Runs in a minute on any machine; no accelerator is needed.

# %%
# Set-up: nothing to do where jmoe is installed; elsewhere, from its repository.
import importlib.util
import subprocess
import sys

REPOSITORY = "https://github.com/jmoe-project/jmoe"
for module, package in {
  "jmoe": f"jmoe @ git+{REPOSITORY}",
  "matplotlib": "matplotlib",
}.items():
  if importlib.util.find_spec(module) is None:
    # No upgrade: the jax that this runtime came with stays as it is.
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", package], check=True)

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import jmoe

print(f"jax {jax.__version__} on {jax.default_backend()}")
T, D, E, K = 16, 8, 4, 2
COLOURS = ["tab:blue", "tab:orange", "tab:green", "tab:red"]

# %% [markdown]
# ## Tokens and gate
#
# The tokens come from four clusters, but not in equal numbers: eight from the first.
# The gate is the only learned part of routing, one matrix. Here it is set by hand, to
# each cluster's direction, so that expert *n* is the one for cluster *n*.

# %%
key = jax.random.key(0)
cluster_T = jnp.array([0] * 8 + [1] * 4 + [2] * 3 + [3])
directions_ED = jnp.eye(E, D)
x_TD = 2 * directions_ED[cluster_T] + 0.3 * jax.random.normal(key, (T, D))

config = jmoe.simple(D, 16, num_experts=E, k=K, capacity_factor=1.0)
params = jmoe.moe_init(jax.random.key(1), config)
params = {**params, "gate": {**params["gate"], "kernel_DE": 1.5 * directions_ED.T}}
y_TD, info = jmoe.moe(params, x_TD, config=config, train=True, with_plan=True)
routing = info.plan.routing


def grid(ax, values_TE, title):
  ax.imshow(values_TE.T, aspect="auto")
  ax.set(title=title, xlabel="token", ylabel="expert", yticks=range(E))
  ax.set_xticks(range(T), [str(t) for t in range(T)])


figure, axes = plt.subplots(2, 1, figsize=(9, 4.2), layout="constrained")
grid(axes[0], np.asarray(routing.logits), "logits: what the gate thinks")
grid(axes[1], np.asarray(routing.probs), "scores: softmax over experts")
plt.show()

# %% [markdown]
# ## Choices
#
# Each token asks for its two best experts. Together the requests are a sparse matrix,
# sixteen by four, and a `Routing` lists its entries: token, expert, weight.

# %%
token_N, expert_N = np.asarray(routing.token), np.asarray(routing.expert)
weight_N = np.asarray(routing.weight)
for n in range(6):
  print(f"token {token_N[n]:2} -> expert {expert_N[n]}, weight {weight_N[n]:.2f}")
print("...")

load_E = np.bincount(expert_N, minlength=E)
assert (load_E == np.asarray(info.load)).all()
print("load, requests of each expert:", load_E, "mean", T * K / E)

# %% [markdown]
# ## Queues and capacity
#
# Every expert has a queue of fixed length: capacity `ceil(K * T * factor / E)`, here
# with factor 1. First choices queue before second ones, and earlier tokens before later
# ones. Who finds no slot is dropped: the layer adds nothing to that token for this
# choice, and the token goes on through the residual connection.

# %%
capacity = info.plan.capacity
slot_N, kept_N = np.asarray(info.plan.slot), np.asarray(info.plan.kept)
assert capacity == -(-K * T // E)

figure, ax = plt.subplots(figsize=(9, 3), layout="constrained")
for token, expert, slot, kept in zip(token_N, expert_N, slot_N, kept_N, strict=True):
  colour = COLOURS[int(cluster_T[token])]
  ax.add_patch(
    plt.Rectangle(
      (slot, expert - 0.4), 0.92, 0.8, facecolor=colour, alpha=1.0 if kept else 0.25
    )
  )
  ax.text(slot + 0.46, expert, str(token), ha="center", va="center")
ax.axvline(capacity - 0.04, color="black")
ax.text(capacity, -0.75, " capacity", va="center")
ax.set(
  xlim=(0, load_E.max() + 0.5),
  ylim=(E - 0.5, -1),
  yticks=range(E),
  xlabel="slot",
  ylabel="expert",
  title="queues: the number is the token, the colour its cluster, pale is dropped",
)
plt.show()

dropped = 1 - kept_N.mean()
reported = float(info.dropped["capacity"])
print(f"dropped: {dropped:.1%}; the layer reports {reported:.1%}")
assert abs(dropped - reported) < 1e-6

# %% [markdown]
# ## By hand
#
# The whole layer in a loop: for each kept entry, run the expert on the token and add
# the result, times the weight. Two choices' weights are divided by their sum first,
# before anything is dropped.

# %%
weights = {name: np.asarray(value) for name, value in params["experts"].items()}
print({name: value.shape for name, value in weights.items()})


def silu(x):
  return x / (1 + np.exp(-x))


by_hand_TD = np.zeros((T, D), np.float32)
for token, expert, weight, kept in zip(
  token_N, expert_N, weight_N, kept_N, strict=True
):
  if not kept:
    continue
  x_D = np.asarray(x_TD[token])
  hidden_F = silu(x_D @ weights["gate_EDF"][expert]) * (x_D @ weights["up_EDF"][expert])
  both = weight_N[token_N == token].sum()
  by_hand_TD[token] += weight / both * (hidden_F @ weights["down_EFD"][expert])

print("largest difference:", np.abs(by_hand_TD - np.asarray(y_TD)).max())
np.testing.assert_allclose(by_hand_TD, y_TD, atol=1e-5)

# %% [markdown]
# ## Room for all
#
# More capacity drops fewer; a dropless layer drops none, and its buffer has exactly as
# many rows as there are requests, up to padding.

# %%
for factor in (0.5, 1.0, 1.25, 2.0, None):
  some = jmoe.simple(D, 16, num_experts=E, k=K, capacity_factor=factor)
  _, found = jmoe.moe(params, x_TD, config=some, train=True)
  share = sum(float(v) for v in found.dropped.values())
  print(f"capacity factor {factor!s:>5}: {share:6.1%} dropped")

# %% [markdown]
# ## Balance
#
# What pays for even queues is a loss: it is 1 when all experts get the same, and up to
# `E / K` when all tokens go to the same ones. It comes back by name, to be added to the
# task's loss.

# %%
print({name: round(float(value), 3) for name, value in info.losses.items()})
weighed = jmoe.total_loss((info,), {"load_balance": 0.01, "router_z": 0.0})
print("to be added:", float(weighed))

# %% [markdown]
# In a model of your own this is `jmoe.nnx.MoE(D, 16, num_experts=4, k=2, rngs=...)`, or
# `jmoe.linen.MoE`: the README shows both in a training step. The next notebook trains a
# sparse language model.
