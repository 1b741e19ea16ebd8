"""What a byte is to Python: the class of its token, and which token it is of.

For `experiments.routes`, which asks whether experts follow the classes.
"""
# SPDX-License-Identifier: Apache-2.0

import ast
import io
import keyword
import tokenize
import warnings
from typing import NamedTuple

import numpy as np

# `space` is all between tokens: ends of lines and indents too.
CLASSES = ("keyword", "name", "number", "string", "comment", "operator", "space")
_SPACE = CLASSES.index("space")
_OF = {
  tokenize.NUMBER: CLASSES.index("number"),
  tokenize.STRING: CLASSES.index("string"),
  tokenize.COMMENT: CLASSES.index("comment"),
  tokenize.OP: CLASSES.index("operator"),
  # From Python 3.12 on what is between the braces of an f-string is code.
  **{
    getattr(tokenize, name): CLASSES.index("string")
    for name in ("FSTRING_START", "FSTRING_MIDDLE", "FSTRING_END")
    if hasattr(tokenize, name)
  },
}


class Lexemes(NamedTuple):
  """Of each byte of a text."""

  kind: np.ndarray  # i8[N] index in `CLASSES`
  number: np.ndarray  # i32[N] of its token, or of the space between two, from 0


def lexemes(text: bytes) -> Lexemes | None:
  """Classes of the standard library's `tokenize`; None if the text is no Python.

  Python is what `ast` parses, and holds more than one statement that is no bare
  expression or string: plain words parse too.
  """
  try:
    source = text.decode()
    with warnings.catch_warnings():
      warnings.simplefilter("ignore")  # of invalid escapes, as old code has
      tree = ast.parse(source)
    found = list(tokenize.generate_tokens(io.StringIO(source).readline))
  except (SyntaxError, ValueError, tokenize.TokenError, RecursionError, MemoryError):
    return None
  if sum(not isinstance(node, ast.Expr) for node in tree.body) < 2:
    return None
  lengths = [len(line) for line in io.StringIO(source)]
  begins = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
  kind_C = np.full(len(source), _SPACE, np.int8)
  number_C = np.zeros(len(source), np.int32)  # 1 where a token begins or has ended
  for token in found:
    is_name = token.type == tokenize.NAME
    if not is_name and token.type not in _OF:
      continue
    row, column = token.start
    first = int(begins[row - 1]) + column
    # Not `token.end`: Python 3.12.1 counts bytes there in strings of several lines.
    end = first + len(token.string)
    word = "keyword" if keyword.iskeyword(token.string) else "name"
    kind_C[first:end] = CLASSES.index(word) if is_name else _OF[token.type]
    number_C[first : first + 1] = number_C[end : end + 1] = 1
  sizes = [len(character.encode()) for character in source]
  number_C = np.cumsum(number_C) - (number_C[0] if len(number_C) else 0)
  return Lexemes(np.repeat(kind_C, sizes), np.repeat(number_C, sizes).astype(np.int32))
