# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Train a sparse language model on one chip
#
# One TPU chip with 16 GB, one GPU, or a CPU: in ten minutes at most, from nothing to a
# mixture-of-experts model, text written by it, and a report of what its experts do. The
# run is saved as it goes; after a disconnect, run all cells again and it goes on where
# it stopped.
#
# On Colab choose a TPU or GPU under *Runtime, Change runtime type*.

# %%
# Set-up. The jax that the runtime came with stays as it is: it fits the chip's driver.
import importlib.metadata
import importlib.util
import os
import pathlib
import subprocess
import sys

REPOSITORY = "https://github.com/jmoe-project/jmoe"
KEPT = ("jax", "jaxlib", "flax", "libtpu", "numpy", "protobuf")


def checkout() -> pathlib.Path:
  """The repository's folder: the one this notebook is in, or a fresh clone."""
  here = pathlib.Path.cwd()
  for folder in (here, *here.parents):
    if (folder / "experiments" / "main.py").exists():
      return folder
  clone = here / "jmoe"
  if not clone.exists():
    subprocess.run(["git", "clone", "-q", "--depth=1", REPOSITORY, clone], check=True)
  return clone


def installed(name: str) -> str | None:
  try:
    return importlib.metadata.version(name)
  except importlib.metadata.PackageNotFoundError:
    return None


root = checkout()
needed = ("jax", "flax", "optax", "orbax", "grain", "tensorflow_datasets", "matplotlib")
if any(importlib.util.find_spec(name) is None for name in (*needed, "tensorboardX")):
  kept = [f"{name}=={v}" for name in KEPT if (v := installed(name))]
  constraints = pathlib.Path("jmoe-constraints.txt")
  constraints.write_text("\n".join(kept) + "\n")
  subprocess.run(
    [sys.executable, "-m", "pip", "install", "-q", "-c", constraints]
    + [f"{root}[train,data,viz]"],
    check=True,
  )
sys.path.insert(0, str(root))
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

# %%
# The chip. An accelerator runtime that shows only a CPU would train for hours: stop.
import glob
import shutil

import jax

backend = jax.default_backend()
has_chip = bool(glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*"))
has_chip |= shutil.which("nvidia-smi") is not None or "TPU_NAME" in os.environ
if backend == "cpu" and has_chip and not os.environ.get("JAX_PLATFORMS"):
  raise RuntimeError(
    "This runtime has a TPU or GPU, but jax sees only the CPU: the installed jax does "
    "not fit its driver. Use Runtime, Disconnect and delete runtime, and run all cells "
    "in the fresh one; if that fails, set JAX_PLATFORMS=cpu to go on without the chip."
  )
print(f"jax {jax.__version__}, flax {installed('flax')}: {jax.devices()}")

# %%
# Where the run is kept: on Drive if this is Colab, so that it outlives the runtime.
CONFIG = "tiny" if backend == "cpu" else "notebook"
CONFIG = os.environ.get("JMOE_NOTEBOOK_CONFIG", CONFIG)
SETTINGS = []  # for instance ["steps=500", "optim.learning_rate=1e-3"]
if importlib.util.find_spec("google.colab") is not None:
  from google.colab import drive

  drive.mount("/content/drive")
  runs = pathlib.Path("/content/drive/MyDrive/jmoe")
else:
  runs = pathlib.Path(os.environ.get("JMOE_NOTEBOOK_RUNS", root / "runs"))
workdir = runs / f"notebook-{CONFIG}"
settings = [word for setting in SETTINGS for word in ("--set", setting)]
run = ["--config", CONFIG, "--workdir", str(workdir), *settings]
print(" ".join(["python -m experiments.main", *run]))

# %% [markdown]
# ## What it will be
#
# Nothing is trained yet: the configuration, its parameters (all, and those a token
# meets), FLOPs, memory, and the text.

# %%
from experiments import main

assert main.main([*run, "--dry-run"]) == 0

# %% [markdown]
# ## Training
#
# Stop it with the square at any time; it leaves a checkpoint and this cell goes on from
# there. At the end stand bits per byte on text that it never saw, beside `gzip -9`, and
# a sample.

# %%
exit_code = main.main(run)
assert exit_code in (0, 130), f"training ended with exit code {exit_code}"

# %% [markdown]
# ## Text

# %%
from experiments import generate

exit_code = generate.main(
  ["--workdir", str(workdir), "--prompt", "The ", "--tokens", "200"]
)
assert exit_code == 0

# %% [markdown]
# ## What the experts do
#
# Loss, load of every expert in every layer, drops, entropy, and which text each expert
# takes. The page is one file that needs no network; keep it, or send it to somebody.

# %%
import html

from IPython.display import HTML, display

from experiments import report

page = workdir / "report.html"
assert report.main([str(workdir), "--out", str(page)]) == 0
inside = html.escape(page.read_text(encoding="utf-8"))
display(HTML(f'<iframe srcdoc="{inside}" width="100%" height="900"></iframe>'))
