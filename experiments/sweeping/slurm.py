"""A sweep as an array job of SLURM: each task runs one cell."""
# SPDX-License-Identifier: Apache-2.0

import pathlib
import shlex
import sys
from collections.abc import Sequence

from experiments import workdir
from experiments.sweeping.cells import Cell

_ROOT = pathlib.Path(__file__).parents[2]

_SCRIPT = """\
#!/usr/bin/env bash
#SBATCH --job-name=sweep
#SBATCH --array=0-{last}{at_a_time}
#SBATCH --requeue
#SBATCH --signal=B:TERM@120
{options}#
# Two minutes before its time is over a task saves and stops.  Submit this file again
# until all are finished: tasks go on where they stopped.
#
{cells}
set -euo pipefail
cd {here}
export PYTHONPATH={root}${{PYTHONPATH:+:$PYTHONPATH}}
exec {command} --cell "$SLURM_ARRAY_TASK_ID"
"""


def write(
  path: pathlib.Path,
  cells: Sequence[Cell],
  *,
  words: Sequence[str],
  options: Sequence[str],
  jobs: int | None,
) -> None:
  """Writes the script.

  Args:
    path: of the script; replaced.
    cells: tasks.
    words: arguments that make the same cells again, relative to this folder.
    options: of sbatch, one a line; they win over those that the script has itself.
    jobs: tasks that run at a time.

  Raises:
    ValueError: an option is not one line that begins with a dash.
  """
  for option in options:
    if not option.startswith("-") or "\n" in option:
      raise ValueError(
        f"--sbatch {option!r}: write one option, such as --sbatch=--gres=gpu:1."
      )
  lines = list(options)
  out = cells[0].folder.parent
  if workdir.is_local(out):  # sbatch does not make it, and gives up without it
    out.mkdir(parents=True, exist_ok=True)
    where = pathlib.Path(out).resolve() / "slurm-%A-%a.out"
    lines.insert(0, f"--output={shlex.quote(str(where))}")
  script = _SCRIPT.format(
    last=len(cells) - 1,
    at_a_time=f"%{jobs}" if jobs else "",
    options="".join(f"#SBATCH {line}\n" for line in lines),
    cells="\n".join(f"# {n}: {cell.name}" for n, cell in enumerate(cells)),
    here=shlex.quote(str(pathlib.Path.cwd())),
    root=shlex.quote(str(_ROOT)),
    command=shlex.join([sys.executable, "-m", "experiments.sweep", *words]),
  )
  path.write_text(script, encoding="utf-8")
