"""What the page says of routes.json and extraction.jsonl with known numbers in them."""
# SPDX-License-Identifier: Apache-2.0

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")

from experiments import report

from .conftest import write, write_lines
from .report_test import Page


def told(labels, text, bits, by_chance, at_most=2.0):
  return dict(labels=labels, text=text, bits=bits, by_chance=by_chance, at_most=at_most)


def layer(name, load):
  """Of four documents, two of each of two domains, and three experts, two a token."""
  return {
    "name": name,
    "load": load,
    "pairs": [[10, 5, 5], [5, 10, 5], [5, 5, 10]],
    "classes": [[1, 2, 3], [3, 2, 1]],
    "information": [
      told("domain", "all", 1.25, 0.25),
      told("class", "Python", 0.5, 0.125, at_most=0.75),
    ],
  }


FOUND = {
  "step": 40,
  "domains": ["code", "verse"],
  "document_domain": [0, 0, 1, 1],
  "classes": ["name", "operator"],
  "layers": [
    layer("layer 0", [[3, 4, 0], [6, 8, 0], [0, 0, 1], [0, 0, 9]]),
    layer("layer 1", [[1, 1, 1], [2, 2, 2], [3, 3, 3], [4, 4, 4]]),
  ],
  "stability": [
    {
      "step": 20,
      "layers": 2
      * [dict(equal=0.5, equal_by_chance=0.25, shared=0.75, shared_by_chance=0.625)],
    }
  ],
}


def case(domain, share, documents, bits, step=40):
  return dict(step=step, domain=domain, share=share, documents=documents, bits=bits)


@pytest.fixture
def shown(runs, tmp_path, capsys):
  """(exit code, page or None, stderr) of a run beside which these files are."""

  def show(routes=None, cases=None):
    run = runs("run")
    if routes is not None:
      write(run / "routes.json", routes)
    if cases is not None:
      write_lines(run / "extraction.jsonl", cases)
    out = tmp_path / "report.html"
    code = report.main([str(run), "--out", str(out)])
    page = Page(out.read_text(encoding="utf-8")) if out.exists() else None
    return code, page, capsys.readouterr().err

  return show


def test_the_page_says_what_was_counted(shown):
  cases = [case("code", 1.0, 0, 2.0), case("code", 0.25, 5, 2.5)]
  cases += [case("code", 0.25, 0, None), case("code", 0.25, 0, 3.0)]
  cases.append(case("old domain", 1.0, 0, 2.0, step=20))
  code, page, err = shown(FOUND, cases)
  assert (code, err) == (0, "")
  for part in (
    "layer 0 1.000 (1.250 − 0.250, 50 %) 0.375 (0.500 − 0.125, 50 %)",
    # Domains, documents of one and of two: first layer apart, second layer alike.
    "layer 0 0.000 1.000 0.000",
    "layer 1 1.000 1.000 1.000",
    "layer 0 50.0 % (chance 25.0 %) 75.0 % (chance 62.5 %)",
    "same experts since step 20",
  ):
    assert part in page.words, part
  for label in ("domain, all text", "class, Python text", ">operator</text>", "25%"):
    assert label in page.source
  assert "Bits per byte against experts kept" in page.words
  assert "old domain" not in page.source
  # Of each layer: classes, domains, documents and pairs.
  titled = [svg for svg in page.svgs if 'aria-label="layer 0"' in svg]
  assert len(titled) == 4
  assert any(">verse</text>" in svg and ">domain</text>" in svg for svg in titled)


def test_maps_show_one_and_zero_and_even_pairs(shown):
  only = FOUND | {"layers": [FOUND["layers"][0] | {"name": "one", "classes": None}]}
  _, page, _ = shown(only | {"stability": []})
  assert "Routes that stay" not in page.words and "Python classes" not in page.words
  titled = [svg for svg in page.svgs if 'aria-label="one"' in svg]
  domains, documents, pairs = (_pixels(svg) for svg in titled)
  assert (domains[0, 0] == domains[1, 1]).all() and (
    domains[0, 1] != domains[0, 0]
  ).any()
  assert (documents[0, 1] == documents[2, 3]).all()
  assert (documents[0, 2] != documents[0, 1]).any()
  assert (pairs[0, 1] == pairs[2, 1]).all()  # all even: one shade
  assert pairs[0, 0, 3] == 0 < pairs[0, 1, 3]  # nothing is drawn on the diagonal


def test_without_the_files_the_page_names_the_command(shown):
  _, page, _ = shown()
  assert "python -m experiments.routes DIR" in page.words
  assert "What experts follow" not in page.words
  assert "against experts kept" not in page.words


@pytest.mark.parametrize(
  ("routes", "cases", "said"),
  [
    ({"layers": []}, None, "delete it and run that again"),
    ([1], None, "routes.json is not a JSON object"),
    (None, [{"step": 3}], "is none that experiments.emo writes"),
  ],
)
def test_files_that_nobody_wrote_are_named_in_one_line(shown, routes, cases, said):
  code, page, err = shown(routes, cases)
  assert (code, page, err.count("\n")) == (2, None, 1)
  assert said in err


def _pixels(svg):
  return Page(svg).map_titled(svg.split('aria-label="')[1].split('"')[0])
