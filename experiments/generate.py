"""Text that a trained run makes of prompts.

  python -m experiments.generate --workdir runs/tiny --prompt 'def ' --temperature 0
  python -m experiments.generate --workdir runs/small --prompts FILE --top-p 0.9 --json

Parameters are those of the newest whole checkpoint, or of --step; one that is broken is
named, and the one before it used.  The run's folder is only read, and the run may still
go on.  A prompt stands at the begin of a document, and its text goes on to an end of
document or for --tokens.  A line of the prompts' FILE is a prompt, empty ones left out;
of a FILE.jsonl it is {"prompt": TEXT}, which may hold line ends.

A token costs one pass over that token, for keys and values of those before it are kept.
Each is drawn with logits divided by the temperature (0: always the likeliest), among
the likeliest tokens that hold at least the probability P together.  What a prompt gives
depends on the seed and on its number in the list, not on the others.

A model that was trained with capacities, which drop choices of experts by the other
tokens of a batch, makes text without them; that is said.  One whose experts choose
tokens, or which is not causal, makes none.

Exit codes: 0 done, 2 bad input, 130 stopped by Ctrl-C.
"""
# SPDX-License-Identifier: Apache-2.0

import argparse
import json
import math
import os
import sys
from pathlib import Path
from typing import Any

from experiments import extras
from experiments.errors import BadCheckpoint, BadConfig, BadData, Unreachable
from experiments.parser import Parser, ended, run


def main(argv: list[str] | None = None) -> int:
  """Runs a command line; returns its exit code."""
  parser = _parser()
  arguments = parser.parse_args(argv)
  bad = BadCheckpoint, BadConfig, BadData, Unreachable, OSError
  return ended(lambda: _run(arguments), bad=bad, stopped="stopped.")


def _run(arguments: argparse.Namespace) -> None:
  extras.check_training("experiments.generate")
  # jax is behind these; a wrong argument does not wait for it.
  from experiments import recorded, sample, workdir

  prompts = _prompts(arguments.prompt, arguments.prompts)
  run, words, saved = recorded.read(workdir.opened(arguments.workdir), arguments.step)
  print(f"{run.name}: step {saved.step} of {run.steps}", file=sys.stderr)
  longest = max(len(words.encode(p.encode())) - 1 for p in prompts) + arguments.tokens
  if longest > run.data.seq:
    print(
      f"note: {longest} tokens, prompt included, are more than the {run.data.seq} "
      "that the run was trained on at a time; what is beyond may be poor.",
      file=sys.stderr,
    )
  _keep_compiled(arguments.cache)
  texts = sample.texts(
    saved.params,
    saved.balance,
    prompts,
    model=run.model,
    vocabulary=words,
    tokens=arguments.tokens,
    temperature=arguments.temperature,
    top_p=arguments.top_p,
    seed=arguments.seed,
  )
  for number, text in enumerate(texts, 1):
    if arguments.json:
      print(json.dumps(text._asdict(), ensure_ascii=False))
      continue
    if len(texts) > 1:
      print(f"--- {number}")
    print(text.prompt + text.text)


def _parser() -> argparse.ArgumentParser:
  made = Parser(
    prog="python -m experiments.generate",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  add = made.add_argument
  add("--workdir", required=True, metavar="DIR", help="of a run; local, gs:// or s3://")
  add(
    "--prompt",
    action="append",
    type=_text,
    metavar="TEXT",
    help="may be repeated, and empty",
  )
  add("--prompts", type=Path, metavar="FILE", help="more of them, after those")
  add(
    "--tokens",
    type=_number(int, "a whole number >= 1", lambda n: n >= 1),
    default=200,
    metavar="N",
    help="at most, of each text; 200 if not given",
  )
  add(
    "--temperature",
    type=_number(float, "a number >= 0", lambda t: 0 <= t < math.inf),
    default=0.7,
    metavar="T",
    help="0.7 if not given; 0 is greedy",
  )
  add(
    "--top-p",
    type=_number(float, "a number over 0, at most 1", lambda p: 0 < p <= 1),
    default=1.0,
    metavar="P",
    help="1 if not given: all tokens",
  )
  add(
    "--seed",
    type=_number(int, "a whole number >= 0", lambda n: 0 <= n < 2**32),
    default=0,
    metavar="SEED",
    help="0 if not given; the same gives the same text",
  )
  add(
    "--step",
    type=_number(int, "a whole number >= 0", lambda n: n >= 0),
    metavar="STEP",
    help="of the checkpoint; the newest whole one if not given",
  )
  add(
    "--json",
    action="store_true",
    help="a line of JSON for each prompt: prompt, text, tokens, ended",
  )
  add(
    "--cache",
    type=Path,
    metavar="DIR",
    default=Path.home() / ".cache" / "jmoe",
    help="of compiled code, as of experiments.main; local",
  )
  return made


def _number(kind: type, what: str, fits: Any) -> Any:
  def parsed(text: str) -> Any:
    try:
      value = kind(text)
    except ValueError:
      value = None
    if value is None or not fits(value):
      raise argparse.ArgumentTypeError(f"{text!r} is not {what}")
    return value

  return parsed


def _text(text: str) -> str:
  try:
    text.encode()
  except UnicodeEncodeError:  # bytes that are no UTF-8 come as lone surrogates
    raise argparse.ArgumentTypeError(f"{text!r} is not UTF-8") from None
  return text


def _prompts(given: list[str] | None, path: Path | None) -> list[str]:
  """Those of the command line, then those of the file.

  Raises:
    BadData: there are none, or the file cannot be read, with its line.
  """
  prompts = list(given or [])
  if path is None:
    if not prompts:
      raise BadData("there is no prompt; give --prompt TEXT or --prompts FILE.")
    return prompts
  try:
    lines = path.read_bytes().split(b"\n")
  except OSError as error:
    reason = error.strerror or type(error).__name__
    raise BadData(f"--prompts {path} cannot be read ({reason}).") from error
  for number, line in enumerate(lines, 1):
    where = f"--prompts {path}, line {number}"
    try:
      text = line.removesuffix(b"\r").decode()
    except UnicodeDecodeError as error:
      raise BadData(f"{where}: byte {error.start + 1} is not UTF-8.") from error
    if text.strip() and path.suffix == ".jsonl":
      prompts.append(_of_json(text, where))
    elif text.strip():
      prompts.append(text)
  if not prompts:
    raise BadData(f"--prompts {path} holds no prompt; write one a line.")
  return prompts


def _of_json(line: str, where: str) -> str:
  try:
    prompt = json.loads(line)["prompt"]
    prompt.encode()
  except (ValueError, KeyError, TypeError, AttributeError):
    raise BadData(f'{where} is not {{"prompt": TEXT}}.') from None
  return prompt


def _keep_compiled(cache: Path) -> None:
  import jax

  if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    jax.config.update("jax_compilation_cache_dir", str(cache / "compiled"))


if __name__ == "__main__":
  run(main)
