"""Every example in a docstring does what it shows."""
# SPDX-License-Identifier: Apache-2.0

import doctest
import importlib
import pkgutil

import pytest

import jmoe

pytestmark = pytest.mark.contract

FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
MODULES = [jmoe.__name__] + [
  found.name for found in pkgutil.walk_packages(jmoe.__path__, "jmoe.")
]


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples_run(name):
  module = importlib.import_module(name)
  failures, _ = doctest.testmod(module, optionflags=FLAGS)
  assert failures == 0
