"""Operations of `experiments.surgery` by name: each module here is one.

A module's docstring begins with what `--help` says of it.  It has

  arguments(add)                     its own, by an `ArgumentParser`'s `add_argument`
  operate(source, arguments)         -> `Outcome`

and nothing else has to know of it.
"""
# SPDX-License-Identifier: Apache-2.0

import importlib
from pathlib import Path
from typing import Any


def names() -> list[str]:
  """Names of all operations; nothing is imported."""
  files = Path(__file__).parent.glob("*.py")
  return sorted(file.stem for file in files if not file.stem.startswith("_"))


def load(name: str) -> Any:
  """The module of an operation, whose name is one of `names()`."""
  return importlib.import_module(f"{__name__}.{name}")
