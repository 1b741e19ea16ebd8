"""What the tests of the training job share; without its extras there are none."""
# SPDX-License-Identifier: Apache-2.0

import functools
import importlib.util

import pytest

_NEEDED = ("optax", "orbax", "tqdm", "grain", "tensorflow_datasets", "array_record")
if not all(map(importlib.util.find_spec, _NEEDED)):
  collect_ignore_glob = ["*_test.py"]


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
  return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def texts(cache):
  """The corpus of `micro`."""
  from experiments import configs, dataset

  return dataset.load(cache, configs.load("micro").data.max_bytes)


@pytest.fixture(scope="session")
def job(texts):
  """`micro` in parts: its run, fresh batches and states, and one compiled step."""
  import jax

  from experiments import configs, data, optim, state as states, step

  class Job:
    run = configs.load("micro")
    blueprint, names = states.blueprint(run.model)
    optimizer = optim.optimizer(run.optim, steps=run.steps, names=names)
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
        )
      )
    )

    @staticmethod
    def batches(seed: int = 0, num_workers: int = 0):
      windows = data.Windows(texts.train, seq=32)
      return data.batches(windows, batch=4, seq=32, seed=seed, num_workers=num_workers)

  return Job
