"""What a run is, as frozen data, and how a command line changes it."""
# SPDX-License-Identifier: Apache-2.0

import dataclasses
import math
from typing import Any

from experiments import corpora, vocabulary
from jmoe.config import ModelConfig, MoEConfig
from jmoe.losses import loss_name
from jmoe.losses.total import batches_of_update
from jmoe.use import nearest


@dataclasses.dataclass(frozen=True)
class Data:
  """Which text, and how it becomes batches."""

  max_bytes: int  # of a domain
  seq: int  # tokens of a row
  batch: int  # rows, of all hosts together
  eval_context: int  # tokens before those that an evaluation window scores
  corpus: str = "embedded"  # see `experiments.corpora`
  tokenizer: str = "bytes"  # or "bpe:SIZE", trained on the training documents
  temperature: float = 1.0  # domains are drawn in proportion to size ** (1/temperature)
  near_duplicates: float = 0.0  # drop documents so similar (Jaccard); 0 keeps all
  # Part of the training tokens that some domains get, by name, 0 for none; the others
  # share the rest as `temperature` says.  All domains are evaluated.
  shares: tuple[tuple[str, float], ...] | None = None
  seed: int = 0
  num_workers: int = 0
  # Streams that the rows of a batch come from, which the processes of a job share out;
  # None: one.  The order of batches depends on it, and not on the processes.
  readers: int | None = None

  def __post_init__(self):
    _at_least("data", self, max_bytes=1, seq=2, batch=1, eval_context=0, num_workers=0)
    if self.readers is not None:
      _at_least("data", self, readers=1)
      if self.batch % self.readers:
        raise ValueError(
          f"data.readers={self.readers} does not divide data.batch={self.batch}; make "
          "the one a divisor of the other."
        )
    _seed("data", self)
    _number("data", self, "temperature near_duplicates")
    if self.eval_context >= self.seq:
      raise ValueError(
        f"data.eval_context={self.eval_context} leaves nothing of data.seq={self.seq} "
        "to score; make it smaller."
      )
    if self.shares is not None:
      _pairs("data.shares", self.shares)
      if (total := math.fsum(share for _, share in self.shares)) > 1 + 1e-9:
        raise ValueError(
          f"data.shares={self.shares} are {total:.4g} of the tokens; give parts of 1."
        )
    corpora.parse(self.corpus)
    vocabulary.size_of(self.tokenizer)
    if self.temperature <= 0:
      raise ValueError(f"data.temperature={self.temperature}; give a number over 0.")
    if self.near_duplicates > 1:
      raise ValueError(
        f"data.near_duplicates={self.near_duplicates} is a similarity; give one of "
        "0 to 1."
      )


@dataclasses.dataclass(frozen=True)
class Optim:
  """An optax chain; `role_factors` multiply the learning rate of a role (see `optim`).

  `freeze` names what stays as it is: roles ("gate", "shared"), experts by number
  ("experts:0,3"), and what gates have for them ("columns:0,3").
  """

  learning_rate: float
  warmup_steps: int
  kind: str = "adamw"  # "adafactor", "muon"
  schedule: str = "cosine"  # "linear", "constant"
  end_fraction: float = 0.1
  weight_decay: float = 0.1
  b1: float = 0.9
  b2: float = 0.95
  clip: float = 1.0  # of the gradient's norm; 0 does not clip
  accumulate: int = 1  # batches of one update
  role_factors: tuple[tuple[str, float], ...] = ()
  freeze: tuple[str, ...] = ()

  def __post_init__(self):
    _at_least("optim", self, warmup_steps=0, accumulate=1)
    _number("optim", self, "learning_rate weight_decay clip")
    for name in ("b1", "b2", "end_fraction"):
      if not 0 <= (value := getattr(self, name)) <= 1 or (
        value == 1 and name[0] == "b"
      ):
        raise ValueError(f"optim.{name}={value!r}; give a number of 0 to 1.")
    _pairs("optim.role_factors", self.role_factors)
    for entry in self.freeze:
      if not isinstance(entry, str):
        raise ValueError(
          f"optim.freeze holds {entry!r}; give roles, or experts as in 'experts:0,3'."
        )
    _one_of("optim", self, kind=("adamw", "adafactor", "muon"))
    _one_of("optim", self, schedule=("cosine", "linear", "constant"))


@dataclasses.dataclass(frozen=True)
class Run:
  """A whole run; equal values give equal parameters, bit by bit, on one machine."""

  name: str
  model: ModelConfig
  data: Data
  optim: Optim
  loss_weights: tuple[tuple[str, float], ...]
  steps: int  # batches
  save_every: int
  seed: int = 0
  param_dtype: str = "float32"  # or "bfloat16"; moments are float32 in any case
  logits_z_loss: float = 0.0  # weight of the squared log of the softmax's denominator
  loss_chunk: int | None = (
    None  # tokens whose logits exist at once; None: by their size
  )
  start_from: str = ""  # folder of another run, whose parameters this one starts with
  watch_every: int = 10  # steps between two lines of routing.jsonl
  max_skipped: int = 10  # steps in a row whose loss is not finite, before giving up
  prompt: str = ""
  sample_bytes: int = 160

  def __post_init__(self):
    if not self.name.strip():
      raise ValueError(f"name={self.name!r}; give one that can be seen.")
    _at_least("run", self, steps=1, save_every=1, sample_bytes=0)
    _at_least("run", self, watch_every=1, max_skipped=0)
    if self.loss_chunk is not None:
      _at_least("run", self, loss_chunk=1)
    _seed("run", self)
    _number("run", self, "logits_z_loss")
    _one_of("run", self, param_dtype=("float32", "bfloat16"))
    if self.optim.warmup_steps >= self.steps:
      raise ValueError(
        f"optim.warmup_steps={self.optim.warmup_steps} is not less than "
        f"steps={self.steps}; make it smaller."
      )
    _pairs("loss_weights", self.loss_weights)
    known = {loss_name(loss) for ff in sparse_layers(self.model) for loss in ff.losses}
    for name, _ in self.loss_weights:
      if name not in known:
        raise ValueError(
          f"loss_weights names {name!r}, which no layer reports; "
          + (nearest(name, known) if known else "the layers have losses=().")
        )
    for ff in sparse_layers(self.model):
      if (n := batches_of_update(ff.losses)) not in (1, self.optim.accumulate):
        raise ValueError(
          f"load_balance accumulate={n} with optim.accumulate={self.optim.accumulate}; "
          "make them equal, or the loss's 1."
        )
    if self.model.vocab_size < (size := vocabulary.size_of(self.data.tokenizer)):
      raise ValueError(
        f"model.vocab_size={self.model.vocab_size} is less than the {size} tokens of "
        f"data.tokenizer={self.data.tokenizer!r}, a begin and an end of document among "
        f"them; give {size} or more."
      )


def sparse_layers(model: ModelConfig) -> list[MoEConfig]:
  """The sparse layers of a model, one of each place in its segments."""
  layers = [block.ff for blocks, _ in model.segments for block in blocks]
  return [ff for ff in layers if isinstance(ff, MoEConfig)]


def _at_least(where: str, config: Any, **least: int) -> None:
  for name, bound in least.items():
    value = getattr(config, name)
    if isinstance(value, bool) or not isinstance(value, int) or value < bound:
      raise ValueError(f"{where}.{name}={value!r}; give an integer >= {bound}.")


def _seed(where: str, config: Any) -> None:
  """A random key takes 32 bits, and would silently leave out those above."""
  _at_least(where, config, seed=0)
  if config.seed >= 2**32:
    raise ValueError(f"{where}.seed={config.seed}; give an integer under 2**32.")


def _one_of(where: str, config: Any, **allowed: tuple[str, ...]) -> None:
  for name, names in allowed.items():
    if (value := getattr(config, name)) not in names:
      raise ValueError(f"{where}.{name}={value!r}; {nearest(str(value), names)}")


def _pairs(where: str, pairs: Any) -> None:
  for pair in pairs:
    match pair:
      case (str(), int() | float() as weight) if math.isfinite(weight) and weight >= 0:
        continue
    raise ValueError(f"{where} holds {pair!r}; give pairs of a name and a number >= 0.")
  names = [name for name, _ in pairs]
  for name in names:
    if names.count(name) > 1:
      raise ValueError(f"{where} names {name!r} twice; give it one number.")


def _number(where: str, config: Any, names: str) -> None:
  for name in names.split():
    value = getattr(config, name)
    if not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
      raise ValueError(f"{where}.{name}={value!r}; give a number >= 0.")
