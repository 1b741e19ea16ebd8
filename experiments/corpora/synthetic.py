"""A mixture of languages whose ideal specialisation is known.

Each domain is a language with eight letters of its own, of which any may follow any,
all equally likely.  So all that there is to know of a text is its language: after the
first letter the best prediction is the same for every letter of a domain, and costs
`LETTER_NATS`.  Domains are equally large, and an expert that serves one of them alone
says which it is: with no fewer experts than domains, the mutual information of domain
and expert is at most `IDEAL_NATS`, and is that when no expert serves two.
"""
# SPDX-License-Identifier: Apache-2.0

import math
import string
from collections.abc import Iterator

import numpy as np

from experiments.corpora.types import Document, Found, Sized

ARGUMENT, OPTIONS = "", ()

NUM_DOMAINS = 4
IDEAL_NATS = math.log(NUM_DOMAINS)  # of domain and expert, a token
LETTERS = 8  # of a domain
LETTER_NATS = math.log(LETTERS)
_LENGTH = 256  # letters of a document
_DOCUMENTS = 4096  # of a domain at most


def state(argument: str) -> str:
  """Nothing that could change."""
  del argument
  return ""


def found(argument: str, *, max_bytes: int) -> Found:
  """Documents that are the same on every machine; a megabyte a domain at most."""
  del argument, max_bytes
  domains = [f"language-{n}" for n in range(NUM_DOMAINS)]
  facts = {"ideal_nats": IDEAL_NATS, "letter_nats": LETTER_NATS}
  return Found(
    {name: Sized(_DOCUMENTS, _documents(n, name)) for n, name in enumerate(domains)},
    facts,
  )


def _documents(domain: int, name: str) -> Iterator[Document]:
  first = domain * LETTERS
  letters = np.array(list(string.ascii_letters[first : first + LETTERS]))
  for number in range(_DOCUMENTS):
    # Raw bits are the same in every version of NumPy; draws need not be.
    bits = np.random.PCG64([domain, number]).random_raw(_LENGTH)
    places = (bits >> np.uint64(61)).astype(np.int64)  # the three highest bits
    yield Document(name, str(number), "".join(letters[places]))
