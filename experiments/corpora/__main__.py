"""Packs a corpus into one file: `python -m experiments.corpora handbook --out FILE`.

The file is read by the corpus `packed:FILE`, on machines that lack what it was made
of.  Any corpus can be packed.  Exit codes: 0 written, 2 bad input or nothing to pack,
130 stopped by Ctrl-C.
"""
# SPDX-License-Identifier: Apache-2.0

import argparse
import time
import urllib.parse
from collections.abc import Sequence
from pathlib import Path

from experiments import corpora
from experiments.corpora import Document, packed
from experiments.corpora.manifest import manifest
from experiments.errors import BadData
from experiments.parser import Parser, ended, run
from jmoe.use import nearest

_ALL = 1 << 62  # bytes of a domain


def main(argv: list[str] | None = None) -> int:
  """Runs a command line; returns its exit code."""
  parser = Parser(
    prog="python -m experiments.corpora",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  add = parser.add_argument
  add("corpus", help=f"KIND or KIND:ARGUMENT; kinds: {', '.join(corpora.KINDS)}")
  add("--out", required=True, type=Path, help="FILE.jsonl.xz or FILE.jsonl.gz")
  add("--max-bytes", type=_size, default=_ALL, metavar="N", help="of a domain at most")
  add(
    "--near-duplicates",
    type=_similarity,
    default=0.0,
    metavar="SIMILARITY",
    help="leave out documents so similar to one kept, for instance 0.8",
  )
  add("--domains", help="to pack, separated by commas; all if not given")
  add("--encoding", help="of the files of a folder, if it is not UTF-8")
  arguments = parser.parse_args(argv)
  said = f"stopped; {arguments.out} was not written."
  return ended(lambda: _packed(arguments), stopped=said)


def _packed(arguments: argparse.Namespace) -> None:
  out, name = arguments.out, arguments.corpus
  if out.suffix not in packed.SUFFIXES:
    raise BadData(f"--out {out}: the suffix says how to pack; end it in .xz or .gz.")
  if not out.parent.is_dir():
    raise BadData(f"--out {out}: there is no folder {out.parent}; make it.")
  if arguments.encoding is not None:
    value = urllib.parse.quote(arguments.encoding)
    name += f"{'&' if '?' in name else '?'}encoding={value}"
  start = time.perf_counter()
  chosen = corpora.Choice(name, arguments.max_bytes, arguments.near_duplicates)
  documents, facts = corpora.chosen(chosen)
  if arguments.domains:
    documents = _of_domains(documents, arguments.domains.split(","))
  if not documents:
    left_out = {why: some for why, some in facts["dropped"].items() if some}
    why = f" that can be taken; left out: {left_out}" if left_out else ""
    raise BadData(f"corpus {name} has no documents{why}; nothing was written.")
  about = manifest(corpora.split(documents), facts, chosen)
  try:
    packed.write(out, documents, about)
  except OSError as error:
    raise BadData(
      f"--out {out}: cannot be written ({error.strerror}); give another place."
    ) from error
  print(f"{'domain':<16}{'documents':>10}{'MB':>9}{'held out':>10}")
  for domain, sides in about["domains"].items():
    size = sum(side["bytes"] for side in sides.values()) / 1e6
    held_out = sides["held_out"]["documents"]
    count = sides["train"]["documents"] + held_out
    print(f"{domain:<16}{count:>10}{size:>9.2f}{held_out:>10}")
  print(
    f"{out}: {out.stat().st_size / 1e6:.1f} MB, digest {about['digest'][:16]}, "
    f"{time.perf_counter() - start:.0f} s"
  )


def _of_domains(documents: Sequence[Document], names: list[str]) -> list[Document]:
  known = {doc.domain for doc in documents}
  for name in names:
    if name not in known:
      raise BadData(f"--domains {name}: no such domain; {nearest(name, known)}")
  return [doc for doc in documents if doc.domain in names]


def _size(text: str) -> int:
  if not text.isdecimal() or int(text) == 0:
    raise argparse.ArgumentTypeError(f"{text!r}; give a number of bytes over 0")
  return int(text)


def _similarity(text: str) -> float:
  try:
    value = float(text)
  except ValueError:
    value = -1.0
  if not 0 <= value <= 1:
    raise argparse.ArgumentTypeError(f"{text!r} is a similarity; give one of 0 to 1")
  return value


if __name__ == "__main__":
  run(main)
