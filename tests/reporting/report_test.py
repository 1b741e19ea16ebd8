"""The page: what it shows, that it needs nothing, and that no name breaks it."""
# SPDX-License-Identifier: Apache-2.0

import base64
import html.parser
import importlib.util
import io
import json
import re
from xml.etree import ElementTree

import numpy as np
import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")

from experiments import report

from .conftest import DOMAINS, write, write_lines

VOID = {"meta", "br", "link", "img", "hr", "input"}
MOST = 3_000_000  # bytes


class Page(html.parser.HTMLParser):
  """Text, tables and pictures of a page; fails at a tag that is not closed."""

  def __init__(self, source: str):
    super().__init__()
    self.source, self.open, self.tags, self.text = source, [], [], []
    self.attributes: list[tuple[str, str | None]] = []
    self.feed(source)
    assert self.open == []
    self.svgs = re.findall(r"<svg.*?</svg>", source, re.DOTALL)
    self.words = " ".join(" ".join(self.text).split())

  def handle_starttag(self, tag, attrs):
    self.tags.append(tag)
    self.attributes += attrs
    if tag not in VOID:
      self.open.append(tag)

  def handle_startendtag(self, tag, attrs):
    self.tags.append(tag)
    self.attributes += attrs

  def handle_endtag(self, tag):
    assert self.open.pop() == tag

  def handle_data(self, data):
    if self.open and self.open[-1] not in ("style",):
      self.text.append(data)

  def map_titled(self, title: str) -> np.ndarray:
    """f64[R,C,4] pixels of a map."""
    from PIL import Image

    (svg,) = [svg for svg in self.svgs if f'aria-label="{title}"' in svg]
    data = re.search(r"base64,([^\"]*)", svg)
    image = Image.open(io.BytesIO(base64.b64decode(data[1])))
    return np.asarray(image.convert("RGBA"), float)


def outcome(capsys, *arguments) -> tuple[int, str, str]:
  try:
    code = report.main([str(a) for a in arguments])
  except SystemExit as stop:
    code = stop.code
  shown = capsys.readouterr()
  return code, shown.out, shown.err


@pytest.fixture
def page(tmp_path, capsys):
  """Makes the page of some runs, and checks what holds of every page."""

  def make(*folders) -> Page:
    out = tmp_path / "report.html"
    code, printed, said = outcome(capsys, *folders, "--out", out)
    assert (code, said) == (0, ""), said
    assert str(out) in printed
    source = out.read_text(encoding="utf-8")
    assert len(source.encode()) < MOST
    found = Page(source)
    for svg in found.svgs:
      ElementTree.fromstring(svg)
    # Nothing is fetched and nothing runs: namespaces are names, not addresses.
    assert "script" not in found.tags and "link" not in found.tags
    for name, value in found.attributes:
      assert not name.startswith("on")
      if not name.startswith("xmlns"):
        assert "://" not in (value or ""), (name, value)
      if name.endswith(("src", "href")):
        assert (value or "").startswith(("data:", "#")), (name, value)
    assert "@import" not in source
    return found

  return make


def test_runs_of_different_shapes_stand_beside_each_other(runs, page):
  sparse = runs("sparse", name="sparse", experts=(4, 8), dead=1)
  wide = runs("wide", name="wide", experts=(16, 8, 4), settings=["optim.clip=3"])
  dense = runs("dense", name="dense", experts=(), end_bits=2.25)
  found = page(sparse, wide, dense)
  for part in (
    "sparse 40 steps",  # the legend
    "Bits per byte on held-out text",
    "code 2.500 2.500 2.250 3.000",  # by domain, and gzip
    "all 2.500 2.500 2.250 3.000",
    "dead experts 3 0 0",  # alarms
    "Runs without sparse layers are not shown",
    "Choices dropped",
    "capacity",
    "restriction",
    "Entropy",
    "blocks.0.ff 1 (3) 0",  # dead at the end, and who
    "blocks.1.ff 1 (7) 0",
    "blocks.2.ff – 0",  # a layer that one run has
    "Mutual information",
    "parameters 123k 123k 123k",
    "wide : optim.clip: 1.0 there, 3.0 here",
    "python -m experiments.main --config micro",
  ):
    assert part in found.words, part
  assert "<td class=best>2.250" in found.source
  # Ticks of the axis of tokens a second, which ends a little over 1000.
  assert ">800</text>" in found.source and ">1k</text>" in found.source


def test_the_mutual_information_is_that_of_the_evaluation(runs, page):
  run = runs("run", experts=(6,))
  load = np.array(
    json.loads((run / "evaluation.json").read_text())["layers"][0]["load"]
  )
  p = load / load.sum()
  even = p.sum(0, keepdims=True) * p.sum(1, keepdims=True)
  bits = (p * np.log2(p / even)).sum()
  words = page(run).words
  assert bits > 0.4 and f"blocks.0.ff: {bits:.3f} bits" in words
  assert f"blocks.0.ff {bits:.3f} ({100 * bits / np.log2(3):.0f} %; by" in words
  chance = (3 - 1) * (6 - 1) / (2 * load.sum()) / np.log(2)
  assert f"by chance {chance:.1g})" in words


def test_maps_show_dead_even_and_busy_experts(runs, page):
  run = runs("run", experts=(4,))
  layer = {"name": "blocks.0.ff", "entropy": 1.0, "dropped": {}}
  write_lines(
    run / "routing.jsonl",
    [
      {"step": step, "layers": [layer | {"load": load}]}
      for step, load in enumerate(([10, 10, 10, 10], [30, 10, 0, 0]), 1)
    ],
  )
  found = page(run)
  even, skewed = np.moveaxis(found.map_titled("blocks.0.ff"), 1, 0)
  red, blue = 0, 2
  assert np.ptp(even, axis=0).max() == 0 and abs(even[0, red] - even[0, blue]) < 5
  assert skewed[0, red] > skewed[0, blue] + 50  # three times an even load
  assert (skewed[1] == even[0]).all()
  assert (skewed[2] == skewed[3]).all() and skewed[2, blue] > skewed[2, red] + 50
  dead = found.words.partition("Dead at the end")[2]
  assert "blocks.0.ff 0 Which text" in dead  # both steps together


def test_a_run_still_going_on_has_a_page(runs, page):
  run = runs("run", name="young", finished=False, settings=["steps=90"])
  for name in ("metrics.jsonl", "routing.jsonl"):
    with (run / name).open("a") as file:
      file.write('{"step": 41, "layers": [{"na')
  found = page(run)
  for part in (
    "at step 40 of 90, not finished",
    "No run has been evaluated yet",
    "Over training",
  ):
    assert part in found.words
  assert "Which text goes" not in found.words


def test_a_run_that_has_just_begun_or_is_dense_has_a_page(runs, page):
  begun = runs("begun", finished=False)
  for name in ("metrics.jsonl", "routing.jsonl"):
    (begun / name).unlink()
  found = page(begun)
  assert "No step is listed yet" in found.words
  dense = runs("dense", name="dense", experts=())
  found = page(dense)
  assert "No sparse layer has been watched" in found.words
  assert "Dead experts" not in found.words


def test_losses_and_loads_that_are_not_numbers_are_left_out(runs, page):
  run = runs("run", finished=False)
  lines = [json.loads(line) for line in (run / "metrics.jsonl").open()]
  for line in lines[10:12]:
    line |= {"loss": float("nan"), "bits_per_byte": float("inf"), "skipped": 1}
  write_lines(run / "metrics.jsonl", lines)
  lines = [json.loads(line) for line in (run / "routing.jsonl").open()]
  lines[2]["layers"][0] |= {"entropy": float("nan"), "load": [0, 0, 0, 0]}
  write_lines(run / "routing.jsonl", lines)
  assert "steps skipped, their loss not finite 2" in page(run).words


def test_the_best_of_different_texts_is_not_marked(runs, page):
  folders = [runs("a", name="a", end_bits=2.0), runs("b", name="b")]
  said = "The runs have different texts"
  assert said not in page(*folders).words
  assert page(*folders).source.count("class=best") == len(DOMAINS) + 1
  summary = json.loads((folders[1] / "summary.json").read_text())
  summary["data"]["digest"] = "another"
  (folders[1] / "summary.json").write_text(json.dumps(summary))
  found = page(*folders)
  assert said in found.words and "class=best" not in found.source


def test_no_name_becomes_markup(runs, page):
  name = "<script>alert('x')</script> & \"$\\frac{$ --> ü"
  run = runs("run", name=name)
  for file, old in (
    ("routing.jsonl", "blocks.0.ff"),
    ("evaluation.json", "verse"),
    ("routing.jsonl", "capacity"),
  ):
    text = (run / file).read_text()
    (run / file).write_text(text.replace(json.dumps(old), json.dumps(name)))
  summary = json.loads((run / "summary.json").read_text())
  summary |= {"alarms": {name: 1}, "command": [name], "policy": {name: name}}
  (run / "summary.json").write_text(json.dumps(summary))
  found = page(run)  # in which no script is a tag
  assert found.words.count("alert('x')") >= 10


def test_equal_runs_give_equal_bytes(runs, tmp_path, capsys):
  run = runs("run")
  pages = []
  for name in ("one.html", "two.html"):
    outcome(capsys, run, "--out", tmp_path / name)
    pages.append((tmp_path / name).read_bytes())
  assert pages[0] == pages[1]


def test_large_runs_fit_on_a_page(runs, page):
  folders = [
    runs(f"run-{seed}", seed=seed, experts=(256,) * 24, steps=1500) for seed in range(2)
  ]
  found = page(*folders)  # which looks at the size
  pictures = re.findall(r"base64,([^\"]*)", found.source)
  assert len(pictures) == 2 * (1 + 24 + 24)
  heads = [base64.b64decode(text)[16:24] for text in pictures]
  pixels = sum(int.from_bytes(h[:4]) * int.from_bytes(h[4:]) for h in heads)
  assert pixels < 1_200_000 < 2 * 24 * 256 * (1500 // 5)  # fewer than loads


def test_bad_input_is_one_line_and_leaves_no_page(runs, tmp_path, capsys):
  run = runs("run")
  out = tmp_path / "report.html"
  for arguments, said in (
    ([run], "--out"),
    ([tmp_path / "none", "--out", out], "none: no such folder"),
    ([tmp_path, "--out", out], "holds no run"),
    ([run, "--out", tmp_path / "no" / "r.html"], "there is no folder"),
    ([run, "--out", tmp_path], "is a folder; give a file"),
    ([run, "--out", "hf://a/b.html"], "--out hf://a/b.html: unknown scheme"),
  ):
    code, printed, err = outcome(capsys, *arguments)
    assert (code, printed, err.count("\n")) == (2, "", 1), err
    assert said in err and not out.exists()


@pytest.mark.parametrize(
  ("file", "change"),
  [
    ("config.json", {"data": 3}),
    ("summary.json", {"flops": {"trained": "many"}}),
    ("summary.json", {"alarms": [1]}),
    ("summary.json", {"baselines": {"gzip": {"all": "3"}}}),
    ("summary.json", {"tokens_per_second": "fast"}),
  ],
)
def test_files_that_no_run_writes_are_named(runs, tmp_path, capsys, file, change):
  run = runs("run")
  write(run / file, json.loads((run / file).read_text()) | change)
  code, printed, err = outcome(capsys, run, "--out", tmp_path / "report.html")
  assert (code, printed, err.count("\n")) == (2, "", 1), err
  assert f"{run / file}: '" in err and "which no run writes" in err


def test_one_norm_among_others_that_are_no_numbers_is_a_dot(runs, page):
  run = runs("run", steps=12)
  lines = [json.loads(line) for line in (run / "metrics.jsonl").open()]
  dots = []
  for first in (None, 2.0):
    norms = [first, *[None] * 11]
    some = [x | {"gradient_norm": y} for x, y in zip(lines, norms, strict=True)]
    write_lines(run / "metrics.jsonl", some)
    found = re.findall(r"<use [^>]*style=\"fill: #0072b2", page(run).source)
    dots.append(len(found))
  assert dots[1] == dots[0] + 1


def test_norms_that_are_all_zero_have_a_page(runs, page):
  run = runs("run")
  lines = [json.loads(line) for line in (run / "metrics.jsonl").open()]
  lines = [line | {"gradient_norm": 0.0} for line in lines]
  write_lines(run / "metrics.jsonl", lines)
  page(run)


@pytest.mark.parametrize("module", ["matplotlib", "jinja2"])
def test_a_missing_extra_is_named_with_its_pip_line(
  module, runs, tmp_path, capsys, monkeypatch
):
  find = importlib.util.find_spec
  monkeypatch.setattr(
    importlib.util, "find_spec", lambda name: None if name == module else find(name)
  )
  code, _, err = outcome(capsys, runs("run"), "--out", tmp_path / "report.html")
  assert code == 2
  line = f"experiments.report needs {module}; run: pip install 'jmoe[viz]'"
  assert line in err and err.count("\n") == 1


def test_every_domain_is_a_row_of_the_map(runs, page):
  found = page(runs("run", experts=(4,)))
  (svg,) = [svg for svg in found.svgs if 'aria-label="blocks.0.ff: ' in svg]
  for domain in DOMAINS:
    assert f">{domain}</text>" in svg
