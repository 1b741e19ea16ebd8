"""The order of windows: epochs, temperature, hosts, workers, going on amid an epoch."""
# SPDX-License-Identifier: Apache-2.0

import collections
import itertools
import json
import pickle
import time

import chex
import numpy as np
import pytest

from experiments import configs, data, settings, tokens
from experiments.errors import BadData
from experiments.vocabulary import Bytes

SEQ = 8


def windows_of(*lengths: list[int]) -> data.Windows:
  """A domain for each list of lengths; texts that differ, as far as they can."""
  records = []
  for domain, some in enumerate(lengths):
    for length in some:
      number = len(records)
      text = (f"{domain}{number:03}" + "x" * length)[:length].encode()
      records.append({"text": text, "domain": domain})
  return data.Windows(tokens.encoded(records, Bytes()), seq=SEQ)


@pytest.fixture(scope="module")
def full():
  """64 windows that fill a row each."""
  windows = windows_of([SEQ - 1] * 64)
  assert len(windows) == 64
  return windows


def rows(windows, count: int, **values) -> list[bytes]:
  """The first rows, as the text that they hold."""
  batches = data.batches(windows, batch=4, seq=SEQ, seed=0, **values)
  found = []
  while len(found) < count:
    found += [bytes(row[:4].astype(np.uint8)) for row in next(batches)["targets"]]
  assert len(found) == count
  return found


def test_every_epoch_has_each_window_once_in_an_order_of_its_own(full):
  found = rows(full, 192)
  epochs = [found[n : n + 64] for n in range(0, 192, 64)]
  assert all(len(set(epoch)) == 64 for epoch in epochs)
  assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
  assert {*epochs[0][:16]} != {*epochs[1][:16]}  # not only those that wait for a row
  assert rows(full, 192) == found


def test_two_hosts_share_an_epoch_without_overlap(full):
  first, second = (rows(full, 32, process_index=n, process_count=2) for n in (0, 1))
  assert len({*first}) == len({*second}) == 32
  assert not {*first} & {*second}
  assert {*first, *second} == {*rows(full, 64)}
  batch = next(
    data.batches(full, batch=4, seq=SEQ, seed=0, process_index=1, process_count=2)
  )
  assert batch["inputs"].shape == (2, SEQ)


def test_hosts_share_the_windows_of_each_domain_under_a_temperature():
  windows = windows_of([SEQ - 1] * 32, [SEQ - 1] * 32)
  parts = [
    rows(windows, 32, temperature=2.0, process_index=n, process_count=2) for n in (0, 1)
  ]
  assert not {*parts[0]} & {*parts[1]} and len({*parts[0], *parts[1]}) == 64


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_hosts_share_a_number_of_windows_that_they_do_not_divide(temperature):
  windows = windows_of([SEQ - 1] * 61)
  parts = [
    rows(windows, 64, temperature=temperature, process_index=n, process_count=2)
    for n in (0, 1)
  ]
  # Two hosts take turns; what waits for a row at the end is of the next epoch.
  counts = collections.Counter([*parts[0], *parts[1]])
  assert len(counts) == 61 and set(counts.values()) <= {1, 2, 3}


@pytest.mark.parametrize("count", [1, 2, 3, 61])
def test_few_windows_are_drawn_at_once_and_once_an_epoch(count):
  windows = windows_of([SEQ - 1] * count)
  begin = time.process_time()  # others may use the machine
  order = data._epochs(windows, seed=0)
  epochs = [
    [bytes(order[epoch * count + n]["targets"]) for n in range(count)]
    for epoch in range(2000 // count)
  ]
  assert time.process_time() - begin < 4  # it was up to 24 ms for each
  assert all(len(set(epoch)) == count for epoch in epochs)
  assert count == 1 or len({tuple(epoch) for epoch in epochs}) > 1


@pytest.mark.parametrize("temperature", [1e-6, 0.01, 0.1])
def test_a_temperature_that_leaves_nothing_of_a_domain_is_refused(temperature):
  windows = windows_of([150] * 40, [1], [])
  with np.errstate(over="raise", invalid="raise"), pytest.raises(BadData) as error:
    data.batches(windows, batch=4, seq=SEQ, seed=0, temperature=temperature)
  assert f"data.temperature={temperature} leaves a domain" in str(error.value)


def test_a_very_large_temperature_draws_domains_equally():
  windows = windows_of([150] * 40, [1], [])
  np.testing.assert_allclose(data.shares(windows, 1e308), [0.5, 0.5])


def test_rows_that_hosts_cannot_share_are_refused(full):
  with pytest.raises(ValueError, match="data.batch=4 is not divisible by the 3 proc"):
    data.batches(full, batch=4, seq=SEQ, seed=0, process_count=3)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_tokens_of_domains_come_in_the_shares_of_the_temperature(temperature):
  # Many short documents, few long ones, and a domain number that no document has.
  lengths = ([3] * 200, [], [150] * 40, [30] * 30)
  windows = windows_of(*lengths)
  sizes = np.array([sum(n + 1 for n in some) for some in lengths], np.float64)
  powers = np.where(sizes > 0, sizes ** (1 / temperature), 0)
  expected = powers / powers.sum()
  np.testing.assert_allclose(data.shares(windows, temperature), expected)
  batches = data.batches(windows, batch=8, seq=SEQ, seed=0, temperature=temperature)
  found = np.zeros(4)
  for batch in itertools.islice(batches, 250):
    domains = batch["domain"][batch["segment"] > 0]
    found += np.bincount(domains, minlength=4)
  np.testing.assert_allclose(found / found.sum(), expected, atol=0.01)


def test_a_temperature_of_one_gives_every_window_once_an_epoch():
  windows = windows_of([SEQ - 1] * 48, [SEQ - 1] * 16)
  counts = collections.Counter(rows(windows, 128))
  assert set(counts.values()) == {2} and len(counts) == 64


@pytest.mark.parametrize(
  ("num_workers", "temperature"), [(0, 1.0), (0, 2.0), (1, 2.0), (2, 1.0)]
)
def test_a_position_amid_an_epoch_is_restored(num_workers, temperature):
  windows = windows_of(list(range(1, 60)), list(range(5, 25)))

  def made():
    return data.batches(
      windows,
      batch=2,
      seq=SEQ,
      seed=3,
      num_workers=num_workers,
      temperature=temperature,
    )

  batches = made()
  for _ in range(17):
    next(batches)
  position = json.loads(json.dumps(batches.get_state()))
  expected = [next(batches) for _ in range(5)]
  resumed = made()
  resumed.set_state(position)
  chex.assert_trees_all_equal([next(resumed) for _ in range(5)], expected)


def test_a_prompt_is_read_but_not_scored():
  text = "Frage ü? Antwort".encode()
  prompt = len("Frage ü? ".encode())
  records = [{"text": text, "domain": 0, "unscored": prompt}]
  windows = data.Windows(tokens.encoded(records, Bytes()), seq=64)
  (window,) = [windows[n] for n in range(len(windows))]
  scored = window["targets"][window["scored"] > 0].tolist()
  assert scored == [*b"Antwort", Bytes.eos]
  assert window["inputs"].tolist() == [Bytes.bos, *text]


def test_tokens_go_to_another_process_as_the_name_of_their_files(encoded):
  mapped = encoded.train
  assert isinstance(mapped.tokens, np.memmap) and mapped.tokens.dtype == np.uint16
  sent = pickle.dumps(mapped)
  assert len(sent) < 1000
  chex.assert_trees_all_equal(pickle.loads(sent).tokens, mapped.tokens)


def test_a_domain_gets_the_share_that_is_fixed_and_others_the_rest():
  windows = windows_of([20] * 30, [], [150] * 40, [30] * 30)
  plain = data.shares(windows, 1.0)
  found = data.shares(windows, 1.0, {0: 0.0, 3: 0.25})
  np.testing.assert_allclose(found, [0, 0, 0.75, 0.25])
  found = data.shares(windows, 1.0, {3: 0.0})
  np.testing.assert_allclose(found[:3], plain[:3] / plain[:3].sum())
  np.testing.assert_array_equal(data.shares(windows, 1.0, {2: 1.0}), [0, 0, 1, 0])
  batches = data.batches(windows, batch=8, seq=SEQ, seed=0, fixed={0: 0.0, 3: 0.25})
  found = np.zeros(4)
  for batch in itertools.islice(batches, 150):
    domains = batch["domain"][batch["segment"] > 0]
    found += np.bincount(domains, minlength=4)
  np.testing.assert_allclose(found / found.sum(), [0, 0, 0.75, 0.25], atol=0.02)
  run = configs.load("micro")
  with pytest.raises(ValueError, match="are 1.4 of the tokens; give parts of 1"):
    settings.with_settings(run, ["data.shares=(('code', 0.7), ('prose', 0.7))"])
  for wrong, said in (({1: 0.5}, "no document"), ({0: 0, 2: 0, 3: 0}, "leaves no")):
    with pytest.raises(BadData, match=said):
      data.shares(windows, 1.0, wrong)
