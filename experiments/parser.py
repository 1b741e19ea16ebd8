"""The command line's parser of every command: bad input is one line, exit code 2."""
# SPDX-License-Identifier: Apache-2.0

import argparse
import sys
from typing import NoReturn


class Parser(argparse.ArgumentParser):
  """Without the usage that argparse prints before an error."""

  def error(self, message: str) -> NoReturn:
    print(f"error: {message}; see --help.", file=sys.stderr)
    raise SystemExit(2)
