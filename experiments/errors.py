"""What a user can set right: shown as one line, without a traceback."""
# SPDX-License-Identifier: Apache-2.0


class BadData(ValueError):
  """A data set on disk that is not whole, or cannot be written."""


class BadCheckpoint(ValueError):
  """A checkpoint that is corrupt, or of another run; nothing was changed."""


class Diverged(ValueError):
  """The loss is not a number any more."""
