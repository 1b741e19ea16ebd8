"""The file of a measurement, and the command that it keeps."""
# SPDX-License-Identifier: Apache-2.0

import argparse
import json
import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any


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


def saved(path: Path, found: Any) -> None:
  """Writes figures, which are whole there however the process ends."""
  path.parent.mkdir(parents=True, exist_ok=True)
  unfinished = path.with_name(path.name + ".unfinished")
  unfinished.write_text(json.dumps(found, indent=1) + "\n")
  os.replace(unfinished, path)
