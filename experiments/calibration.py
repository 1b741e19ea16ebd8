"""Some documents of a domain, as rows on which experts are scored."""
# SPDX-License-Identifier: Apache-2.0

import numpy as np

from experiments import data
from experiments.errors import BadData
from experiments.tokens import Encoded, Tokens
from jmoe.surgery import Sample
from jmoe.use import nearest


def number(domains: tuple[str, ...], name: str, argument: str = "--domain") -> int:
  """Of a domain by its name.

  Raises:
    BadData: there is none of this name.
  """
  if name not in domains:
    raise BadData(f"{argument} {name!r}; {nearest(name, domains)}")
  return domains.index(name)


def drawn(some: Tokens, domain: int, *, seed: int) -> np.ndarray:
  """i64[n] numbers of a domain's documents, in an order drawn from the seed."""
  (own,) = np.nonzero(np.asarray(some.domain) == domain)
  bits = np.random.PCG64([seed, domain]).random_raw(len(own))
  return own[np.argsort(bits, kind="stable")]


def part(some: Tokens, numbers: np.ndarray) -> Tokens:
  """The documents of these numbers, in this order."""
  begins = np.concatenate([[0], some.ends[:-1]])
  pieces = [some.tokens[begins[n] : some.ends[n]] for n in numbers]
  ends = np.cumsum([len(piece) for piece in pieces], dtype=np.int64)
  return Tokens(
    np.concatenate(pieces), ends, some.domain[numbers], some.unscored[numbers]
  )


def available(encoded: Encoded, domain: int) -> int:
  """How many training documents a domain has."""
  return int(np.count_nonzero(np.asarray(encoded.train.domain) == domain))


def check(encoded: Encoded, domain: int, count: int) -> None:
  """Whether a domain has as many training documents.

  Raises:
    BadData: it has fewer.
  """
  if (found := available(encoded, domain)) < count:
    remedy = "give as many or fewer" if found else "name another domain"
    raise BadData(
      f"--documents {count}: domain {encoded.domains[domain]!r} has {found} in "
      f"training; {remedy}."
    )


def documents(encoded: Encoded, domain: int, count: int, *, seed: int) -> Tokens:
  """Training documents of a domain, drawn from the seed; fewer are part of more.

  Raises:
    BadData: the domain has not as many.
  """
  check(encoded, domain, count)
  return part(encoded.train, drawn(encoded.train, domain, seed=seed)[:count])


def samples(
  encoded: Encoded, domain: int, count: int, *, seed: int, batch: int, seq: int
) -> list[Sample]:
  """Training documents of a domain, packed; the last batch is filled with padding.

  Args:
    encoded: the data set.
    domain: its number.
    count: of documents.
    seed: which ones.
    batch: rows.
    seq: tokens of a row.

  Raises:
    BadData: the domain has not as many.
  """
  windows = data.Windows(documents(encoded, domain, count, seed=seed), seq=seq)
  packed = data.one_pass(windows, batch=batch, seq=seq)
  return [Sample(b["inputs"], b["segment"], b["position"]) for b in packed]
