"""What all tests of surgery share."""
# SPDX-License-Identifier: Apache-2.0

import pytest

from tests import _cases


@pytest.fixture(autouse=True)
def _compiled_quickly():
  with _cases.quickly():
    yield
