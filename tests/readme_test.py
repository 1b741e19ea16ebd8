"""The README keeps its word: its examples run, its table and links are complete."""
# SPDX-License-Identifier: Apache-2.0

import doctest
import pathlib
import re

import jax
import pytest

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
SECTIONS = re.split(r"^(?=##+ )", README, flags=re.MULTILINE)


def examples(section: str) -> str:
  """The doctest blocks of a section, joined: later ones see earlier names."""
  blocks = re.findall(r"^```python\n(.*?)^```", section, re.DOTALL | re.MULTILINE)
  return "\n".join(block for block in blocks if ">>>" in block)


WITH_EXAMPLES = {s.splitlines()[0].lstrip("# "): s for s in SECTIONS if examples(s)}


@pytest.mark.contract
@pytest.mark.parametrize("title", WITH_EXAMPLES)
def test_examples_of_each_section_run(title):
  code = examples(WITH_EXAMPLES[title])
  test = doctest.DocTestParser().get_doctest(code, {}, f"README: {title}", None, 0)
  report: list[str] = []
  with jax.numpy_dtype_promotion("standard"):  # as a reader has it; optax needs it
    doctest.DocTestRunner(optionflags=FLAGS).run(test, out=report.append)
  assert not report, "".join(report)


def test_there_are_examples_for_both_shells_and_the_pure_functions():
  code = "\n".join(map(examples, SECTIONS))
  for name in ("jmoe.nnx.MoE(", "jmoe.linen.MoE(", "jmoe.moe(", "nnx.Optimizer("):
    assert name in code
  assert "TrainState" in code


def test_each_preset_has_a_row_and_each_row_a_preset():
  modules = {path.stem for path in (ROOT / "jmoe" / "presets").glob("*.py")}
  rows = set(re.findall(r"^\|.*?\]\(jmoe/presets/(\w+)\.py\)", README, re.MULTILINE))
  assert rows == {name for name in modules if not name.startswith("_")}


PAGES = [
  "README.md",
  "CONTRIBUTING.md",
  "docs/flow.md",
  "docs/decisions.md",
  "docs/planning.md",
]


@pytest.mark.parametrize("page", PAGES)
def test_linked_files_exist(page):
  path = ROOT / page
  for target in re.findall(r"\]\((?!https?:)([^)#]+)", path.read_text()):
    assert (path.parent / target).exists(), f"{page} links to {target}"


def test_each_test_of_the_table_of_faults_exists():
  page = (ROOT / "CONTRIBUTING.md").read_text()
  named = re.findall(r"`([\w/]+\.py): (test_\w+)` \|$", page, re.MULTILINE)
  faults = page.partition("| --- | --- | --- |\n")[2].strip().splitlines()
  assert len(named) == len(faults) > 20
  for path, name in named:
    assert re.search(rf"^ *def {name}\(", (ROOT / "tests" / path).read_text(), re.M), (
      name
    )
  for path in re.findall(r"\| `([\w/]+\.py)` \|", page):
    assert (ROOT / "jmoe" / path).exists(), path


@pytest.mark.parametrize("name", ["main", "test"])
def test_commands_are_one_line_that_sets_itself_up(name):
  found = re.search(rf"<!-- command: {name} -->\n```bash\n(.*?)```", README, re.DOTALL)
  assert found, f"README.md has no <!-- command: {name} --> block"
  (line,) = found.group(1).splitlines()
  assert line.startswith("python3 -m venv .venv && .venv/bin/pip install")
