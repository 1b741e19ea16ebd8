"""What the tests of the training job share; without its extras there are none."""
# SPDX-License-Identifier: Apache-2.0

import functools
import importlib.util

import pytest

_NEEDED = ("optax", "orbax", "tqdm", "grain", "tensorflow_datasets", "array_record")
if not all(map(importlib.util.find_spec, _NEEDED)):
  collect_ignore_glob = ["*_test.py"]

# Compile time is what these tests cost: half of it goes with these two.
QUICK = {
  "xla_backend_optimization_level": 0,
  "xla_llvm_disable_expensive_passes": True,
}


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
  return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def texts(cache):
  """The corpus of `micro`."""
  from experiments import configs, dataset

  return dataset.load(cache, configs.load("micro").data)


@pytest.fixture(scope="session")
def encoded(cache, texts):
  """The same as bytes."""
  from experiments import tokens
  from experiments.vocabulary import Bytes

  return tokens.load(cache, texts, Bytes())


@pytest.fixture(scope="session")
def job(encoded):
  """`micro` in parts: its run, fresh batches and states, and one compiled step."""
  import jax

  from experiments import configs, data, optim, state as states, step

  class Job:
    run = configs.load("micro")
    blueprint, shapes = states.blueprint(run.model)
    optimizer = optim.optimizer(run.optim, steps=run.steps, params=shapes)
    init = functools.partial(states.init_state, config=run.model, optimizer=optimizer)
    # Static methods, or they would be bound to the class.
    init = staticmethod(functools.partial(init, jax.random.key_data(jax.random.key(0))))
    train_step = staticmethod(
      jax.jit(
        functools.partial(
          step.train_step,
          blueprint=blueprint,
          optimizer=optimizer,
          loss_weights=run.loss_weights,
        ),
        compiler_options=QUICK,
      )
    )

    @staticmethod
    def batches(seed: int = 0, num_workers: int = 0):
      windows = data.Windows(encoded.train, seq=32)
      return data.batches(windows, batch=4, seq=32, seed=seed, num_workers=num_workers)

  return Job


@pytest.fixture(scope="session")
def trained(job, texts, encoded, tmp_path_factory):
  """A folder like that of a run of `micro`, with a checkpoint of its first state."""
  from etils import epath

  from experiments import checkpoint, opening, workdir

  folder = epath.Path(tmp_path_factory.mktemp("runs") / "micro")
  workdir.claim(job.run, folder)
  saved = checkpoint.Checkpoints(
    folder / "checkpoints", opening.facts(job.run, texts, encoded)
  )
  saved.save(job.init(), opening.training_batches(job.run, encoded))
  saved.close()
  return folder
