"""One call over all GPUs: its list, its turns, and what it does with what is done."""
# SPDX-License-Identifier: Apache-2.0

import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest

from experiments.benchmarks import mesh_all
from experiments.benchmarks.mesh import __main__ as mesh, layer
from experiments.benchmarks.mesh_all import __main__ as command, compare, together
from experiments.benchmarks.mesh_all.parts import LAYER, SHAPES, parts
from experiments.benchmarks.mesh_all.together import Part
from experiments.benchmarks.mesh_train import __main__ as train

# Asks for its turn after a while, and writes when it had it.
WORKER = """
import os, sys, time
from pathlib import Path
from experiments.benchmarks.turns import turn
name, wait, code, folder = sys.argv[1:5]
(Path(folder) / f"{name}.pid").write_text(str(os.getpid()))
with (Path(folder) / "begun").open("a") as file:
  file.write(name)
time.sleep(float(wait))
with turn(Path(sys.argv[6])):
  begin = time.monotonic()
  time.sleep(0.1)
  with (Path(folder) / "spans").open("a") as file:
    file.write(f"{name} {begin} {time.monotonic()}\\n")
(Path(folder) / f"{name}.json").write_text("{}")
sys.exit(int(code))
"""


@pytest.fixture
def worker(tmp_path, monkeypatch):
  """`(name, seconds until it asks, exit code) -> part`."""
  (tmp_path / "worker.py").write_text(WORKER)
  root = str(Path(mesh_all.__path__[0]).parents[2])
  monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{root}")

  def made(name, wait=0.0, code=0):
    words = ("worker", name, str(wait), str(code), str(tmp_path))
    return Part(name, (*words, "--turn", str(tmp_path / f"{name}.turn")), 5)

  return made


def spans(folder):
  lines = map(str.split, (folder / "spans").read_text().splitlines())
  return [(name, float(begin), float(end)) for name, begin, end in lines]


def test_all_begin_at_once_and_are_measured_in_order(tmp_path, worker):
  asked = [worker("a", 0.5), worker("b", code=3), worker("c"), worker("late", 60)]
  begin = time.monotonic()
  ended = list(
    together.together(asked, tmp_path, at_once=4, patience=1.2, until=begin + 2.5)
  )
  assert [(e.part.name, e.code) for e in ended] == [("a", 0), ("b", 3), ("c", 0)]
  found = spans(tmp_path)
  assert [name for name, *_ in found] == ["a", "b", "c"]
  assert found[0][1] > begin + 1.2  # one was still in compilation, and it is said
  assert [e.beside for e in ended] == [1, 1, 1]
  assert all(one[2] <= other[1] for one, other in zip(found, found[1:]))


def test_few_wait_with_their_memory_and_the_others_begin_again(tmp_path, worker):
  asked = [worker(name) for name in "abcd"]
  most, pids = [], [tmp_path / f"{name}.pid" for name in "abcd"]
  until, ended = time.monotonic() + 30, []
  for one in together.together(
    asked, tmp_path, at_once=3, kept=1, patience=20, until=until
  ):
    ended.append(one)
    alive = [p.stem for p in pids if p.exists() and _runs(int(p.read_text()))]
    most.append(len(alive))
  assert [(e.part.name, e.code, e.beside) for e in ended] == [
    (name, 0, 0) for name in "abcd"
  ]
  assert [name for name, *_ in spans(tmp_path)] == list("abcd")
  begun = (tmp_path / "begun").read_text()
  assert [begun.count(name) for name in "abcd"] == [1, 2, 2, 2]
  assert max(most) <= 1  # after the first of them has ended, when all have compiled


def _runs(pid):
  try:
    os.kill(pid, 0)
  except ProcessLookupError:
    return False
  return True


def test_what_is_done_is_not_done_again(tmp_path, worker, monkeypatch, capsys):
  listed = [worker("a"), worker("b", code=1)]
  monkeypatch.setattr(command, "parts", lambda *_, **__: listed)
  words = ["--gpus", "2", "--out", str(tmp_path)]
  assert command.main(words) == 4
  assert "b              ended with 1" in capsys.readouterr().out
  listed[1] = worker("b")  # another command: what it gave before does not count
  assert command.main(words) == 0
  said = capsys.readouterr().out
  assert "done before: a" in said and "2 of 2 done" in said
  assert [name for name, *_ in spans(tmp_path)] == ["a", "b", "b"]
  # Figures that are gone, of a line that a kill cut off or not, are made again.
  (tmp_path / "a.json").unlink()
  with (tmp_path / compare.FILE).open("a") as file:
    file.write('{"part": "b", "co')
  assert set(command.finished(tmp_path, listed)) == {"b"}


def test_an_end_from_outside_takes_the_children_along(tmp_path, worker, monkeypatch):
  monkeypatch.setattr(command, "parts", lambda *_, **__: [worker("long", 60)])
  before = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGHUP)}
  pid = tmp_path / "long.pid"

  def kill():
    while not pid.exists() or not pid.read_text():
      time.sleep(0.05)
    os.kill(os.getpid(), signal.SIGTERM)

  threading.Thread(target=kill).start()
  try:
    with pytest.raises(SystemExit) as ended:
      command.main(["--gpus", "2", "--out", str(tmp_path)])
  finally:
    for number, handler in before.items():
      signal.signal(number, handler)
  assert ended.value.code == 128 + signal.SIGTERM
  with pytest.raises(ProcessLookupError):
    os.kill(int(pid.read_text()), 0)


@pytest.mark.parametrize("gpus", [2, 4, 8])
def test_every_command_of_the_list_is_understood(gpus, tmp_path):
  found = parts(gpus, tmp_path, liger_site=tmp_path)
  names = [part.name for part in found]
  for shape in SHAPES:
    assert {f"each-{shape}", f"all-{shape}", f"liger-{shape}"} <= set(names)
  assert {"qwen3-fsdp", "qwen3-apart", "olmoe-expert", "checkpoint"} <= set(names)
  large = next(part for part in found if part.name == "qwen3-fsdp")
  layers = train.parser().parse_args(large.words[1:]).layers
  assert layers == {2: 12, 4: 24, 8: None}[gpus]  # as many on a GPU
  without = [part for part in found if not part.name.startswith("liger")]
  assert sum(part.seconds for part in without) < 545  # beside compilation
  for part in found:
    if part.words[0] == LAYER:
      asked = mesh.parser().parse_args(part.words[1:])
      assert asked.gpus == gpus and asked.shape in layer.SHAPES
      assert asked.turn == tmp_path / f"{part.name}.turn"


@pytest.mark.parametrize("gpus", [4, 8])
def test_what_was_planned_is_what_would_be_planned_now(gpus):
  from experiments.benchmarks.mesh_all import planned
  from experiments.planning import topology

  kept = json.loads(compare.PLANNED.with_name(f"mesh_{gpus}_h200.json").read_text())
  assert "PREDICTED" in kept["what"]
  chips = topology.parse(kept["chips"])
  listed = {part.name: part for part in parts(gpus, Path("DIR"))}
  for name in ("links", "qwen3-fsdp", "all-dsv3"):
    now = planned.of_part(listed[name].words, chips)
    assert json.loads(json.dumps(now)) == kept["parts"][name]


def test_figures_that_are_off_are_told(capsys):
  planned = {"chips": "gpu:2xH200", "parts": {}}
  row = {"gpus": 2, "routing": "skewed", "tokens": 8, "name": "x", "share_of_one": 0.8}
  planned["parts"]["each-qwen3"] = {"layers": [row | {"ms": 10.0}]}
  step = {"model": "m", "mesh": {"fsdp": 2}, "ms": 5.0, "gb": 100.0}
  step |= {"tflops_per_gpu": 300.0, "share_of_ceiling": 0.4, "tokens_per_s": 1e5}
  planned["parts"]["qwen3-fsdp"] = {"training": [step]}
  group = {k: row[k] for k in ("gpus", "routing", "tokens")}
  took = {"name": "x", "devices": 2, "step_ms": [11.0, 12.0, 11.0], "share_of_one": 0.7}
  gb = {"peak_of_each": [111.0, 90.0]}
  measured = {
    "each-qwen3": {"device": "H200", "groups": [group | {"rows": [took]}]},
    "qwen3-fsdp": {"device": "H200", "step": step | {"ms": [5.5], "gb": gb}},
  }
  pairs = list(compare.paired(planned, measured))
  assert [(p.kind, p.agrees) for p in pairs] == [
    ("time", True), ("time", True), ("memory", False)
  ]  # fmt: skip
  compare.show(planned, measured)
  said = capsys.readouterr().out
  assert "time: 2 of 2 within 15%" in said and "memory: 0 of 1 within 10%" in said
  assert "planned 0.800 by x; measured 0.700 by x" in said


@pytest.mark.parametrize(
  "words, said",
  [
    ("--gpus 6 --out DIR", "--gpus 6: give a power of two"),
    ("--parts each-qwen4 --out DIR", "--parts each-qwen4: use some of links"),
    ("--gpus 8", "--out DIR is missing"),
  ],
)
def test_bad_arguments_are_refused_in_one_line(words, said, capsys):
  with pytest.raises(SystemExit) as ended:
    command.main(words.split())
  assert ended.value.code == 2
  assert said in capsys.readouterr().err
