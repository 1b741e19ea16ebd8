"""Held-out bits per byte against experts kept: does a model live in parts of itself?

  python -m experiments.emo runs/emo/*/seed-*

For every run, domain and share of the experts, the experts are chosen layer by layer
from 1, 5 and 50 training documents of the domain, and at random; the model is cut down
to them and reads the domain's held-out text (EMO, arXiv 2605.06663).  Each case is kept
in DIR/extraction.jsonl: the same command goes on where it was stopped.

The table has means over domains, then over the seeds of an arm.  `lost` is what a
quarter of the experts loses against the whole model, `of` how much that is of what
the arm --against loses; `alike` is the mean cosine between domains' use of experts.

Exit codes: 0 done, 2 bad input, 130 stopped by Ctrl-C, 143 by SIGTERM.
"""
# SPDX-License-Identifier: Apache-2.0

import argparse
import json
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments import extras
from experiments.parser import Parser, ended, run, seed


def main(argv: list[str] | None = None) -> int:
  """Runs a command line; returns its exit code."""
  parser = Parser(
    prog="python -m experiments.emo",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  add = parser.add_argument
  add("workdirs", nargs="+", metavar="DIR", help="of runs; local")
  add("--keep", default="1,0.5,0.25,0.125", type=_shares, help="shares of the experts")
  add("--documents", default="1,5,50", type=_counts, help="for calibration")
  add("--draws", default=3, type=int, help="random choices of experts; 3 if not given")
  add("--domains", help="separated by commas; all if not given")
  add("--most", type=_bytes, help="of held-out text of a domain; all if not given")
  add("--results", type=Path, help="folder of claims; none are written if not given")
  add("--name", default="emo", help="of the claims; emo if not given")
  add("--plot", type=Path, metavar="FILE", help="bits by domain: .svg, .png or .pdf")
  add("--against", help="name of the arm that others are compared with")
  add("--json", action="store_true", help="print JSON, not a table")
  add("--seed", default=0, type=seed, help="of the documents that are drawn")
  add("--cache", type=Path, metavar="DIR", default=Path.home() / ".cache" / "jmoe")
  arguments = parser.parse_args(argv)
  return ended(lambda: _run(arguments, argv or sys.argv[1:]))


def _run(arguments: argparse.Namespace, argv: Sequence[str]) -> None:
  extras.check_training("experiments.emo")
  if arguments.plot is not None:
    extras.check("matplotlib", "viz", needed_by="--plot")
  found = _measured(arguments)
  lines = table(found, against=arguments.against)
  if arguments.plot is not None:
    from experiments.reporting.extraction import draw

    draw(found, arguments.plot)
  if arguments.results is not None:
    _claim(found, arguments, argv)
  print(json.dumps(found, indent=2) if arguments.json else "\n".join(lines))


def _measured(arguments: argparse.Namespace) -> list[dict[str, Any]]:
  """A record for each run: arm, seed, how alike domains are, and its cases."""
  import jax

  from experiments import extraction, workdir
  from experiments.operations._source import Source
  from experiments.signals import Stop

  if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    jax.config.update("jax_compilation_cache_dir", str(arguments.cache / "compiled"))
  records = []
  with Stop() as stop:
    for name in arguments.workdirs:
      folder = workdir.opened(name, "DIR")
      if not workdir.is_local(folder):
        raise ValueError(f"{folder} is not local; bring it here first.")
      source = Source(folder, arguments.cache)
      domains = source.texts.domains
      if arguments.domains:
        domains = tuple(arguments.domains.split(","))
      wanted = list(
        extraction.cases(
          domains,
          shares=arguments.keep,
          documents=arguments.documents,
          draws=arguments.draws,
        )
      )
      work = extraction.Extraction(source, seed=arguments.seed, most=arguments.most)
      print(
        f"{folder}: {source.run.name}, seed {source.run.seed}, "
        f"{len(set(wanted) - set(work.done))} of {len(wanted)} cases to do",
        file=sys.stderr,
      )
      bits = work.measure(wanted, stop)
      records.append(
        {
          "arm": source.run.name,
          "seed": source.run.seed,
          "alike": extraction.similarity(folder),
          "cases": [{**case._asdict(), "bits": x} for case, x in bits.items()],
        }
      )
  return records


def _claim(
  found: Sequence[Mapping[str, Any]], arguments: argparse.Namespace, argv: Sequence[str]
) -> None:
  """Appends to FOLDER/NAME-kept-SHARE-from-DOCUMENTS.json, as `experiments.series`."""
  from experiments import results, workdir
  from experiments.summary import hardware, versions

  command = shlex.join(["python", "-m", "experiments.emo", *argv])
  for name, record in zip(arguments.workdirs, found, strict=True):
    folder = workdir.opened(name, "DIR")
    summary = json.loads((folder / "summary.json").read_text())
    config = json.loads((folder / "config.json").read_text())
    del config["seed"], config["data"]["seed"]
    config["data"]["digest"] = summary["data"]["digest"]
    (cells,) = means([record]).values()
    for (documents, share), bits in cells.items():
      how = f"chosen from {documents} documents" if documents else "chosen at random"
      what = "all experts" if share == 1 else f"{share:.4g} of the experts, {how}"
      end = "" if share == 1 else f"-from-{documents or 'random'}"
      results.append(
        arguments.results / f"{arguments.name}-kept-{100 * share:.4g}{end}.json",
        claim=f"held-out text with {what}, mean over domains",
        unit="bits per byte",
        against=arguments.against,
        arm=record["arm"],
        seed=record["seed"],
        value=bits,
        command=command,
        config=config,
        versions=versions(),
        hardware=hardware(),
      )


def means(found: Sequence[Mapping[str, Any]]) -> dict[str, dict[tuple, float]]:
  """Arm -> (documents, share) -> bits per byte: over draws, domains, then seeds."""
  arms: dict[str, dict[tuple, dict[int, dict[str, list[float]]]]] = {}
  for record in found:
    for case in record["cases"]:
      at = (case["documents"], case["share"])
      seeds = arms.setdefault(record["arm"], {}).setdefault(at, {})
      by_domain = seeds.setdefault(record["seed"], {})
      by_domain.setdefault(case["domain"], []).append(case["bits"])
  return {
    arm: {
      at: _mean([_mean([_mean(x) for x in ds.values()]) for ds in seeds.values()])
      for at, seeds in cells.items()
    }
    for arm, cells in arms.items()
  }


def table(found: Sequence[Mapping[str, Any]], *, against: str | None) -> list[str]:
  """The lines of the table.

  Raises:
    ValueError: no such arm to compare with.
  """
  arms = means(found)
  if against is not None and against not in arms:
    raise ValueError(f"--against {against} is not among the runs' arms, {list(arms)}.")
  known = {at for cells in arms.values() for at in cells}
  shares = sorted({share for _, share in known}, reverse=True)
  rows = sorted({n for n, share in known if share != 1})
  width = max(12, *(len(arm) + 2 for arm in arms))
  heads = "".join(f"{share:>9.4g}" for share in shares)
  lines = [f"{'bits per byte':<{width}}{'documents':>10}{heads}{'lost':>9}{'of':>7}"]
  for arm, cells in arms.items():
    for n in [*[n for n in rows if n], *[n for n in rows if not n]]:
      each = [cells.get((0 if share == 1 else n, share)) for share in shares]
      shown = "".join(f"{'':>9}" if x is None else f"{x:>9.4f}" for x in each)
      lost, base = _lost(cells, n), _lost(arms.get(against or "", {}), n)
      part = "" if lost is None or not base else f"{lost / base:.2f}"
      gap = "" if lost is None else f"{lost:.4f}"
      label = n or "random"
      lines.append(f"{arm:<{width}}{label:>10}{shown}{gap:>9}{part:>7}")
  for arm in arms:
    alike = [r["alike"] for r in found if r["arm"] == arm and r["alike"] is not None]
    if alike:
      lines.append(f"{arm}: domains' use of experts is alike by {_mean(alike):.3f}")
  return lines


def _lost(cells: Mapping[tuple, float], documents: int) -> float | None:
  """What a quarter of the experts loses."""
  whole, quarter = cells.get((0, 1.0)), cells.get((documents, 0.25))
  return None if whole is None or quarter is None else quarter - whole


def _mean(values: Sequence[float]) -> float:
  return sum(values) / len(values)


def _shares(text: str) -> tuple[float, ...]:
  try:
    found = tuple(float(part) for part in text.split(","))
  except ValueError:
    found = (0.0,)
  if not all(0 < share <= 1 for share in found):
    raise argparse.ArgumentTypeError(f"{text!r} are not shares over 0, up to 1")
  return found


def _bytes(text: str) -> int:
  if not text.isdecimal() or not int(text):
    raise argparse.ArgumentTypeError(f"{text!r} is no number of bytes, as 131072")
  return int(text)


def _counts(text: str) -> tuple[int, ...]:
  parts = text.split(",")
  if not all(part.isdecimal() and int(part) for part in parts):
    raise argparse.ArgumentTypeError(f"{text!r} are not numbers of documents, as 1,5")
  return tuple(map(int, parts))


if __name__ == "__main__":
  run(main)
