"""Optional packages: imported where used, named with their remedy if absent."""
# SPDX-License-Identifier: Apache-2.0

import importlib
import importlib.util
from types import ModuleType

_TRAINING = {"orbax.checkpoint": "train", "optax": "train", "grain": "data"}


class MissingExtra(ImportError):
  """A package of an extra is not installed; the message holds the pip line."""


def check_training(needed_by: str) -> None:
  """Raises `MissingExtra` unless runs can be trained and read; see `check`."""
  for module, extra in _TRAINING.items():
    check(module, extra, needed_by=needed_by)


def require(module: str, extra: str, *, needed_by: str) -> ModuleType:
  """The imported module.

  Args:
    module: name to import, for instance "grain".
    extra: the extra of this project that installs it, for instance "data".
    needed_by: who asks, for the message.

  Raises:
    MissingExtra: it is not installed.
  """
  check(module, extra, needed_by=needed_by)
  return importlib.import_module(module)


def check(module: str, extra: str, *, needed_by: str) -> None:
  """Raises `MissingExtra` if a module is not installed, without importing it."""
  try:
    found = importlib.util.find_spec(module)
  except ModuleNotFoundError:  # the package that a submodule would be in
    found = None
  if found is None:
    raise MissingExtra(f"{needed_by} needs {module}; run: pip install 'jmoe[{extra}]'")
