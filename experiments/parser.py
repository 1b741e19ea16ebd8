"""The ends of every command: bad input in one line, Ctrl-C, a reader that has gone."""
# SPDX-License-Identifier: Apache-2.0

import argparse
import os
import re
import sys
from collections.abc import Callable
from typing import Any, NoReturn

from experiments.errors import Diverged, Stopped
from experiments.extras import MissingExtra


class Parser(argparse.ArgumentParser):
  """Without the usage that argparse prints before an error."""

  def __init__(self, *args: Any, **given: Any):
    super().__init__(*args, **given)
    # Python before 3.14 takes -1e9 for an option.
    self._negative_number_matcher = re.compile(r"-\.?\d")

  def error(self, message: str) -> NoReturn:
    print(f"error: {message}; see --help.", file=sys.stderr)
    raise SystemExit(2)


def ended(
  work: Callable[[], int | None],
  *,
  bad: tuple[type[Exception], ...] = (ValueError, OSError),
  stopped: str | Callable[[], str] = "stopped; the same command goes on from there.",
) -> int:
  """The exit code of a command's work, with a line on stderr if it was cut short.

  1 for a loss that was no number too often; 2 for bad input; 130 for Ctrl-C; that of
  the signal for `Stopped`.

  Args:
    work: gives a code, or None for 0.
    bad: what a user can set right, beside an extra that is missing.
    stopped: what Ctrl-C says, or gives it then.
  """
  try:
    return work() or 0
  except BrokenPipeError:  # of `run`
    raise
  except Diverged as error:
    print(f"error: {error}", file=sys.stderr)
    return 1
  except (*bad, MissingExtra) as error:
    print(f"error: {error}", file=sys.stderr)
    return 2
  except Stopped as error:
    print(f"\n{error}", file=sys.stderr)
    return error.exit_code
  except KeyboardInterrupt:
    said = stopped if isinstance(stopped, str) else stopped()
    print(f"\n{said}", file=sys.stderr)
    return 130


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
