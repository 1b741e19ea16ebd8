"""Runs by name: each module here has `run() -> Run` and says what to expect of it."""
# SPDX-License-Identifier: Apache-2.0

import importlib
from pathlib import Path
from typing import Any


def names() -> list[str]:
  """Names of all runs; nothing is imported."""
  files = Path(__file__).parent.glob("*.py")
  return sorted(file.stem for file in files if not file.stem.startswith("_"))


def load(name: str) -> Any:
  """The `Run` of this name, which is one of `names()`."""
  return importlib.import_module(f"{__name__}.{name}").run()
