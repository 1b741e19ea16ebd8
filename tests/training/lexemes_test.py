"""Classes of bytes are those of Python's own tokens."""
# SPDX-License-Identifier: Apache-2.0

import numpy as np

from experiments.lexemes import CLASSES, lexemes

# Parts of a text and their classes, one after the other.
PARTS = (
  ("# ü", "comment"),
  ("\n", "space"),
  ("import", "keyword"),
  (" ", "space"),
  ("ös", "name"),
  ("\n", "space"),
  ("def", "keyword"),
  (" ", "space"),
  ("f", "name"),
  ("(", "operator"),
  (")", "operator"),
  (":", "operator"),
  ("\n  ", "space"),
  ('"""a\nü"""', "string"),
  ("\n  ", "space"),
  ("return", "keyword"),
  (" ", "space"),
  ("x", "name"),
  ("+", "operator"),
  ("0x_1", "number"),
  ("\n", "space"),
)


def test_bytes_have_the_class_and_number_of_their_part():
  text = "".join(part for part, _ in PARTS).encode()
  kinds, numbers = [], []
  for number, (part, kind) in enumerate(PARTS):
    kinds += [CLASSES.index(kind)] * len(part.encode())
    numbers += [number] * len(part.encode())
  found = lexemes(text)
  assert found is not None
  np.testing.assert_array_equal(found.kind, kinds)
  np.testing.assert_array_equal(found.number, numbers)


def test_what_is_no_python_has_no_classes():
  for text in (
    b"",
    b"Words that parse as nothing.",
    b"word\nanother\n",  # expressions alone
    b"x = 1\n",  # too little to tell
    b"x = (\ny = 1\n",
    b"\xff\xfe",
  ):
    assert lexemes(text) is None
  assert lexemes(b"x = '\\d'\ny = 1\n") is not None  # without a warning
