"""Builds the notebooks from the percent scripts beside this file.

python colab/build.py            writes NAME.ipynb for each NAME.py
python colab/build.py --check    exit code 1, with the names, if one is stale
"""
# SPDX-License-Identifier: Apache-2.0

import argparse
import pathlib
import sys

import jupytext
import nbformat

_HERE = pathlib.Path(__file__).parent


def scripts() -> list[pathlib.Path]:
  """The percent scripts, in order."""
  return sorted(_HERE.glob("[0-9]*.py"))


def notebook(script: pathlib.Path) -> str:
  """The text of a notebook without outputs; equal scripts give equal text."""
  made = jupytext.reads(script.read_text(encoding="utf-8"), fmt="py:percent")
  made.metadata = {
    "kernelspec": made.metadata["kernelspec"],
    "language_info": {"name": "python"},
    "colab": {"provenance": [], "toc_visible": True},
  }
  for number, cell in enumerate(made.cells):
    cell["id"] = f"cell-{number:02}"  # else drawn anew each time
    cell.metadata = {}
  return nbformat.writes(made, version=4) + "\n"


def stale() -> list[str]:
  """Names of notebooks that are missing or not what their script says."""
  found = []
  for script in scripts():
    built = script.with_suffix(".ipynb")
    if not built.exists() or built.read_text(encoding="utf-8") != notebook(script):
      found.append(built.name)
  return found


def main(argv: list[str] | None = None) -> int:
  parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
  parser.add_argument("--check", action="store_true", help="write nothing")
  if parser.parse_args(argv).check:
    if names := stale():
      print(f"stale: {', '.join(names)}; run python colab/build.py.", file=sys.stderr)
      return 1
    return 0
  for script in scripts():
    script.with_suffix(".ipynb").write_text(notebook(script), encoding="utf-8")
  return 0


if __name__ == "__main__":
  sys.exit(main())
