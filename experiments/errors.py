"""What a user can set right: shown as one line, without a traceback."""
# SPDX-License-Identifier: Apache-2.0


class BadConfig(ValueError):
  """Parts of a run that do not fit one another."""


class BadData(ValueError):
  """A corpus or data set that cannot be read, is not whole, or cannot be written."""


class BadCheckpoint(ValueError):
  """No whole checkpoint, or one of another run; nothing was changed."""


class Unreachable(ValueError):
  """An object store that cannot be read or written."""


class PeerFailed(ValueError):
  """Another process of the job found an error, or has other inputs than this one."""


class Diverged(ValueError):
  """The loss was not a number for too many steps in a row."""


class Stopped(Exception):
  """A signal asked for it; the state was saved before.

  Args:
    signal: its number.
    step: that was saved.
  """

  def __init__(self, signal: int, step: int):
    super().__init__(f"stopped after step {step}; the same command goes on from there.")
    self.exit_code = 128 + signal
