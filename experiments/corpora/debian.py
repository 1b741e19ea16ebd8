"""Files of Debian packages, downloaded and unpacked in a folder; none is installed."""
# SPDX-License-Identifier: Apache-2.0

import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from experiments.errors import BadData

_TOOLS = ("apt-cache", "apt-get", "dpkg-deb")
_NEEDED = "the handbook corpus is made of Debian packages"
_REMEDY = (
  "build it on Debian or Ubuntu with `python -m experiments.corpora handbook --out "
  "handbook.jsonl.xz` and give packed:handbook.jsonl.xz here"
)


class Unpacked(NamedTuple):
  """A package in a folder of its own."""

  name: str
  version: str
  root: Path


def resolve(patterns: Sequence[str]) -> tuple[dict[str, str], list[str]]:
  """The packages of this release that names or patterns mean.

  Args:
    patterns: regular expressions of whole names; where one has groups, as in
      `linux-doc-([0-9]+).([0-9]+)`, the package with the largest numbers is meant.

  Returns:
    (pattern -> name, the patterns that fit no package of the release).

  Raises:
    BadData: no apt here, or it knows no packages at all.
  """
  for tool in _TOOLS:
    if shutil.which(tool) is None:
      raise BadData(f"{_NEEDED}, and there is no {tool} here; {_REMEDY}.")
  known = _output("apt-cache", "pkgnames").split()
  found = {}
  for pattern in patterns:
    fits = [m for name in known if (m := re.fullmatch(pattern, name))]
    fits.sort(key=lambda m: [int(part) for part in m.groups()])
    names = [m.string for m in fits if _output("apt-cache", "show", m.string)]
    if names:
      found[pattern] = names[-1]
  if not found:
    raise BadData(f"{_NEEDED}, and apt knows none of them; run apt-get update.")
  return found, [pattern for pattern in patterns if pattern not in found]


def fetch(names: Sequence[str], folder: Path) -> dict[str, Unpacked]:
  """Packages by name, downloaded and unpacked below a folder.

  Raises:
    BadData: the download failed, or a package is broken.
  """
  command = ["apt-get", "download", *names]
  done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
  if done.returncode:
    why = [line for line in done.stderr.splitlines() if line.startswith("E:")]
    last = (why or [f"exit code {done.returncode}"])[0].removeprefix("E: ")
    raise BadData(
      f"apt-get download failed ({last}); run apt-get update, or {_REMEDY}."
    )
  unpacked = {}
  for file in sorted(folder.glob("*.deb")):
    name, version = _output(
      "dpkg-deb", "-W", "--showformat=${Package} ${Version}", file
    ).split()
    root = folder / name
    _output("dpkg-deb", "-x", file, root)
    file.unlink()  # half of the room that a build takes
    unpacked[name] = Unpacked(name, version, root)
  return unpacked


def warn(text: str) -> None:
  """One line on stderr."""
  print(f"warning: {text}", file=sys.stderr)


def _output(*command: str | Path) -> str:
  done = subprocess.run([*map(str, command)], capture_output=True, text=True)
  if done.returncode and command[0] != "apt-cache":  # it fails where there is no such
    raise BadData(f"{command[0]} failed: {done.stderr.strip().splitlines()[-1:]}")
  return done.stdout
