"""The ends of every command: bad input in one line, Ctrl-C, a reader that has gone."""
# SPDX-License-Identifier: Apache-2.0

import argparse
import os
import sys
from collections.abc import Callable
from typing import NoReturn


class Parser(argparse.ArgumentParser):
  """Without the usage that argparse prints before an error."""

  def error(self, message: str) -> NoReturn:
    print(f"error: {message}; see --help.", file=sys.stderr)
    raise SystemExit(2)


def seed(text: str) -> int:
  """A whole number of at least 0, for `type=`."""
  if not text.isdecimal():
    raise argparse.ArgumentTypeError(f"{text!r} is not a whole number >= 0")
  return int(text)


def run(main: Callable[[], int]) -> NoReturn:
  """Exits with the code of a command, with 130 at Ctrl-C before it minds one.

  What is slow to import is imported by commands, and so is interrupted here.
  """
  try:
    code = main()
    sys.stdout.flush()
  except KeyboardInterrupt:
    print("\nstopped.", file=sys.stderr)
    code = 130
  except BrokenPipeError:  # as of `| head`; Python would flush once more at its end
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    code = 141
  sys.exit(code)
