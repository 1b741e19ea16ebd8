"""What holds in every test: where it runs, fixed examples, programs that go again."""
# SPDX-License-Identifier: Apache-2.0

import gc
import signal
from pathlib import Path

import hypothesis
import jax

from tests import eight_devices

# What a shell starts in the background ignores Ctrl-C, and so do all its children.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
  signal.signal(signal.SIGINT, signal.default_int_handler)

eight_devices.prepare()

try:  # grain's worker processes read absl flags, which pytest never parses
  from absl import flags
except ImportError:
  pass
else:
  flags.FLAGS.mark_as_parsed()

# `fixed` draws the same few examples everywhere; `--hypothesis-profile=explore` looks
# for new ones.  No deadline: the first example of a shape pays for its compilation.
hypothesis.settings.register_profile(
  "fixed", derandomize=True, deadline=None, max_examples=12, database=None
)
hypothesis.settings.register_profile(
  "explore", derandomize=False, deadline=None, max_examples=300, print_blob=True
)
hypothesis.settings.load_profile("fixed")


# A compiled program is some mappings of memory, of which Linux gives a process 65530;
# XLA crashes where there are no more.  They are counted when more memory is in use.
_PROCESS, _MOST, _GROWTH = Path("/proc/self"), 30_000, (256 << 20) // 4096
_seen = [0]


def pytest_runtest_teardown() -> None:
  """Lets programs go where a process has too many."""
  if not _PROCESS.exists():
    return
  pages = int((_PROCESS / "statm").read_text().split()[1])
  if pages < _seen[0] + _GROWTH:
    return
  _seen[0] = pages
  if (_PROCESS / "maps").read_bytes().count(b"\n") > _MOST:
    jax.clear_caches()
    gc.collect()
    _seen[0] = int((_PROCESS / "statm").read_text().split()[1])
