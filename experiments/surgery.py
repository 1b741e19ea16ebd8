"""Operations on trained models: `python -m experiments.surgery OP --workdir DIR ...`.

  python -m experiments.surgery extract --workdir runs/emo --domain code --keep 8 \
      --out runs/emo-code

`OP --help` says what an operation does and takes.  DIR is a run, and only read.  OUT is
a new run with the model that was made, its configuration and vocabulary, and
`receipt.json`: what was kept, parameters before and after, how far the outputs moved on
held-out text.  It is there as a whole or not at all.  `--set` changes the new run, as
its steps; what goes on with it is

  python -m experiments.main --workdir OUT

It goes on at the step where DIR was, with the optimizer's moments cut or copied as the
experts were, moments of zero for what is new, and the same place in the data; if DIR
was finished, or the operation leaves nothing that moments could be of, it begins at
step 0 without moments.  The receipt says which and why; `--no-moments` begins anew in
any case, `--moments` is an error where there is nothing to carry.

Exit codes: 0 done, 2 bad input, 130 stopped by Ctrl-C.
"""
# SPDX-License-Identifier: Apache-2.0

import argparse
import dataclasses
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from experiments import extras, operations
from experiments.parser import Parser, ended, run, seed
from jmoe.use import nearest


def main(argv: list[str] | None = None) -> int:
  """Runs a command line; returns its exit code."""
  argv = sys.argv[1:] if argv is None else argv
  name = argv[0] if argv else ""
  known = operations.names()
  if name in ("", "-h", "--help"):
    print(f"{__doc__}\noperations: {', '.join(known)}")
    return 0 if name else 2
  if name not in known:
    print(f"error: unknown operation {name!r}; {nearest(name, known)}", file=sys.stderr)
    return 2
  operation = operations.load(name)
  arguments = _parser(name, operation).parse_args(argv[1:])

  def work() -> None:
    extras.check_training("experiments.surgery")
    _operate(name, operation, arguments)

  def stopped() -> str:
    if arguments.out.exists():
      return f"stopped; {arguments.out} is whole."
    return "stopped; nothing was written."

  return ended(work, stopped=stopped)


def operate(name: str, argv: list[str]) -> None:
  """Does an operation, for other commands.

  Args:
    name: of the operation.
    argv: its arguments, `--workdir` and `--out` among them.

  Raises:
    BadCheckpoint, BadConfig, BadData, Unreachable, ValueError, OSError: see there.
  """
  operation = operations.load(name)
  _operate(name, operation, _parser(name, operation).parse_args(argv))


def settings(name: str, argv: list[str]) -> dict[str, Any]:
  """What `receipt.json` says that an operation was asked for, but for its step.

  Args:
    name: of the operation.
    argv: as for `operate`.
  """
  return _settings(_parser(name, operations.load(name)).parse_args(argv))


def _settings(arguments: argparse.Namespace) -> dict[str, Any]:
  common = "out step seed set cache moments".split()
  return {k: v for k, v in vars(arguments).items() if k not in common}


def _parser(name: str, operation: Any) -> argparse.ArgumentParser:
  made = Parser(
    prog=f"python -m experiments.surgery {name}",
    description=operation.__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  add = made.add_argument
  add("--workdir", required=True, metavar="DIR", help="of a run, which is only read")
  add("--out", required=True, type=_local, metavar="DIR", help="of the new run; local")
  add("--step", type=int, help="of the checkpoint; the newest whole one if not given")
  add("--seed", type=seed, default=0, help="of whatever is drawn; 0 if not given")
  add("--set", action="append", default=[], metavar="PATH=VALUE", help="of the new run")
  add("--moments", action=argparse.BooleanOptionalAction,
      help="go on with the optimizer's state; if it can, if not given")  # fmt: skip
  add("--cache", type=Path, metavar="DIR", default=Path.home() / ".cache" / "jmoe")
  operation.arguments(add)
  return made


def _operate(name: str, operation: Any, arguments: argparse.Namespace) -> None:
  import jax

  from experiments import workdir
  from experiments.operations._source import Source

  out = arguments.out
  if out.exists():
    raise ValueError(f"--out {out} is there already; give a new folder.")
  if Path(arguments.workdir).resolve() in out.resolve().parents:
    raise ValueError(
      f"--out {out} is inside of --workdir {arguments.workdir}, which is only read; "
      "give a folder beside it."
    )
  if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    jax.config.update("jax_compilation_cache_dir", str(arguments.cache / "compiled"))
  source = Source(workdir.opened(arguments.workdir), arguments.cache, arguments.step)
  print(f"{source.run.name}: step {source.step}", file=sys.stderr)
  outcome = operation.operate(source, arguments)
  _write(name, source, outcome, arguments)


def _write(name: str, source: Any, outcome: Any, arguments: Any) -> None:
  """The folder of the new run, whole."""
  from etils import epath

  from experiments import checkpoint, job, opening, workdir
  from experiments.whole import whole
  from jmoe import surgery

  made = _run(name, source.run, outcome, arguments.set)
  folder = epath.Path(arguments.out)
  job.check([(made, folder)])
  state, carried = _state(source, outcome, made, arguments.moments)
  batches = opening.training_batches(made, source.encoded)
  if int(state.step) and made.data == source.run.data:
    batches.set_state(source.saved.positions)
  receipt = surgery.receipt(
    name,
    source.model,
    outcome.model,
    settings={"step": source.step} | _settings(arguments),
    kept=outcome.kept,
    sample=source.sample(),
    notes={**outcome.notes, "moments": carried},
  )
  with whole(arguments.out, alone=True) as unfinished:
    place = epath.Path(unfinished)
    workdir.claim(made, place)
    workdir.write_json(place / "manifest.json", source.texts.manifest)
    workdir.write_json(place / "receipt.json", receipt.to_json())
    source.words.save(unfinished / "vocabulary")
    saved = checkpoint.Checkpoints(
      place / "checkpoints", opening.facts(made, source.texts, source.encoded)
    )
    saved.save(state, batches)
    saved.close()
  print("\n".join([*receipt.lines(), f"moments {carried}"]))
  print(f"written to {arguments.out}")


def _state(
  source: Any, outcome: Any, made: Any, wanted: bool | None
) -> tuple[Any, str]:
  """The state of the new run, and what became of the old one's moments."""
  import jax
  import jax.numpy as jnp

  from experiments import carried
  from experiments.program import program
  from experiments.state import restarted

  parts = program(
    made,
    byte_lengths=source.words.byte_lengths,
    num_domains=len(source.texts.domains),
  )
  zero = jnp.zeros((), jnp.int32)
  key = jax.random.key_data(jax.random.key(made.seed))
  like = jax.eval_shape(parts.init)  # nothing is drawn
  state = restarted(
    dataclasses.replace(like, step=zero, skipped=zero, key=key),
    outcome.model.params,
    outcome.model.state,
    optimizer=parts.optimizer,
  )
  why = outcome.moments if isinstance(outcome.moments, str) else ""
  if not why and made.steps <= source.step:
    why = f"{source.step} steps are done, and the new run has {made.steps}"
  if wanted is False:
    return state, "begin anew: --no-moments"
  try:
    if why:
      raise ValueError(why)
    moments = carried.optimizer(
      source.saved.optimizer,
      state.optimizer,
      change=cast(Any, outcome.moments),
      before=source.model,
      after=outcome.model,
    )
  except ValueError as error:
    if wanted:
      raise ValueError(f"--moments: {error}; leave it out to begin anew.") from error
    return state, f"begin anew: {error}"
  rest = {name: jnp.asarray(x) for name, x in source.saved.rest.items()}
  if made.seed != source.run.seed:
    del rest["key"]
  said = f"go on from step {source.step}"
  if made.data != source.run.data:
    said += ", the data begins anew"
  return dataclasses.replace(state, optimizer=moments, **rest), said


def _run(name: str, old: Any, outcome: Any, given: Sequence[str]) -> Any:
  """The run of the new model, after the operation's and the command line's changes.

  Raises:
    ValueError: experts are frozen by numbers that they have no longer.
  """
  from experiments.config import sparse_layers
  from experiments.optim.freeze import renumbered
  from experiments.settings import with_settings
  from jmoe.losses import loss_name

  model, changes = outcome.model.config, [*outcome.settings, *given]
  told = {loss_name(loss) for ff in sparse_layers(model) for loss in ff.losses}
  weights = tuple(pair for pair in old.loss_weights if pair[0] in told)
  made = dataclasses.replace(
    old, name=f"{old.name}-{name}", model=model, loss_weights=weights, start_from=""
  )
  if all(change.partition("=")[0] != "optim.freeze" for change in changes):
    freeze = renumbered(old.optim.freeze, outcome.origins)
    made = dataclasses.replace(
      made, optim=dataclasses.replace(old.optim, freeze=freeze)
    )
  return with_settings(made, changes)


def _local(text: str) -> Path:
  if "://" in text:  # before a `Path` makes one slash of two
    raise argparse.ArgumentTypeError(f"{text!r} is not local; give a new local folder")
  return Path(text)


if __name__ == "__main__":
  run(main)
