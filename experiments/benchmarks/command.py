"""The command of a measurement, as its file of figures keeps it."""
# SPDX-License-Identifier: Apache-2.0

import argparse
import shlex
from collections.abc import Sequence


def command(module: str, words: Sequence[str], *, without: Sequence[str]) -> str:
  """`python -m MODULE WORDS` for a shell, less options that name files of a machine.

  Args:
    module: that was run.
    words: its arguments, which its own parser has taken.
    without: options with one value each, which change no figure.

  >>> command("a.b", ["--out", "c", "--names", "d e"], without=["--out"])
  "python -m a.b --names 'd e'"
  """
  parser = argparse.ArgumentParser(add_help=False)
  for option in without:
    parser.add_argument(option)
  _, kept = parser.parse_known_args(list(words))
  return shlex.join(["python", "-m", module, *kept])
