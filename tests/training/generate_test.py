"""Text from a run: what is drawn, on what it depends, and what the command refuses."""
# SPDX-License-Identifier: Apache-2.0

import dataclasses
import functools
import json
import shutil

import hypothesis
import hypothesis.strategies as st
import jax
import numpy as np
import pytest

from experiments import errors, generate, recorded, sample
from experiments.checkpoint import Checkpoints
from experiments.drawing import draw, nucleus
from experiments.vocabulary import Bytes
from experiments.workdir import claim
from jmoe.config import simple
from tests.training.checkpoint_test import biggest, flip
from tests.training.conftest import QUICK

SIZE = 1024  # probabilities are multiples of its inverse, so that sums are exact


def nucleus_by_hand(probability_V, p) -> list[bool]:
  """Takes the likeliest that is left, until p is reached."""
  taken, held = [False] * len(probability_V), 0.0
  while not any(taken) or held < p:
    left = [v for v, was in enumerate(taken) if not was]
    best = max(left, key=lambda v: (probability_V[v], -v))
    taken[best] = True
    held += probability_V[best]
  return taken


@st.composite
def cases(pick) -> tuple[np.ndarray, float]:
  """f64[7] probabilities with many ties and zeros, and p, often the sum of some."""
  step = pick(st.sampled_from([1, 64, 128]))
  whole = st.integers(0, SIZE // step)
  bounds = sorted(step * n for n in pick(st.lists(whole, min_size=6, max_size=6)))
  p = step * pick(st.integers(1, SIZE // step - 1))
  return np.diff([0, *bounds, SIZE]) / SIZE, p / SIZE


@hypothesis.given(cases())
@hypothesis.settings(max_examples=60)
def test_a_nucleus_is_that_of_the_definition(case):
  probability_V, p = case
  found_1V = nucleus(np.float32(probability_V)[None], np.float32(p))
  assert found_1V[0].tolist() == nucleus_by_hand(probability_V, p)


def test_ties_go_to_the_lower_id_and_with_p_of_one_all_tokens_are_in():
  even_1V = np.full((1, 10), 0.1, np.float32)  # whose sums are not exact
  assert nucleus(even_1V, np.float32(0.25))[0].tolist() == [True] * 3 + [False] * 7
  # Rounded up, these hold more than one before the last of them.
  many_1V = np.float32([[0.6, 0.4000001, 1e-9]])
  assert nucleus(many_1V, np.float32(1))[0].tolist() == [True] * 3
  assert nucleus(many_1V, np.float32(1e-6))[0].tolist() == [True, False, False]


def drawn(logits_V, **values) -> np.ndarray:
  """[V] how often each token is drawn, of 4000."""
  key_B = jax.random.split(jax.random.key(1), 4000)
  logits_BV = np.broadcast_to(np.float32(logits_V), (4000, len(logits_V)))
  values = {name: np.float32(value) for name, value in values.items()}
  token_B = jax.jit(draw)(logits_BV, key_B, **values)
  return np.bincount(token_B, minlength=len(logits_V))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_come_in_the_shares_of_the_nucleus_under_the_temperature(temperature):
  logits_V = np.array([1.0, -2.0, 0.5, -np.inf, 1.5, 0.0])
  probability_V = np.exp(logits_V / temperature)
  probability_V /= probability_V.sum()
  inside_V = np.array(nucleus_by_hand(probability_V, 0.8))
  expected_V = np.where(inside_V, probability_V, 0) / probability_V[inside_V].sum()
  found_V = drawn(logits_V, temperature=temperature, top_p=0.8)
  assert not found_V[~inside_V].any() and 2 <= inside_V.sum() < 5
  np.testing.assert_allclose(found_V / 4000, expected_V, atol=0.03)  # 4 deviations


def test_a_temperature_of_zero_takes_the_highest_as_do_the_smallest_ones():
  logits_V = [0.5, 3.0, 3.0, -np.inf, 0, 0]
  assert drawn(logits_V, temperature=0, top_p=0.5).tolist() == [0, 4000, 0, 0, 0, 0]
  found_V = drawn(logits_V, temperature=1e-30, top_p=1)
  assert found_V[1] > 1500 and found_V[2] > 1500 and found_V.sum() == 4000
  assert not found_V[[0, 3, 4, 5]].any()


class Ids(Bytes):
  """Texts that tell the tokens of untrained models, which are seldom UTF-8."""

  def decode(self, tokens) -> str:
    return "".join(map(chr, tokens))


TRACED: list[str] = []


@pytest.fixture(scope="module", autouse=True)
def quick():
  """The same program, compiled with less care and its traces counted."""
  whole = sample._continued

  @functools.wraps(whole.__wrapped__)
  def counted(*args, **kwargs):
    TRACED.append("continued")
    return whole.__wrapped__(*args, **kwargs)

  static = ("blueprint", "num_new")
  sample._continued = jax.jit(counted, static_argnames=static, compiler_options=QUICK)
  yield
  sample._continued = whole


@pytest.fixture(scope="module")
def model(job):
  """A function that makes texts of `micro`, by parameters that like many tokens."""
  random = np.random.default_rng(0)
  shapes = {name: x.shape for name, x in job.init().params.items()}
  params = {
    name: random.normal(size=shape).astype(np.float32) * (1 if len(shape) < 3 else 0.5)
    for name, shape in shapes.items()
  }
  return functools.partial(
    sample.texts,
    params,
    job.init().balance,
    model=job.run.model,
    vocabulary=Ids(),
    tokens=12,
  )


PROMPTS = ["def ", "", "import numpy as np\n\n\n", "ü"]


@pytest.fixture(scope="module")
def greedy(model):
  """[[id]] of each prompt."""
  texts = model(PROMPTS, temperature=0)
  assert [text.prompt for text in texts] == PROMPTS
  assert not any(text.ended for text in texts) and {t.tokens for t in texts} == {12}
  return [[ord(c) for c in text.text] for text in texts]


def by_whole_passes(job, params, balance, prompt: str, tokens: int) -> list[int]:
  """Greedy tokens, each from a pass over all of the text."""
  text = Ids().encode(prompt.encode())[:-1].tolist()
  found = []
  for _ in range(tokens):
    row = np.zeros((1, 48), np.int32)
    row[0, : len(text)] = text
    segment_BS = (np.arange(48) < len(text)).astype(np.int32)[None]
    logits_V = np.array(whole(job.blueprint, params, balance, row, segment_BS))
    logits_V = logits_V[0, len(text) - 1]
    logits_V[Ids.bos] = -np.inf
    found.append(int(logits_V.argmax()))
    text.append(found[-1])
  return found


@functools.partial(jax.jit, static_argnums=0, compiler_options=QUICK)
def whole(blueprint, params, balance, tokens_BS, segment_BS):
  return blueprint.model(params, balance)(tokens_BS, segment_BS)[0]


def test_a_greedy_text_is_that_of_whole_passes(job, model, greedy):
  found = [by_whole_passes(job, *model.args, prompt, 12) for prompt in PROMPTS]
  assert greedy == found and len({*sum(found, [])}) > 5


def test_a_text_does_not_depend_on_those_beside_it(model):
  texts = model(PROMPTS, temperature=1.0)
  others = model(["a", "", "b" * 19, "ü"], temperature=1.0)
  assert texts[1::2] == others[1::2] and texts[0].text != others[0].text
  longer = model(["a" * 40, *PROMPTS[1:]], temperature=1.0)  # more padding for all
  assert longer[1:] == texts[1:]
  assert model(PROMPTS, temperature=1.0, seed=1)[1] != texts[1]
  alike = model(["x", "x", "x", "y" * 20], temperature=1.0)[:3]
  assert len({text.text for text in alike}) == 3


def test_no_other_prompt_or_setting_compiles_anew(model):
  sample._continued.clear_cache()
  model(PROMPTS)
  TRACED.clear()
  model(["y" * 16, "z", "", "a"], temperature=0.3, top_p=0.5, seed=3)
  model(["y" * 31, "z", "", "a"], temperature=0)
  assert not TRACED
  # Up to 16 tokens, the begin of the document among them, have a program of their own.
  model(["y" * 15, "z", "", "a"])
  model([""] * 4)
  assert len(TRACED) == 1


def test_prompts_beyond_one_batch_get_texts_of_their_own(model, greedy, monkeypatch):
  monkeypatch.setattr(sample, "_ROWS", 4)
  more = model([*PROMPTS, PROMPTS[2], PROMPTS[0]], temperature=0)
  found = [[ord(c) for c in text.text] for text in more]
  assert found == [*greedy, greedy[2], greedy[0]]
  alike = model([PROMPTS[2]] * 6, temperature=1.0)
  assert len({text.text for text in alike}) == 6


def test_a_row_ends_with_its_document_and_the_others_go_on(model, greedy, monkeypatch):
  counts = {t: sum(t in row for row in greedy) for row in greedy for t in row}
  end = next(t for t, count in counts.items() if 0 < count < len(greedy))

  class Ending(Ids):
    eos = end

  whole, made = sample._continued, []
  monkeypatch.setattr(
    sample, "_continued", lambda *a, **k: made.append(whole(*a, **k)) or made[-1]
  )
  texts = model(PROMPTS, temperature=0, vocabulary=Ending())
  for row, text, made_N in zip(greedy, texts, made[0].tolist(), strict=True):
    expected = row[: row.index(end)] if end in row else row
    assert text.ended == (end in row) and text.tokens == len(expected)
    assert text.text == "".join(map(chr, expected))
    assert made_N == expected + [end] * (12 - len(expected))  # nothing more is made


def test_only_tokens_of_the_vocabulary_are_drawn(model):
  class Small(Ids):
    size, bos, eos = 30, 28, 29

    def encode(self, text):
      return np.array([self.bos, 5, self.eos], np.int32)

  texts = model(["abcd" * 5] * 4, temperature=50.0, vocabulary=Small())
  ids = {ord(c) for text in texts for c in text.text}
  assert 10 < len(ids) and max(ids) < 28


def test_capacities_are_left_out_and_that_is_said_once(job, capsys):
  bounded = simple(16, 16, num_experts=4, k=2, capacity_factor=1.25)
  ((dense, sparse),) = job.run.model.segments[0][:1]
  blocks = (dense, dataclasses.replace(sparse, ff=bounded))
  trained = dataclasses.replace(job.run.model, segments=((blocks, 1),))
  assert sample.decodable(trained) == job.run.model
  said = capsys.readouterr().err
  assert said.count("\n") == 1 and "without the capacities" in said
  texts = sample.texts({}, {}, [], model=trained, vocabulary=Bytes(), tokens=1)
  assert texts == [] and capsys.readouterr().err == said
  assert sample.decodable(job.run.model) == job.run.model
  assert capsys.readouterr().err == ""


def test_what_cannot_go_from_left_to_right_is_refused(job):
  ((dense, _),) = job.run.model.segments[0][:1]
  blind = dataclasses.replace(dense.attention, causal=False)
  blocks = (dataclasses.replace(dense, attention=blind),)
  config = dataclasses.replace(job.run.model, segments=((blocks, 1),))
  with pytest.raises(errors.BadConfig, match="no text can be made: .*causal=False"):
    sample.decodable(config)


@pytest.fixture(scope="module")
def run(job, tmp_path_factory):
  """The folder of a run with checkpoints of steps 1 and 2."""
  folder = tmp_path_factory.mktemp("runs") / "run"
  claim(job.run, folder)
  checkpoints = Checkpoints(folder / "checkpoints", {})
  state, batches = job.init(), job.batches()
  for _ in range(2):
    state, *_ = job.train_step(state, next(batches))
    checkpoints.save(state, batches)
  checkpoints.close()
  return folder


def files(folder) -> dict:
  """All that is in a folder, and when it was written."""
  return {
    path: (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else b"")
    for path in [folder, *folder.rglob("*")]
  }


def outcome(capsys, *arguments) -> tuple[int, str, str]:
  """(exit code, what was printed, what was said on stderr)."""
  try:
    code = generate.main([str(a) for a in arguments])
  except SystemExit as stop:
    code = stop.code
  return code, *capsys.readouterr()


@pytest.fixture
def words(monkeypatch):
  """Arguments that all commands share."""
  monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "")  # this process keeps its own
  return ["--tokens", 12, "--temperature", 0]


def test_the_command_prints_the_text_of_the_newest_checkpoint(run, capsys, words):
  before = files(run)
  code, printed, said = outcome(
    capsys, "--workdir", run, "--prompt", "def ", *words, "--json"
  )
  assert (code, said) == (0, "micro: step 2 of 12\n")
  made, _, saved = recorded.read(run)
  (expected,) = sample.texts(
    saved.params,
    saved.balance,
    ["def "],
    model=made.model,
    vocabulary=Bytes(),
    tokens=12,
    temperature=0,
  )
  assert json.loads(printed) == expected._asdict()
  code, printed, _ = outcome(capsys, "--workdir", run, "--prompt", "def ", *words)
  assert (code, printed) == (0, f"def {expected.text}\n")
  assert files(run) == before


def test_prompts_come_from_the_command_line_and_then_from_a_file(
  run, capsys, words, tmp_path
):
  lines, objects = tmp_path / "prompts.txt", tmp_path / "prompts.jsonl"
  lines.write_text("first\r\n\nsecond ü\n")
  objects.write_text('{"prompt": "a\\nb"}\n{"prompt": "", "id": 3}\n' * 2)
  of = ["--workdir", run, *words, "--json", "--prompts"]
  code, printed, _ = outcome(capsys, *of, lines, "--prompt", "", "--prompt", "zero")
  found = [json.loads(line)["prompt"] for line in printed.splitlines()]
  assert (code, found) == (0, ["", "zero", "first", "second ü"])
  code, printed, _ = outcome(capsys, *of, objects)
  found = [json.loads(line)["prompt"] for line in printed.splitlines()]
  assert (code, found) == (0, ["a\nb", ""] * 2)


def test_a_broken_checkpoint_is_named_and_the_one_before_it_used(
  run, capsys, words, tmp_path
):
  copy = shutil.copytree(run, tmp_path / "run")
  newest = copy / "checkpoints" / "2"
  flip(biggest(newest), biggest(newest).stat().st_size // 2)
  before = files(copy)
  arguments = ["--workdir", copy, "--prompt", "def ", *words]
  code, printed, said = outcome(capsys, *arguments)
  assert code == 0 and printed.startswith("def ")
  named, used = said.splitlines()
  assert f"{newest} is broken" in named and used == "micro: step 1 of 12"
  code, _, said = outcome(capsys, *arguments, "--step", 2)
  assert code == 2 and said.count("\n") == 2 and "(steps 2 are broken)" in said
  assert files(copy) == before


def test_more_tokens_than_the_run_was_trained_on_are_noted(run, capsys, words):
  prompts = [word for text in ("a", "b", "c", "d" * 28) for word in ("--prompt", text)]
  code, printed, said = outcome(capsys, "--workdir", run, *prompts, *words)
  assert "note: 41 tokens, prompt included, are more than the 32" in said
  assert code == 0 and printed.startswith("--- 1\na") and "\n--- 4\ndddd" in printed


def nowhere(run, tmp_path):
  return tmp_path / "nowhere"


def empty(run, tmp_path):
  return tmp_path


def whole_run(run, tmp_path):
  return run


def without_checkpoints(run, tmp_path):
  made = tmp_path / "run"
  made.mkdir()
  shutil.copy(run / "config.json", made)
  return made


def with_config(change):
  def made(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "run")
    config = json.loads((run / "config.json").read_text())
    change(config)
    (copy / "config.json").write_text(json.dumps(config))
    return copy

  return made


def wider(config):
  config["model"]["segments"][0][0][0]["ff"]["d_ff"] = 48


def unknown(config):
  config["stepps"] = 3


REFUSED = [
  (nowhere, ["--prompt", "a"], "there is no such folder"),
  (empty, ["--prompt", "a"], "config.json is missing"),
  (without_checkpoints, ["--prompt", "a"], "holds no checkpoint"),
  (with_config(wider), ["--prompt", "a"], "is of another model than"),
  (with_config(unknown), ["--prompt", "a"], "did you mean 'steps'?"),
  (whole_run, [], "there is no prompt; give --prompt TEXT"),
  (whole_run, ["--prompt", "a", "--step", 7], "no checkpoint of step 7; steps there:"),
  (whole_run, ["--prompt", "\udcff"], "is not UTF-8"),
  (whole_run, ["--prompts", "no/such/file"], "cannot be read (No such file"),
  (whole_run, ["--prompt", "a", "--tokens", 0], "'0' is not a whole number >= 1"),
  (whole_run, ["--prompt", "a", "--top-p", 0], "'0' is not a number over 0, at most 1"),
  (whole_run, ["--prompt", "a", "--temperature", "nan"], "'nan' is not a number >= 0"),
  (whole_run, ["--prompt", "a", "--temprature", 1], "unrecognized arguments"),
  (whole_run, ["--prompt", "a", "--workdir", "hf://a/b"], "hf://a/b: unknown scheme"),
]


@pytest.mark.parametrize(("folder", "arguments", "told"), REFUSED)
def test_bad_input_is_one_line_and_changes_nothing(
  run, tmp_path, capsys, folder, arguments, told
):
  workdir = folder(run, tmp_path)
  before = files(tmp_path) | files(run)
  code, printed, said = outcome(capsys, "--workdir", workdir, *arguments)
  assert (code, printed, said.count("\n")) == (2, "", 1)
  assert told in said
  assert files(tmp_path) | files(run) == before


@pytest.mark.parametrize(
  ("name", "content", "told"),
  [
    ("a.txt", b"one\ntwo \xff\n", "a.txt, line 2: byte 5 is not UTF-8."),
    ("b.jsonl", b'{"prompt": "a"}\n\n{"text": "b"}\n', 'b.jsonl, line 3 is not {"pro'),
    ("c.jsonl", b'{"prompt": "\\ud800"}\n', 'c.jsonl, line 1 is not {"prompt"'),
    ("d.txt", b"\n \n", "d.txt holds no prompt"),
  ],
)
def test_a_file_that_holds_no_prompts_is_refused_by_line(
  run, tmp_path, capsys, name, content, told
):
  (tmp_path / name).write_bytes(content)
  code, _, said = outcome(capsys, "--workdir", run, "--prompts", tmp_path / name)
  assert (code, said.count("\n")) == (2, 1) and told in said


def test_help_tells_the_exit_codes(capsys):
  code, printed, _ = outcome(capsys, "--help")
  assert code == 0 and "Exit codes: 0 done, 2 bad input" in printed
  assert "--top-p" in printed
