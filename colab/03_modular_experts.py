# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Experts that can be taken out
#
# A sparse model uses few of its experts for a token, but over a text it uses all of
# them: whoever wants it for one kind of text must still load the whole. EMO (Wang,
# Bhagia, Min 2026, arXiv 2605.06663) trains each *document* within a pool of experts.
# Here two small models learn six languages, one with pools and one without; then a few
# experts are cut out for one language, and what is left must read it alone.
#
# A minute or two on a CPU, less on a TPU or GPU.

# %%
# Set-up: nothing to do where jmoe is installed; elsewhere, from its repository.
import importlib.util
import subprocess
import sys

REPOSITORY = "https://github.com/jmoe-project/jmoe"
for module, package in {
  "jmoe": f"jmoe @ git+{REPOSITORY}",
  "optax": "optax",
  "matplotlib": "matplotlib",
}.items():
  if importlib.util.find_spec(module) is None:
    # No upgrade: the jax that this runtime came with stays as it is.
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", package], check=True)

# %%
import dataclasses
import functools
import os
import pathlib

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import nnx

import jmoe
from jmoe import models, presets, surgery
from jmoe.analysis import routes, specialisation
from jmoe.config import Attention, BlockConfig, ModelConfig

print(f"jax {jax.__version__} on {jax.default_backend()}")
STEPS = int(os.environ.get("JMOE_NOTEBOOK_STEPS", "300"))
TEXTS = None  # or a folder: each folder in it is a domain, with text files
LENGTH, BATCH = 32, 64  # tokens of a document, documents of a step
E, K = 12, 2  # experts, and how many a token has
D_MODEL, D_FF = 64, 32

# %% [markdown]
# ## Text
#
# Each language is written in the same 32 letters and has its own rule which letter
# follows which: three may, with probabilities 0.7, 0.2 and 0.1. So the next letter
# costs 1.157 bits at least for whoever knows the language, and 5 for who does not. A
# letter alone does not say which language it is of; the letters before it do.
#
# With `TEXTS` the documents are pieces of your own files, as bytes, the last tenth of
# each domain held out.


# %%
class Languages:
  """Documents of made-up languages."""

  names = [f"language {n}" for n in range(6)]
  vocabulary, least = 32, 1.157

  def __init__(self):
    self.held_out = self
    random = np.random.default_rng(0)
    shape = (len(self.names), self.vocabulary)
    ranks = random.random((*shape, self.vocabulary))
    self.after = np.argsort(ranks, axis=-1)[..., :3]  # who follows whom

  def documents(self, domain_B, random):
    """i32[B,LENGTH+1]"""
    letters = [random.integers(0, self.vocabulary, len(domain_B))]
    for _ in range(LENGTH):
      which = random.choice(3, len(domain_B), p=[0.7, 0.2, 0.1])
      letters.append(self.after[domain_B, letters[-1], which])
    return np.stack(letters, axis=1).astype(np.int32)


class Files:
  """Pieces of files as bytes."""

  vocabulary, least = 256, None

  def __init__(self, folder, held_out=False):
    folders = sorted(p for p in pathlib.Path(folder).iterdir() if p.is_dir())
    self.names, self.bytes = [p.name for p in folders], []
    for each in folders:
      files = sorted(p for p in each.rglob("*") if p.is_file())
      whole = np.frombuffer(b"\n".join(p.read_bytes() for p in files), np.uint8)
      last = 9 * len(whole) // 10
      self.bytes.append(whole[last:] if held_out else whole[:last])
    self.held_out = self if held_out else Files(folder, held_out=True)

  def documents(self, domain_B, random):
    """i32[B,LENGTH+1]"""
    rows = []
    for text in (self.bytes[d] for d in domain_B):
      first = random.integers(0, len(text) - LENGTH)
      rows.append(text[first : first + LENGTH + 1])
    return np.stack(rows).astype(np.int32)


text = Languages() if TEXTS is None else Files(TEXTS)
D = len(text.names)
for name, row in zip(
  text.names, text.documents(np.arange(D), np.random.default_rng(1)), strict=True
):
  shown = "".join(chr(t + 64) if TEXTS is None else chr(t) for t in row)
  print(f"{name}: {shown!r}")

# %% [markdown]
# ## Two models that differ in training alone
#
# `presets.emo` is the paper's layer at any size. Its restriction is all that is new:
# in training every document draws the size of its pool, from K + 1 to all experts, and
# its tokens choose only among the experts that the document likes most on average. The
# other model is the same without it, from the same start, on the same text.

# %%
with_pools = presets.emo.layer(d_model=D_MODEL, d_ff=D_FF, num_experts=E, k=K)
without = dataclasses.replace(with_pools, restrict=())
print("restrict:", *with_pools.restrict)


def model_config(layer):
  block = BlockConfig(Attention(num_heads=4), layer)
  return ModelConfig(text.vocabulary, D_MODEL, segments=(((block,), 1),), remat=False)


optimizer = optax.adam(optax.warmup_cosine_decay_schedule(0, 1e-2, STEPS // 15, STEPS))


@nnx.jit
def start():
  return models.Decoder(model_config(without), rngs=nnx.Rngs(0))


first = surgery.model_of(start())  # parameters by name


@functools.partial(jax.jit, static_argnames="config")
def train_step(params, moments, tokens_BS, key, *, config):
  def objective(params):
    model = surgery.Model(config, params, first.state).module()
    logits_BSV, infos = model(tokens_BS[:, :-1], key=key, train=True)
    nats_BS = optax.softmax_cross_entropy_with_integer_labels(
      logits_BSV, tokens_BS[:, 1:]
    )
    # Balance over the whole batch: within a document it would fight the pool.
    loss = nats_BS.mean() + jmoe.total_loss(infos, presets.emo.LOSS_WEIGHTS)
    return loss, nats_BS.mean() / jnp.log(2.0)

  grads, bits = jax.grad(objective, has_aux=True)(params)
  updates, moments = optimizer.update(grads, moments, params)
  return optax.apply_updates(params, updates), moments, bits


def train(layer):
  params = dict(first.params)
  moments, random, curve = optimizer.init(params), np.random.default_rng(2), []
  for step in range(STEPS):
    tokens = text.documents(random.integers(0, D, BATCH), random)
    params, moments, bits = train_step(
      params, moments, tokens, jax.random.key(step), config=model_config(layer)
    )
    curve.append(bits)
  return params, np.array(curve)


trained = {"EMO": train(with_pools), "standard": train(without)}

figure, ax = plt.subplots(figsize=(7, 2.8), layout="constrained")
for name, (_, curve) in trained.items():
  ax.plot(curve, label=name)
if text.least:
  ax.axhline(text.least, color="black", linewidth=0.8, label="least")
ax.set(xlabel="step", ylabel="bits a token", title="training")
ax.legend()
plt.show()

# %% [markdown]
# ## Pools are off when it counts
#
# A pool looks at the whole document, so a token's experts would depend on what comes
# after it: bits of training are not a fair measure. Outside of training there are no
# pools, and both models are one kind of model with other parameters.

# %%
random = np.random.default_rng(3)
domain_B = np.repeat(np.arange(D), 16)
held_out = text.held_out.documents(domain_B, random)


@functools.partial(jax.jit, static_argnames="config")
def read(params, state, tokens_BS, *, config):
  """f32[B] bits a token of each document, i32[T*K] the experts that it asked for."""
  model = surgery.Model(config, params, state).module()
  logits_BSV, (info,) = model(tokens_BS[:, :-1], look=lambda plan: plan.routing.expert)
  nats_BS = optax.softmax_cross_entropy_with_integer_labels(
    logits_BSV, tokens_BS[:, 1:]
  )
  return nats_BS.mean(1) / jnp.log(2.0), info.plan[0]


def bits_by_domain(model):
  bits_B, _ = read(dict(model.params), dict(model.state), held_out, config=model.config)
  return np.array([np.asarray(bits_B)[domain_B == d].mean() for d in range(D)])


whole = {
  name: surgery.Model(model_config(without), params, first.state)
  for name, (params, _) in trained.items()
}
emo = whole["EMO"]
pooled = emo._replace(config=model_config(with_pools))
np.testing.assert_array_equal(bits_by_domain(pooled), bits_by_domain(emo))
for name, model in whole.items():
  print(f"{name}, held-out bits a token:", bits_by_domain(model).round(3))

# %% [markdown]
# ## Who serves whom
#
# Rows are domains, columns are experts, and a cell is the share of the domain's choices
# that goes to the expert. Above it stand the bits that an expert tells about the domain
# (less what chance gives), and the mean cosine between two domains' rows: EMO's measure
# of how far its parts are apart.

# %%
figure, axes = plt.subplots(1, 2, figsize=(10, 3.2), layout="constrained")
for ax, (name, model) in zip(axes, whole.items(), strict=True):
  _, expert_N = read(
    dict(model.params), dict(model.state), held_out, config=model.config
  )
  uses_TE = np.eye(E, dtype=bool)[np.asarray(expert_N).reshape(-1, K)].any(1)
  load_DE = routes.load(np.repeat(domain_B, LENGTH), uses_TE, num_labels=D)
  nats = specialisation.mutual_information(load_DE)
  bits = float(nats - specialisation.miller_madow(load_DE)) / np.log(2)
  alike = specialisation.cosine(load_DE)[np.triu_indices(D, 1)].mean()
  ax.imshow(specialisation.domain_shares(load_DE), vmin=0, aspect="auto")
  ax.set(title=f"{name}: {bits:.2f} bits, cosine {alike:.2f}", xlabel="expert")
  ax.set_yticks(range(D), text.names)
  print(f"{name}: {bits:.3f} bits of {np.log2(D):.3f}, cosine {alike:.3f}")
plt.show()

# %% [markdown]
# ## Taking a domain's experts out
#
# Five documents of a domain run through the model. In each layer the experts with the
# highest mean probability stay, with their columns of the gate, and the shared one.
# What comes out is a model of its own: it could be trained on, saved, or put together
# with others.

# %%
calibration = [
  surgery.Sample(text.documents(np.full(5, d), random)[:, :-1]) for d in range(D)
]


def size(model):
  return sum(np.size(x) for x in model.params.values())


def extracted(model, domain, keep):
  return surgery.layerwise(model, [calibration[domain]], keep=keep)


QUARTER = E // 4
parts = [extracted(emo, d, QUARTER) for d in range(D)]
for name, part in zip(text.names, parts, strict=True):
  print(f"{name}: experts {part.kept[0]}")
print(f"{size(emo)} parameters, {size(parts[0].model)} in a part")

read_by_DD = np.stack([bits_by_domain(part.model) for part in parts])
figure, ax = plt.subplots(figsize=(5.4, 3.6), layout="constrained")
picture = ax.imshow(read_by_DD)
ax.set_xticks(range(D), text.names, rotation=45, ha="right")
ax.set_yticks(range(D), [f"part for {name}" for name in text.names])
ax.set(title="held-out bits a token of what (column) is read by whom (row)")
figure.colorbar(picture)
plt.show()

# %% [markdown]
# ## What a few experts are worth
#
# Each domain is read by the experts that were chosen for it, and by as many that were
# drawn at random, with both models. A part may even read better than the whole: it need
# not find out first which language it has before it.


# %%
def of_random(model, keep):
  some = [surgery.at_random(model, keep=keep, seed=seed).model for seed in range(3)]
  return np.mean([bits_by_domain(each) for each in some])


counts = [E, E // 2, QUARTER]
figure, ax = plt.subplots(figsize=(6, 3.6), layout="constrained")
table = {}
for name, model in whole.items():
  start_bits = bits_by_domain(model).mean()
  chosen, drawn = [start_bits], [start_bits]
  for keep in counts[1:]:
    own = [bits_by_domain(extracted(model, d, keep).model)[d] for d in range(D)]
    chosen.append(np.mean(own))
    drawn.append(of_random(model, keep))
  (line,) = ax.plot(counts, chosen, marker="o", label=f"{name}, chosen")
  ax.plot(counts, drawn, ":", marker=".", color=line.get_color(), label="at random")
  table[name] = chosen
  print(f"{name:9} chosen {np.round(chosen, 3)}  at random {np.round(drawn, 3)}")
ax.invert_xaxis()
ax.set(xlabel="experts kept", ylabel="held-out bits a token", xticks=counts)
ax.legend()
plt.show()

change = {name: chosen[-1] - chosen[0] for name, chosen in table.items()}
print(
  f"cut to a quarter of its experts, EMO changes by {change['EMO']:+.3f} bits a token"
)
print(f"and the standard model by {change['standard']:+.3f}")

# %% [markdown]
# On real text and at a size where it matters: `python -m experiments.series --config
# emo --arms sparse,pool=none --out runs/emo`, then `python -m experiments.emo` for this
# curve, `python -m experiments.routes` and `report` for the pictures, and
# `python -m experiments.surgery extract` for a part as a run of its own; see
# docs/training.md.
