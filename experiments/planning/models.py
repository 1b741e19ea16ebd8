"""Names to runs: those of `experiments.configs`, and published models of `presets`."""
# SPDX-License-Identifier: Apache-2.0

import importlib
import pkgutil

from experiments import configs
from experiments.config import Data, Optim, Run, sparse_layers
from jmoe import presets
from jmoe.config import ModelConfig
from jmoe.losses import loss_name
from jmoe.use import nearest


def published() -> dict[str, ModelConfig]:
  """Models by `preset:size`, as in `olmoe:1b-7b`."""
  found = {}
  for module in pkgutil.iter_modules(presets.__path__):
    preset = importlib.import_module(f"jmoe.presets.{module.name}")
    for size, model in getattr(preset, "MODELS", {}).items():
      found[f"{module.name}:{size}"] = model
  return found


def load(name: str, *, rows: int) -> Run:
  """The run of a name.

  A published model is given what its preset does not say: rows of 4096 tokens, AdamW,
  bfloat16 parameters with float32 copies.

  Args:
    name: of a configuration, or `preset:size`.
    rows: of a batch, for a published model.

  Raises:
    ValueError: no such name, with the nearest.
  """
  if name in configs.names():
    return configs.load(name)
  models = published()
  if name not in models:
    known = [*configs.names(), *models]
    raise ValueError(f"--config {name}: unknown; {nearest(name, known)}")
  model = models[name]
  preset = importlib.import_module(f"jmoe.presets.{name.partition(':')[0]}")
  reported = {loss_name(loss) for ff in sparse_layers(model) for loss in ff.losses}
  weights = {n: w for n, w in preset.LOSS_WEIGHTS.items() if n in reported}
  return Run(
    name=name,
    model=model,
    data=Data(max_bytes=1, seq=4096, batch=rows, eval_context=0),
    optim=Optim(learning_rate=4e-4, warmup_steps=2000),
    loss_weights=tuple(weights.items()),
    steps=100_000,
    save_every=1000,
    param_dtype="bfloat16",
  )
