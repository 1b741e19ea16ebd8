"""`experiments.main` with a folder in place of s3://, as several processes see it.

JMOE_TEST_STORE=FOLDER python -m tests.training.main_with_store ...
"""
# SPDX-License-Identifier: Apache-2.0

import os

import pytest
from etils.epath import backend
from fsspec.implementations.local import LocalFileSystem

from experiments import extras, main

SCHEME = "s3://"


class Store(LocalFileSystem):
  """Objects below a folder; none of its folders is made by name, nothing is renamed."""

  protocol = "s3"

  @classmethod
  def _strip_protocol(cls, path):
    name = str(path)
    if name.startswith(SCHEME):
      name = f"{os.environ['JMOE_TEST_STORE']}/{name.removeprefix(SCHEME)}"
    return super()._strip_protocol(name)

  def mkdir(self, path, create_parents=True, **kwargs):
    raise NotImplementedError(path)

  def mv(self, path1, path2, **kwargs):
    raise NotImplementedError(path1)


def patched(patch: pytest.MonkeyPatch) -> None:
  """s3:// is that folder from now on."""
  local, store = backend.fsspec_backend.fs, Store(auto_mkdir=True)

  def fs(path):
    return store if os.fspath(path).startswith(SCHEME) else local(path)

  patch.setattr(backend.fsspec_backend, "fs", fs)
  patch.setattr(extras, "check", lambda *given, **keywords: None)


if __name__ == "__main__":
  patched(pytest.MonkeyPatch())
  raise SystemExit(main.main())
