"""The names that `--strategy` takes."""
# SPDX-License-Identifier: Apache-2.0

import pytest

from experiments import strategies
from experiments.errors import BadConfig
from jmoe import dispatch, use


@pytest.mark.parametrize(
  "name, expected",
  [
    ("gather", None),
    ("einsum", use(dispatch.einsum)),
    ("all_gather+own_first", use(dispatch.all_gather, own_first=True)),
    ("all_to_all+overlap=2", use(dispatch.all_to_all, overlap=2)),
    ("hierarchical+overlap=4", use(dispatch.hierarchical, overlap=4)),
  ],
)
def test_a_name_is_what_carries_rows_with_its_keywords(name, expected):
  found = strategies.carrier(name)
  assert found == expected
  if found is not None:
    assert strategies.name_of(found) == name


@pytest.mark.parametrize(
  "name, said",
  [
    ("all_to_al", "unknown; did you mean 'all_to_all'"),
    ("all_gather+overlap=2", "all_gather does not send in chunks; use all_to_all+over"),
    ("all_to_all+overlap=0", "give a number of chunks, as in all_to_all+overlap=2"),
    ("all_to_all+overlap=two", "give a number of chunks, as in all_to_all+overlap=2"),
    ("all_to_all+own_first+overlap=2", "does not send in chunks"),
  ],
)
def test_another_name_is_one_line(name, said):
  with pytest.raises(BadConfig) as error:
    strategies.carrier(name)
  text = str(error.value)
  assert text.startswith(f"--strategy {name}: ") and said in text
