"""A peer without a framework: what a process of its own may do to a benchmark."""
# SPDX-License-Identifier: Apache-2.0

import os
import sys
import time


def missing(name):
  if name == "dies":
    os._exit(3)
  if name == "hangs":
    time.sleep(60)
  if name == "raises":
    raise OSError("no such\nlibrary")
  print("a library's own words")
  sys.stdout.flush()
  return "is not installed" if name == "absent" else None
