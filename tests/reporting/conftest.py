"""Folders of runs as the training job leaves them, written instead of trained."""
# SPDX-License-Identifier: Apache-2.0

import dataclasses
import importlib.util
import json

import numpy as np
import pytest

# What `experiments` cannot be imported without; one file asks for `viz` itself.
_NEEDED = ("optax", "orbax", "tqdm", "grain", "tensorflow_datasets", "array_record")
if not all(map(importlib.util.find_spec, _NEEDED)):
  collect_ignore_glob = ["*_test.py"]

DOMAINS = ("code", "news", "verse")


def write_run(
  folder,
  *,
  name="sparse",
  seed=0,
  settings=(),
  steps=40,
  experts=(4, 8),
  bits=lambda step: 2 + 6 * step**-0.5,
  end_bits=2.5,
  finished=True,
  flops_of_a_step=1e9,
  dead=0,
):
  """A folder of a run; `experts` has the number of experts of each sparse layer.

  The last `dead` experts of each layer get nothing; domain d prefers the experts whose
  number is d modulo 3.
  """
  from experiments import configs
  from experiments.settings import with_settings
  from jmoe.use import to_jsonable

  rng = np.random.default_rng(seed)
  run = with_settings(configs.load("micro"), [f"seed={seed}", *settings])
  folder.mkdir(parents=True)
  write(folder / "config.json", to_jsonable(dataclasses.replace(run, name=name)))
  lines = []
  for step in range(1, steps + 1):
    line = {
      "step": step,
      "loss": bits(step) * 0.7,
      "bits_per_byte": bits(step),
      "gradient_norm": 1 + 1 / step,
      "tokens_per_second": 1000.0 + seed,
      "skipped": 0,
    }
    if experts:
      line |= {"skew": 1.5, "dropped": 0.1, "entropy": 1.0}
    lines.append(line)
  write_lines(folder / "metrics.jsonl", lines)
  if experts:
    watched = []
    for step in range(1, steps + 1, 5):
      layers = []
      for n, number in enumerate(experts):
        live = number - dead
        load = np.zeros(number, int)
        load[:live] = rng.multinomial(256, np.ones(live) / live)
        layers.append(
          {
            "name": f"blocks.{n}.ff",
            "load": load.tolist(),
            "entropy": 1 - step / 100,
            "dropped": {"capacity": 0.3 / step, "restriction": 0.0},
          }
        )
      watched.append({"step": step, "layers": layers})
    write_lines(folder / "routing.jsonl", watched)
  else:
    write_lines(folder / "routing.jsonl", [])
  if not finished:
    return folder
  found = {d: end_bits + 0.1 * n for n, d in enumerate(DOMAINS)} | {"all": end_bits}
  layers = []
  for n, number in enumerate(experts):
    load = np.full((len(DOMAINS), number), 10)
    for d in range(len(DOMAINS)):
      load[d, d::3] = 100
    load[:, number - dead :] = 0
    layers.append({"name": f"blocks.{n}.ff", "load": load.tolist()})
  write(
    folder / "evaluation.json",
    {"bits_per_byte": found, "layers": layers, "domains": list(DOMAINS)},
  )
  write(
    folder / "summary.json",
    {
      "name": name,
      "finished": True,
      "steps": steps,
      "seed": seed,
      "bits_per_byte": found,
      "baselines": {"gzip -9": dict.fromkeys(found, 3.0)},
      "parameters": {"total": 123_456, "active": 65_432},
      "flops": {"per_token": 1e6, "trained": flops_of_a_step * steps},
      "seconds": 12.5,
      "tokens_per_second": 1000.0 + seed,
      "skipped_steps": 0,
      "alarms": {"dead experts": 3} if dead else {},
      "policy": {"parameters": "float32", "optimizer": "adamw"},
      "digests": {"gate": "abc"},
      "data": {"corpus": "embedded", "digest": "0123456789abcdef"},
      "versions": {"python": "3.11", "jax": "0.10.2"},
      "hardware": {"backend": "cpu", "devices": 1},
      "command": ["python", "-m", "experiments.main", "--config", "micro"],
    },
  )
  return folder


def write(path, value):
  path.write_text(json.dumps(value))


def write_lines(path, lines):
  path.write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def runs(tmp_path):
  """Writes runs below one folder."""

  def write_below(where, **kwargs):
    return write_run(tmp_path / where, **kwargs)

  return write_below
