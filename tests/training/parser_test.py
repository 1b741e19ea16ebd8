"""How commands end that did not come to their own end."""
# SPDX-License-Identifier: Apache-2.0

import os
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.errors import Diverged, Stopped
from experiments.extras import MissingExtra
from experiments.parser import Parser, ended, run


def interrupted() -> int:
  raise KeyboardInterrupt


def test_ctrl_c_before_a_command_minds_it_is_one_line(capsys):
  with pytest.raises(SystemExit) as stopped:
    run(interrupted)
  assert stopped.value.code == 130
  assert capsys.readouterr().err == "\nstopped.\n"


def test_a_negative_number_is_no_option_however_it_is_written():
  parser = Parser()
  parser.add_argument("--bias", type=float)
  for text in ("-1e9", "-2", "-.5", "-1.5E-3"):
    assert parser.parse_args(["--bias", text]).bias == float(text)


def test_the_code_of_a_command_is_kept():
  for code in (0, 2):
    with pytest.raises(SystemExit) as done:
      run(lambda code=code: code)
    assert done.value.code == code


def test_a_reader_that_has_gone_is_no_traceback():
  code = "from experiments.parser import run; run(lambda: print('x' * 10**6) or 0)"
  read, write = os.pipe()
  os.close(read)
  found = subprocess.run(
    [sys.executable, "-c", code],
    cwd=Path(__file__).parents[2],
    stdout=write,
    stderr=subprocess.PIPE,
    check=False,
  )
  os.close(write)
  assert (found.returncode, found.stderr) == (141, b"")


@pytest.mark.parametrize(
  ("raised", "code", "said"),
  [
    (ValueError("bad"), 2, "error: bad\n"),
    (MissingExtra("none"), 2, "error: none\n"),
    (Diverged("no number"), 1, "error: no number\n"),
    (Stopped(15, 3), 143, "\nstopped after step 3; the same command goes on"),
    (KeyboardInterrupt(), 130, "\nstopped; nothing was written.\n"),
  ],
)
def test_work_that_is_cut_short_says_why(capsys, raised, code, said):
  def work():
    raise raised

  assert ended(work, stopped="stopped; nothing was written.") == code
  assert capsys.readouterr().err.startswith(said)


@pytest.mark.parametrize("fault", [TypeError(), BrokenPipeError()])
def test_what_no_user_can_set_right_is_raised(fault):
  def work():
    raise fault

  with pytest.raises(type(fault)):
    ended(work)


def test_the_code_of_work_is_kept():
  assert ended(lambda: None) == 0 and ended(lambda: 3) == 3
