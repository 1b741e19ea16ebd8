"""What holds in every test: CPU, eight host devices, strict dtypes, fixed examples.

Set before jax makes a backend.  The device count is jax configuration rather than an
environment variable, so that a subprocess started by a test has one device.
"""
# SPDX-License-Identifier: Apache-2.0

import gc
import os
import signal
from pathlib import Path

# What a shell starts in the background ignores Ctrl-C, and so do all its children.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
  signal.signal(signal.SIGINT, signal.default_int_handler)

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # an accelerator run sets it
# Tests compile much and compute little: without LLVM's optimizations they take half the
# time.  `XLA_FLAGS= pytest` runs them with what users have.
os.environ.setdefault(
  "XLA_FLAGS",
  "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true",
)

import hypothesis
import jax

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")

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
