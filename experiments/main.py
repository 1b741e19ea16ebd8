"""Trains a run, or goes on with it: `python -m experiments.main --config tiny ...`.

The same command resumes; without --config the run of DIR goes on, as after
`experiments.surgery`.  Ctrl-C and SIGTERM leave a complete checkpoint at the end of the
step under way.  Bad input ends with one line, before anything is compiled or written;
what is slow to import waits until the cheap questions are answered.

Exit codes: 0 done; 1 the loss was not a number for too long; 2 bad input; 130 stopped
by Ctrl-C, 143 by SIGTERM.
"""
# SPDX-License-Identifier: Apache-2.0

import argparse
import difflib
import os
import sys
import traceback
from pathlib import Path

from experiments import configs, extras
from experiments.parser import Parser, run

_NEEDED = {
  "optax": "train",
  "orbax.checkpoint": "train",
  "tqdm": "train",
  "tensorboardX": "train",
  "grain": "data",
  "tensorflow_datasets": "data",
  "array_record": "data",
}


def main(argv: list[str] | None = None) -> int:
  """Runs a command line; returns its exit code: 2 for bad input, 1 if it diverged."""
  parser = Parser(
    prog="python -m experiments.main",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  add = parser.add_argument
  names = ", ".join(configs.names())
  add("--config", metavar="NAME", help=f"{names}; not given: that of DIR, a run")
  add(
    "--workdir",
    required=True,
    metavar="DIR",
    help="of this run alone; made if missing; local, gs:// or s3://",
  )
  add(
    "--set",
    action="append",
    default=[],
    metavar="PATH=VALUE",
    help="a field and a Python literal: steps=100, optim.clip=2; may be repeated",
  )
  add(
    "--compare-dense",
    action="store_true",
    help="also train the dense model of equal active FLOPs, on the same batches",
  )
  add(
    "--dry-run",
    action="store_true",
    help="print configuration, parameters, FLOPs, memory and data, and stop",
  )
  add(
    "--profile",
    type=_steps,
    metavar="START:STOP",
    help="write an xprof trace of these steps, both included, to DIR/profile",
  )
  add(
    "--cache",
    type=_local,
    metavar="DIR",
    default=Path.home() / ".cache" / "jmoe",
    help="of data sets and compiled code; local",
  )
  add(
    "--mesh",
    metavar="AXES",
    help="all devices in a grid: data=2,fsdp=2,expert=2; also tensor and context",
  )
  add(
    "--strategy",
    metavar="NAME",
    help="of sparse layers over a mesh: all_gather, all_to_all+overlap=2, ...",
  )
  add(
    "--distributed",
    action="store_true",
    help="this is one process of several, as SLURM, JobSet or the TPU says; else give",
  )
  add("--coordinator", metavar="HOST:PORT", help="of process 0")
  add("--processes", type=int, metavar="N", help="how many there are")
  add("--process", type=int, metavar="I", help="which one this is, from 0")
  add(
    "--wait",
    type=int,
    metavar="SECONDS",
    help="that the first ones wait for the last before all end; 300 if not given",
  )
  arguments = parser.parse_args(argv)
  if arguments.config not in (None, *(known := configs.names())):
    close = difflib.get_close_matches(arguments.config, known, n=1) or known
    parser.error(f"unknown config {arguments.config!r}; did you mean {close[0]!r}?")
  try:
    for module, extra in _NEEDED.items():
      extras.check(module, extra, needed_by="experiments.main")
  except extras.MissingExtra as error:
    return _refused(error)

  from experiments import errors, hosts

  try:
    _joined(arguments)
    from experiments import recorded, workdir

    with hosts.together("the command"):
      folder = workdir.opened(arguments.workdir)
      name = arguments.config
      runs = workdir.prepared(
        recorded.config(folder) if name is None else configs.load(name),
        folder,
        settings=arguments.set,
        compare_dense=arguments.compare_dense,
        profile=arguments.profile,
      )
  except (ValueError, TypeError, OSError, extras.MissingExtra) as error:
    return hosts.leave(_refused(error), error)
  import jax

  from experiments import dry_run, job, sitting

  # Compiled once, used by every later start of the same run on this machine.
  if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    jax.config.update("jax_compilation_cache_dir", str(arguments.cache / "compiled"))
  command = ["python", "-m", "experiments.main", *(argv or sys.argv[1:])]
  options = sitting.Options(
    arguments.cache, command, arguments.profile, arguments.mesh, arguments.strategy
  )
  try:
    if arguments.dry_run:
      with hosts.together("the dry run"):
        job.check(runs, options)
        for run, folder in runs:
          dry_run.show(run, *job.loaded(run, arguments.cache, folder), options)
    else:
      job.execute(runs, options)
  except (
    errors.BadCheckpoint,
    errors.BadConfig,
    errors.BadData,
    errors.PeerFailed,
    errors.Unreachable,
    extras.MissingExtra,
    OSError,  # a folder that cannot be written, a disk that is full
  ) as error:
    return hosts.leave(_refused(error), error)
  except errors.Diverged as error:
    print(f"error: {error}", file=sys.stderr)
    return 1
  except errors.Stopped as stopped:
    print(f"\n{stopped}", file=sys.stderr)
    return stopped.exit_code
  except KeyboardInterrupt as error:
    print(
      "\nstopped; the same command goes on from the last checkpoint.", file=sys.stderr
    )
    return hosts.leave(130, error)
  except Exception as error:  # the others must not wait for this process
    if hosts.count() > 1:
      traceback.print_exc()
      hosts.leave(1, error)
    raise
  return 0


def _joined(arguments: argparse.Namespace) -> None:
  """Joins the other processes of the job, if there are any.

  Raises:
    ValueError: arguments that do not go together, or processes that did not come.
  """
  address = arguments.coordinator, arguments.processes, arguments.process
  if not arguments.distributed:
    if address != (None, None, None) or arguments.wait is not None:
      raise ValueError(
        "--coordinator, --processes, --process and --wait need --distributed."
      )
    if arguments.strategy is not None and arguments.mesh is None:
      raise ValueError(
        f"--strategy {arguments.strategy} needs --mesh, as in --mesh expert=8."
      )
    return
  if arguments.mesh is None:
    raise ValueError(
      "--distributed needs --mesh, which says how devices are used, as in --mesh "
      "data=16."
    )
  from experiments import hosts, joining

  wait = hosts.PATIENCE if arguments.wait is None else arguments.wait
  joining.start(joining.Job(*address, wait))
  if not hosts.is_first():  # one speaks for all; errors are said by each
    sys.stdout = open(os.devnull, "w")


def _local(text: str) -> Path:
  if "://" in text:
    raise argparse.ArgumentTypeError(f"{text!r} is not a local folder")
  return Path(text)


def _steps(text: str) -> tuple[int, int]:
  first, _, last = text.partition(":")
  if not (first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last)):
    raise argparse.ArgumentTypeError(
      f"{text!r} is not START:STOP with 1 <= START <= STOP, as in 5:8"
    )
  return int(first), int(last)


def _refused(error: Exception) -> int:
  print(f"error: {error}", file=sys.stderr)
  return 2


if __name__ == "__main__":
  run(main)
